"""Scales of groups of weights, found by search, and the nearest values that they give.

Letters: N outputs, K inputs, G groups of inputs, g inputs of a group.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from btlm.model.storage_btlm import BLOCK_ROWS

# What the largest weight of a group is a multiple of, at each scale that is tried. In four bits it may be clipped by up
# to 40%, and stand at the end of eight steps or, with a scale of the other sign, at that of seven. In eight bits the
# steps are small beside any weight that clipping would cost.
_CLIPPING = {4: torch.linspace(0.6, 1.05, 13).tolist(), 8: torch.linspace(0.9, 1.0, 6).tolist()}
_REFINEMENTS = 2
# A scale below this has no reciprocal in fp32 worth the name; such weights are zeros.
_SMALLEST = 1e-30
# Weights that a thread works on at a time: so few that torch leaves them to one thread, and they stay in its cache.
_CHUNK = 16384


def search_scales(
    weight_NK: Tensor, bits: int, group_size: int, importance_K: Tensor | None = None, *, search: bool = True
) -> Tensor:
    """For each group of inputs the scale whose nearest values have the least squared error.

    Args:
        weight_NK: fp32 ``[N, K]``, K a multiple of the group size.
        bits: 4 or 8.
        group_size: Inputs that share a scale.
        importance_K: fp32 ``[K]``, what the squared error of each input counts.
        search: Try many scales; else take the one that keeps the largest weight of a group.

    Returns:
        fp32 ``[N, G]``, values of bf16, 0 for groups of zeros.
    """
    low, high = levels(bits)
    factors = [1 / high]
    if search:
        factors += [clipping / high for clipping in _CLIPPING[bits]]
    if search and -low != high:
        factors += [clipping / low for clipping in _CLIPPING[bits]]
    root_importance = None if importance_K is None else importance_K.sqrt().view(-1, group_size)
    scale_NG = weight_NK.new_empty(len(weight_NK), weight_NK.shape[1] // group_size)
    rows = max(1, _CHUNK // weight_NK.shape[1])
    starts = range(0, len(weight_NK), rows)

    def search_rows(start: int) -> None:
        part = weight_NK[start : start + rows].view(-1, scale_NG.shape[1], group_size)
        scale_NG[start : start + rows] = _search(part, root_importance, factors, bits, _REFINEMENTS if search else 0)

    workers = min(torch.get_num_threads(), len(starts))
    if workers == 1 or weight_NK.device.type != "cpu":
        for start in starts:
            search_rows(start)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(search_rows, starts))
    return scale_NG


def _search(
    weight: Tensor, root_importance: Tensor | None, factors: Sequence[float], bits: int, refinements: int
) -> Tensor:
    peak = weight.gather(-1, weight.abs().argmax(dim=-1, keepdim=True))
    best = torch.zeros_like(peak)
    least = torch.full_like(peak, math.inf)
    buffer = torch.empty_like(weight)

    def attempt(scale: Tensor) -> None:
        scale = usable_scale(scale)
        error = torch.mul(weight, reciprocal(scale), out=buffer)
        error = error.round_().clamp_(*levels(bits)).mul_(scale).sub_(weight)
        if root_importance is not None:
            error = error.mul_(root_importance)
        size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        better = size < least
        torch.where(better, scale, best, out=best)
        torch.where(better, size, least, out=least)

    for factor in factors:
        attempt(peak * factor)
    for _ in range(refinements):  # the scale of least squares, while the rounded values stay
        q = (weight * reciprocal(best)).round_().clamp_(*levels(bits))
        importance = 1 if root_importance is None else root_importance.square()
        squares = (q.square() * importance).sum(dim=-1, keepdim=True)
        attempt((q * weight * importance).sum(dim=-1, keepdim=True) / squares.clamp(min=_SMALLEST))
    return best[..., 0]


def round_weights(weight_NK: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """The nearest values that the scales give.

    Args:
        weight_NK: fp32 ``[N, K]``.
        scale_NG: fp32 ``[N, G]``, values of bf16.
        bits: 4 or 8.

    Returns:
        uint8 ``[N, K]``: ``q`` of the values ``(q - 2 ** (bits - 1)) scale``.
    """
    groups = weight_NK.reshape(*scale_NG.shape, -1) * reciprocal(scale_NG)[..., None]
    q = groups.round_().clamp_(*levels(bits)).add_(2 ** (bits - 1))
    return q.to(torch.uint8).view(weight_NK.shape)


def values_of(q_NK: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """What :func:`round_weights` stands for, fp32 ``[N, K]``."""
    groups_NGg = q_NK.view(*scale_NG.shape, -1).float() - 2 ** (bits - 1)
    values: Tensor = (groups_NGg * scale_NG[..., None]).view(q_NK.shape)
    return values


def usable_scale(scale: Tensor) -> Tensor:
    """The nearest scale that a file can hold, in fp32."""
    scale = scale.to(torch.bfloat16).float()
    return torch.where(scale.abs() < _SMALLEST, 0.0, scale)


def reciprocal(scale: Tensor) -> Tensor:
    """``1 / scale``, and 0 for 0: all weights of the group become zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def padded(weight_NK: Tensor, outputs: int, inputs: int) -> Tensor:
    """With zeros at the end of both dimensions."""
    padding = (0, inputs - weight_NK.shape[1], 0, outputs - weight_NK.shape[0])
    assert outputs % BLOCK_ROWS == 0
    return torch.nn.functional.pad(weight_NK, padding)


def levels(bits: int) -> tuple[int, int]:
    """Least and greatest ``q - 2 ** (bits - 1)``; eight bits leave out -128, so that the range is symmetric."""
    return (-8, 7) if bits == 4 else (-127, 127)
