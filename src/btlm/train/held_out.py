"""Held-out loss per source, in nats per token and in bits per byte of text."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from btlm.data.shards import TokenShards
from btlm.model.tokenization_btlm import load_tokenizer

from .distributed import Ranks
from .step import LossModel


@torch.no_grad()
def evaluate_held_out(
    model: LossModel,
    shards: TokenShards,
    sequence_length: int,
    tokens_per_source: int,
    token_bytes: NDArray[np.int64],
    ranks: Ranks,
    rows_per_pass: int = 1,
    mask_documents: bool = False,
) -> dict[str, dict[str, float]]:
    """Loss on the first held-out documents of each source.

    Bits per byte compare models with different vocabularies; training minimizes nats per token.

    Args:
        model: Model on the device of the ranks.
        shards: Shards with held-out documents.
        sequence_length: Largest number of tokens per row; rows do not overlap.
        tokens_per_source: Number of tokens to read per source, from its first held-out documents.
        token_bytes: Bytes of text per token id, int64 ``[vocab]``; 0 for end-of-text.
        ranks: Ranks that share the rows.
        rows_per_pass: Rows per forward pass.
        mask_documents: Whether attention and loss stay within documents, as in training with ``data.mask_documents``.

    Returns:
        ``nats_per_token`` and ``bits_per_byte``, each by source and as the mean of the sources (key ``mean``); empty if
        there is no held-out text.
    """
    was_training = model.training
    model.eval()
    passes: list[tuple[int, NDArray[np.int64]]] = []
    for index, source in enumerate(shards.sources):
        tokens = shards.source_tokens("validation", source, tokens_per_source).astype(np.int64)
        whole = len(tokens) // sequence_length
        rows, rest = (
            tokens[: whole * sequence_length].reshape(whole, sequence_length),
            tokens[whole * sequence_length :],
        )
        passes += [(index, rows[start : start + rows_per_pass]) for start in range(0, whole, rows_per_pass)]
        passes += [(index, rest[None])] if len(rest) > 1 else []
    sums = np.zeros((len(shards.sources), 3))  # nats, tokens, bytes
    # Sharded ranks run in lockstep, so all make the same number of passes; surplus passes are not counted.
    for first in range(0, len(passes), ranks.world_size):
        place = first + ranks.rank
        index, ids = passes[min(place, len(passes) - 1)]
        documents = _documents(ids, token_bytes) if mask_documents else np.zeros_like(ids)
        inside = documents[:, 1:] == documents[:, :-1]
        on_device = [torch.from_numpy(array).to(ranks.device) for array in (ids, documents)]
        nats = float(model(on_device[0], on_device[1] if mask_documents else None))
        if place < len(passes):
            sums[index] += nats, inside.sum(), token_bytes[ids[:, 1:]][inside].sum()
    model.train(was_training)
    sums = np.array(ranks.sum(*sums.ravel().tolist())).reshape(sums.shape)
    counted = {source: total for source, total in zip(shards.sources, sums.tolist(), strict=True) if total[2]}
    if not counted:
        return {}
    return {
        "nats_per_token": _with_mean({source: nats / tokens for source, (nats, tokens, _) in counted.items()}),
        "bits_per_byte": _with_mean({source: nats / math.log(2) / size for source, (nats, _, size) in counted.items()}),
    }


def token_bytes() -> NDArray[np.int64]:
    """Bytes of text that each token of the GPT-2 vocabulary stands for, int64 ``[50257]``; 0 for end-of-text."""
    tokenizer = load_tokenizer()
    # A byte-level vocabulary writes every byte as one character.
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    sizes[tokenizer.eos_token_id] = 0
    return np.array(sizes, dtype=np.int64)


def _documents(ids: NDArray[np.int64], token_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of each token's document within its row, both ``[B, L]``; a document ends with end-of-text."""
    ends = token_bytes[ids[:, :-1]] == 0
    return np.pad(ends.cumsum(axis=1), ((0, 0), (1, 0)))


def _with_mean(values: dict[str, float]) -> dict[str, float]:
    return {**values, "mean": sum(values.values()) / len(values)}
