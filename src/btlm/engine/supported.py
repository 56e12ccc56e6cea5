"""The networks that the engine runs, and the numbers that only the engine derives from them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from btlm.errors import NotSupported, TooLong
from btlm.model.architecture_btlm import Architecture, slope_exponents

_MAX_HEAD_DIM = 256  # of the attention kernels


def supported(architecture: Architecture, factor: float | None = None) -> Architecture:
    """Check that the engine runs a network: any of the family but those with dynamic interpolation.

    Args:
        architecture: The network.
        factor: Factor of position interpolation instead of the stored one, at least 1.

    Returns:
        The network, with this factor.

    Raises:
        NotSupported: The engine does not run this network.
        ValueError: The factor is impossible.
    """
    if factor is not None:
        if not 1 <= factor < math.inf:
            raise ValueError(f"The interpolation factor is {factor}; it must be at least 1.")
        if factor > 1 and architecture.position_embedding_type == "learned":
            raise ValueError(f"The interpolation factor is {factor}, and this model's learned positions have none.")
        scaling = {"type": "linear", "factor": factor} if factor > 1 else None
        architecture = replace(architecture, alibi_scaling=scaling)
    if (architecture.alibi_scaling or {}).get("train_seq_len") is not None:
        raise NotSupported("The engine runs a fixed interpolation, and this one is dynamic.")
    if architecture.head_dim > _MAX_HEAD_DIM:
        raise NotSupported(f"The engine runs heads of at most {_MAX_HEAD_DIM}, and these have {architecture.head_dim}.")
    return architecture


def check_positions(architecture: Architecture, length: int) -> None:
    """Check that a model has positions for texts of a length in tokens.

    Raises:
        TooLong: Its positions are learned, and there are fewer.
    """
    if architecture.position_embedding_type == "learned" and length > architecture.n_positions:
        raise TooLong(
            f"{length:,} tokens are too many: the learned positions end at {architecture.n_positions:,}; shorten the "
            "prompt, or write less."
        )


def interpolation(architecture: Architecture) -> float:
    """What the slopes of ALiBi are divided by (arXiv 2310.13017); 1 without interpolation."""
    factor: float = (architecture.alibi_scaling or {"factor": 1.0})["factor"]
    return factor


def slopes(architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Slopes of ALiBi (arXiv 2108.12409), interpolation included, fp32 ``[n_head]``; zeros with learned positions.

    The same as :func:`btlm.model.alibi.alibi_slopes`, which needs torch.
    """
    if architecture.position_embedding_type == "learned":
        return np.zeros(architecture.n_head, np.float32)
    exponents = [
        first + step * np.arange(count, dtype=np.float32) for first, step, count in slope_exponents(architecture.n_head)
    ]
    return (np.exp2(-np.concatenate(exponents)) / np.float32(interpolation(architecture))).astype(np.float32)
