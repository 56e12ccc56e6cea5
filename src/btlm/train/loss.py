"""Cross-entropy of the head, a few tokens at a time: logits of ``[tokens, vocab]`` never exist whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the logits buffer; small enough that its passes stay in the last-level cache of a CPU.
CHUNK_TOKENS = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks: logits are computed once, in buffers that every chunk reuses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, with_grad: bool) -> Tensor:
        with_weight_grad = with_grad and ctx.needs_input_grad[1]  # Not under adapters.
        head = weight.to(hidden.dtype)
        rows = min(CHUNK_TOKENS, len(hidden))
        logits_buffer = hidden.new_empty(rows, len(head))
        probs_buffer = torch.empty(rows, len(head), dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if with_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight_grad else None
            grad_weight_part = torch.empty_like(head) if with_weight_grad else None
        for part, target, *grad_part in zip(
            hidden.split(rows), labels.split(rows), *((grad_hidden.split(rows),) if with_grad else ()), strict=True
        ):
            logits = torch.mm(part, head.T, out=logits_buffer[: len(part)])
            probs = torch.softmax(logits, dim=-1, dtype=torch.float32, out=probs_buffer[: len(part)])
            # One pass of exponentials serves loss and gradient: the log of the sum of exponentials follows from the
            # largest logit and its probability, which is never small.
            log_sum = logits.amax(dim=-1).float() - probs.amax(dim=-1).log()
            counted = target != -100
            index = target.clamp(min=0)[:, None]
            loss += torch.where(counted, log_sum - logits.gather(1, index)[:, 0].float(), 0.0).sum()
            if not with_grad:
                continue
            grad_logits = probs.scatter_add_(1, index, probs.new_full(index.shape, -1.0))
            if not counted.all():
                grad_logits.mul_(counted[:, None])
            logits.copy_(grad_logits)
            torch.mm(logits, head, out=grad_part[0])
            if grad_weight is not None:
                grad_weight += torch.mm(logits.T, part, out=grad_weight_part)
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
        return grad_hidden * grad_loss.to(grad_hidden.dtype), grad_weight, None, None


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
