"""ALiBi (arXiv 2108.12409) and its linear position interpolation (arXiv 2310.13017).

Letters: B batch, H heads, Q queries, K keys, F folded features.
"""

from typing import Any

import torch
from torch import Tensor

from .architecture_btlm import slope_exponents

# Products with it must dominate every score and stay finite in fp16: 2**15 * 2**15 * scale.
_MASK = float(2**15)


def alibi_slopes(n_head: int, device: torch.device | str | None = None) -> Tensor:
    """Slopes of ALiBi, one per head: see :func:`.architecture_btlm.slope_exponents`.

    Returns:
        fp32 tensor ``[n_head]``.
    """
    exponents = [
        first + step * torch.arange(count, dtype=torch.float32, device=device)
        for first, step, count in slope_exponents(n_head)
    ]
    return torch.exp2(-torch.cat(exponents))


def train_seq_len(alibi_scaling: dict[str, Any] | None) -> int | None:
    """Training length of dynamic interpolation; ``None`` where it is off or fixed."""
    length: int | None = (alibi_scaling or {}).get("train_seq_len")
    return length


def interpolated_slopes(slopes_H: Tensor, alibi_scaling: dict[str, Any] | None, key_lengths_B: Tensor) -> Tensor:
    """Slopes divided by the interpolation factor.

    The factor is 1 without ``alibi_scaling``, ``factor`` where it is fixed, and ``max(1, key_length / train_seq_len)``
    where it is dynamic.

    Args:
        slopes_H: Slopes of the heads, fp32.
        alibi_scaling: A valid value of the configuration key.
        key_lengths_B: Number of keys that each sequence attends to, without padding, ``[B]`` or ``[1]``.

    Returns:
        fp32 tensor ``[B, H]`` or ``[1, H]``.
    """
    if alibi_scaling is None:
        return slopes_H[None]
    trained = train_seq_len(alibi_scaling)
    if trained is None:
        return slopes_H[None] / float(alibi_scaling["factor"])
    factor_B = (key_lengths_B.to(torch.float32) / trained).clamp(min=1.0)
    slopes_BH: Tensor = slopes_H[None] / factor_B[:, None]
    return slopes_BH


def attention_bias(
    slopes_BH: Tensor | None, query_positions_Q: Tensor, num_keys: int, key_mask_BK: Tensor | None
) -> Tensor:
    """The explicit bias ``-slope * |i - j|`` with causality and padding, for one query or for eager attention.

    Args:
        slopes_BH: Slopes, fp32 ``[B or 1, H]``; ``None`` without ALiBi.
        query_positions_Q: Slots of the queries among the keys.
        num_keys: Number of keys, in slots ``0 .. num_keys - 1``.
        key_mask_BK: False where a key is padding.

    Returns:
        fp32 tensor broadcastable to ``[B, H, Q, K]``, to be added to the scaled scores.
    """
    key_positions_K = torch.arange(num_keys, device=query_positions_Q.device)
    distance_QK = query_positions_Q[:, None] - key_positions_K
    bias = torch.zeros((), dtype=torch.float32, device=distance_QK.device).expand(1, 1, *distance_QK.shape)
    if slopes_BH is not None:
        bias = -slopes_BH[:, :, None, None] * distance_QK.abs()
    # Later keys get a lower value than padding, so that a row that sees only padding does not attend to them.
    lowest = torch.finfo(torch.float32).min
    if key_mask_BK is not None:
        bias = bias.masked_fill(~key_mask_BK[:, None, None, :], lowest / 2)
    return bias.masked_fill(distance_QK < 0, lowest)


def fold_attention_bias(
    slopes_BH: Tensor | None,
    query_positions_Q: Tensor,
    num_keys: int,
    key_mask_BK: Tensor | None,
    *,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """ALiBi and key padding as extra dimensions of queries and keys, so that plain attention computes both.

    ``-slope * (i - j)`` is a dot product of ``(slope, -slope * i)`` with ``(j, 1)``, and a padded key gets one feature
    that drives its score below every other. Any kernel for causal attention then computes ALiBi, memory is linear in
    the context, and the features need no cache: they are made from the current slopes.

    Exactness: positions are split in base-256 digits and slopes in a leading part of 8 significant bits and a rest, so
    every product is exact in fp32 even from bf16. The features stand *before* the head's own dimensions, and the row
    term is part of them although softmax cancels it: the sum over the leading parts is then exact and small when the
    head's own products are added. Behind the head's dimensions, or without the row term, fp32 scores at 8,192 tokens
    lose 10 bits (docs/DECISIONS.md).

    Args:
        slopes_BH: Slopes, fp32 ``[B or 1, H]``; ``None`` without ALiBi.
        query_positions_Q: Slots of the queries among the keys.
        num_keys: Number of keys, at most 2**24.
        key_mask_BK: False where a key is padding.
        scale: Factor by which the attention kernel multiplies scores.
        dtype: Dtype of queries and keys.

    Returns:
        Query features ``[B or 1, H or 1, Q, F]`` and key features ``[B or 1, 1, K, F]`` in ``dtype``; F is 8 up to
        65,536 keys and 10 beyond.
    """
    device = query_positions_Q.device
    num_digits = 2 if num_keys <= 2**16 else 3
    positions_K = torch.arange(num_keys, device=device)
    ones_K = torch.ones_like(positions_K)
    # The largest fp16 number is 65,504: keys carry at most 255 * 256, queries the rest of the power of 256.
    digits = [(positions_K >> (8 * n) & 255) * (256 if n else 1) for n in range(num_digits)]
    masked_BK = torch.zeros_like(positions_K)[None] if key_mask_BK is None else (~key_mask_BK).to(positions_K.dtype)
    key_columns = [*digits, 256 * ones_K, 256 * ones_K, 256 * ones_K, *digits]
    key_features = torch.stack([column.expand(masked_BK.shape) for column in key_columns] + [-_MASK * masked_BK], -1)

    slopes_BHQ = torch.zeros((1, 1, 1), device=device) if slopes_BH is None else (slopes_BH / scale)[..., None]
    high = slopes_BHQ.to(torch.bfloat16).to(torch.float32)
    low = (slopes_BHQ - high).to(dtype).to(torch.float32)
    positions_Q = query_positions_Q.to(torch.float32) / 256
    row = -high * positions_Q
    row_1 = row.to(dtype).to(torch.float32)
    row_rest = (row - row_1) - low * positions_Q
    row_2 = row_rest.to(dtype).to(torch.float32)
    weights = [256.0 ** max(n - 1, 0) for n in range(num_digits)]
    query_columns = [
        *(high * weight for weight in weights),
        *(row_1, row_2, row_rest - row_2),
        *(low * weight for weight in weights),
        torch.full_like(high, _MASK),
    ]
    query_features = torch.stack([column.expand(row.shape) for column in query_columns], -1)
    return query_features.to(dtype), key_features.to(dtype)[:, None]
