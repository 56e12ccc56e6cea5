"""One optimizer step over micro-batches and ranks, with gradient clipping; updates that are not finite are refused."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btlm.data.loader import Batch
from btlm.errors import NotFinite
from btlm.model import BTLMLMHeadModel
from btlm.model.mup import scale_logits

from .distributed import Ranks
from .loss import linear_cross_entropy, next_token_labels


class LossModel(nn.Module):
    """The network with its head and loss in one ``forward``, so that sharding gathers the head for the loss too.

    Args:
        network: Network, with or without adapters in its layers.
        dtype: Dtype of matrix products; weights and residual sums stay in fp32.
    """

    def __init__(self, network: BTLMLMHeadModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy of packed rows, summed over their tokens: fp32 scalar in nats.

        Args:
            input_ids: Token ids, int64 ``[B, L]``.
            document_ids: Document number of each token, ``[B, L]``; if given, attention and loss stay within documents.
        """
        mask = None
        if document_ids is not None:
            mask = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
        # Each weight is used once per pass, so autocast's cache would only keep copies of all of them until its end.
        with torch.autocast(
            input_ids.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        ):
            # Residuals are summed in fp32, even if the token table was gathered in bf16.
            embeddings = self.network.transformer.wte(input_ids).float()
            hidden = self.network.transformer(
                inputs_embeds=embeddings, attention_mask=mask, use_cache=False
            ).last_hidden_state
        hidden = scale_logits(hidden, self.network.config).flatten(0, 1).to(self.dtype)
        labels = next_token_labels(input_ids, document_ids).flatten()
        return linear_cross_entropy(hidden, self.network.lm_head.weight, labels)


class StepResult(NamedTuple):
    """Measurements of one step over all ranks: loss in nats per token, and gradient norm before clipping."""

    loss: float
    grad_norm: float


def take_step(
    model: LossModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    micro_batch_tokens: int,
    clip_norm: float,
    ranks: Ranks,
) -> StepResult:
    """Update the weights with one batch. The loss is summed over its tokens and divided by all ranks' valid tokens.

    Args:
        model: Model, sharded if there are several ranks.
        optimizer: Optimizer of its parameters, with the learning rates of this step.
        batch: Rows of this rank.
        micro_batch_tokens: Tokens per forward pass.
        clip_norm: Largest norm of the gradient over all parameters; larger gradients are scaled down to it.
        ranks: Ranks that share the batch.

    Raises:
        NotFinite: The loss or the gradient is not finite; nothing was updated. The exception holds the mean loss of
            each micro-batch of each rank.
    """
    rows = max(1, micro_batch_tokens // batch.sequence_length)
    input_ids = torch.from_numpy(batch.input_ids).to(ranks.device).split(rows)
    if batch.document_ids is None:
        document_ids: tuple[Tensor | None, ...] = (None,) * len(input_ids)
    else:
        document_ids = torch.from_numpy(batch.document_ids).to(ranks.device).split(rows)
    counts = [
        int((next_token_labels(ids, documents) != -100).sum())
        for ids, documents in zip(input_ids, document_ids, strict=True)
    ]
    (valid,) = ranks.sum(sum(counts))
    losses = []
    for ids, documents in zip(input_ids, document_ids, strict=True):
        loss = model(ids, documents) / valid
        # Sharding averages the gradients over the ranks, but their sum is needed.
        (loss * ranks.world_size).backward()
        losses.append(loss.detach())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(_whole(torch.nn.utils.clip_grad_norm_(parameters, clip_norm)))
    (total,) = ranks.sum(sum(torch.stack(losses).double().tolist()))
    if not (math.isfinite(total) and math.isfinite(norm)):
        optimizer.zero_grad()
        means = [float(loss) * valid / max(1, count) for loss, count in zip(losses, counts, strict=True)]
        raise NotFinite(f"loss {total}, gradient norm {norm}; nothing was updated", ranks.gather(means))
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(total, norm)


def _whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor that may be sharded over ranks."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor
