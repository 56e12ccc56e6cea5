"""The networks that the engine runs, and the numbers that only the engine derives from them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from btlm.errors import NotSupported
from btlm.model.architecture_btlm import Architecture, slope_exponents

_MAX_HEAD_DIM = 256  # of the attention kernels


def supported(architecture: Architecture, factor: float | None = None) -> Architecture:
    """Check that the engine runs a network: SwiGLU and ALiBi, with no interpolation or a fixed one.

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
        scaling = {"type": "linear", "factor": factor} if factor > 1 else None
        architecture = replace(architecture, alibi_scaling=scaling)
    for key, runs in (("activation_function", "swiglu"), ("position_embedding_type", "alibi")):
        if (value := getattr(architecture, key)) != runs:
            raise NotSupported(f"The engine runs {key} {runs!r}, and this model has {value!r}.")
    if (architecture.alibi_scaling or {}).get("train_seq_len") is not None:
        raise NotSupported("The engine runs a fixed interpolation, and this one is dynamic.")
    if architecture.head_dim > _MAX_HEAD_DIM:
        raise NotSupported(f"The engine runs heads of at most {_MAX_HEAD_DIM}, and these have {architecture.head_dim}.")
    return architecture


def interpolation(architecture: Architecture) -> float:
    """What the slopes of ALiBi are divided by (arXiv 2310.13017); 1 without interpolation."""
    factor: float = (architecture.alibi_scaling or {"factor": 1.0})["factor"]
    return factor


def slopes(architecture: Architecture) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Slopes of ALiBi (arXiv 2108.12409), interpolation included, fp32 ``[n_head]``.

    The same as :func:`btlm.model.alibi.alibi_slopes`, which needs torch.
    """
    exponents = [
        first + step * np.arange(count, dtype=np.float32) for first, step, count in slope_exponents(architecture.n_head)
    ]
    return (np.exp2(-np.concatenate(exponents)) / np.float32(interpolation(architecture))).astype(np.float32)
