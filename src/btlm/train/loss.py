"""Cross-entropy of the head, a few tokens at a time: logits of ``[tokens, vocab]`` never exist whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the buffers of logits and probabilities. The gradient of the head is summed in memory once per chunk, so that
# larger chunks save a GPU time; with these, the memory of BTLM-3B peaks elsewhere.
CHUNK_TOKENS = {"cpu": 1024, "cuda": 2048}
# Probabilities are normal numbers of fp32 and bf16 down to here, with all their digits.
_UNDERFLOW = 1e-30


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks: logits are computed once, in buffers that every chunk reuses.

    One softmax serves loss and gradient. In training it is of the products' dtype, as the gradient of the logits has to
    be for the products that follow: the loss of a token is then rounded like its logits are, and that of a batch is a
    mean over thousands. Without gradients it is fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> Tensor:
        with_weight_grad = with_grad and ctx.needs_input_grad[1]  # Not under adapters.
        head = weight.to(hidden.dtype)
        rows = min(CHUNK_TOKENS.get(hidden.device.type, CHUNK_TOKENS["cpu"]), len(hidden))
        may_wait = _may_wait_for(hidden.device)
        logits_buffer = hidden.new_empty(rows, len(head))
        probs_buffer = torch.empty_like(logits_buffer, dtype=None if with_grad else torch.float32)
        row_numbers = torch.arange(rows, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else hidden
        grad_weight, grad_weight_part = None, torch.empty_like(head) if with_weight_grad else None
        for part, target, grad_part in zip(
            hidden.split(rows), labels.split(rows), grad_hidden.split(rows), strict=True
        ):
            logits = torch.mm(part, head.T, out=logits_buffer[: len(part)])
            probs = torch.softmax(logits, dim=-1, dtype=probs_buffer.dtype, out=probs_buffer[: len(part)])
            counted = target != -100
            index = target.clamp(min=0)
            target_probs = probs[row_numbers[: len(part)], index].float()
            too_small = target_probs < _UNDERFLOW
            nats = -target_probs.log()
            if not may_wait or bool(too_small.any()):
                # The log of the sum of exponentials, by the largest logit and its probability, which is never small.
                log_sum = logits.amax(dim=-1).float() - probs.amax(dim=-1).float().log()
                from_logits = log_sum - logits[row_numbers[: len(part)], index].float()
                nats = from_logits if may_wait else torch.where(too_small, from_logits, nats)
            loss += torch.where(counted, nats, 0.0).sum()
            if not with_grad:
                continue
            # By index: scattering would copy the whole buffer.
            probs[row_numbers[: len(part)], index] = (target_probs - 1).to(probs.dtype)
            # Without the tokens that are not counted. Their rows of the products are narrower than those of `probs`.
            torch.mm(probs, head, out=grad_part).masked_fill_(~counted[:, None], 0.0)
            if grad_weight_part is not None:
                torch.mm(probs.T, part.masked_fill(~counted[:, None], 0.0), out=grad_weight_part)
                grad_weight = (
                    grad_weight_part.to(torch.float32, copy=True)
                    if grad_weight is None
                    else grad_weight.add_(grad_weight_part)
                )
        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_loss = grad_outputs[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        # The factor in fp32: rounded to bf16 it would scale the gradients of the blocks against those of the head.
        return (grad_hidden.float() * grad_loss).to(grad_hidden.dtype), grad_weight, None, None


def _may_wait_for(device: torch.device) -> bool:
    """Whether values may decide what is computed: on a GPU, Python would wait for them, and the GPU then for Python."""
    return device.type == "cpu"


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of ``hidden @ weight.T`` against ``labels``.

    Args:
        hidden: ``[tokens, width]`` in the dtype that the products are computed in; sums are in fp32.
        weight: The head, ``[vocab, width]``.
        labels: int64 ``[tokens]``; -100 is not counted.

    Returns:
        fp32 scalar in nats, differentiable in ``hidden`` and ``weight``.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, torch.is_grad_enabled())
    return loss


def next_token_labels(input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Labels of packed rows: the token that follows; -100 at the end of each row.

    Args:
        input_ids: int64 ``[B, L]``.
        document_ids: Number of the document of each token, ``[B, L]``; where given, the first token of a document is
            not predicted from the one before.
    """
    labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    if document_ids is None:
        return labels
    return labels.masked_fill(F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1)), -100)
