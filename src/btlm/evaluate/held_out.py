"""Loss of a checkpoint on held-out text by source, in nats per token and in bits per byte of text."""

import math
from pathlib import Path

import numpy as np
import torch

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.to_transformers import load_model
from btlm.data.shards import TokenShards
from btlm.engine.engine import Engine
from btlm.train.distributed import join_ranks
from btlm.train.held_out import evaluate_held_out, token_bytes
from btlm.train.step import LossModel


def transformers_loss(
    model: Checkpoint | Path | str,
    shards: TokenShards,
    context: int,
    tokens: int,
    *,
    dtype: str = "float32",
    compute_dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, float]]:
    """Loss with Transformers on the CPU; quantized weights are decoded.

    Args:
        model: An open checkpoint, its folder, or its id on the Hugging Face Hub.
        shards: Shards with held-out documents.
        context: Largest number of tokens per row; rows do not overlap.
        tokens: Largest number of held-out tokens per source.
        dtype: Dtype of the weights; see :func:`btlm.checkpoint.load_model`.
        compute_dtype: Dtype of the matrix products.

    Returns:
        ``nats_per_token`` and ``bits_per_byte``, each by source and as the mean of the sources (key ``mean``); empty if
        there is no held-out text.
    """
    loaded, _ = load_model(model, dtype=dtype, device="cpu")
    loss_model = LossModel(loaded, compute_dtype)
    return evaluate_held_out(loss_model, shards, context, tokens, token_bytes(), join_ranks("cpu"))


def engine_loss(
    model: Checkpoint | Path | str, shards: TokenShards, context: int, tokens: int, *, cache_dtype: str = "auto"
) -> dict[str, dict[str, float]]:
    """Loss in the engine: with 8-bit activations and cache if the weights are quantized, else in their dtype.

    Args:
        model, shards, context, tokens: As for :func:`transformers_loss`.
        cache_dtype: Dtype of cached keys and values; see :class:`btlm.engine.Engine`.

    Returns:
        The same as :func:`transformers_loss`.
    """
    engine = Engine.open(model, context=context, cache_dtype=cache_dtype)
    bytes_of = token_bytes()
    loss: dict[str, dict[str, float]] = {"nats_per_token": {}, "bits_per_byte": {}}
    for source in shards.sources:
        ids = shards.source_tokens("validation", source, tokens).astype(np.int64)
        rows = [row for row in np.split(ids, range(context, len(ids), context)) if len(row) > 1]
        if rows:
            nats = -sum(float(engine.score(row.tolist()).sum(dtype=np.float64)) for row in rows)
            size = sum(int(bytes_of[row[1:]].sum()) for row in rows)
            loss["nats_per_token"][source] = nats / sum(len(row) - 1 for row in rows)
            loss["bits_per_byte"][source] = nats / math.log(2) / size
    if not loss["nats_per_token"]:
        return {}
    return {unit: {**values, "mean": sum(values.values()) / len(values)} for unit, values in loss.items()}
