"""The cache of keys and values of one layer: its layout, which only the kernels know.

Letters: S slots, H heads, L length of a slot in tokens, rounded up to a multiple of 64, W head dimension, rounded up to
a multiple of 16.
"""

from typing import TYPE_CHECKING

import numpy as np

from btlm.model.storage_btlm import padded_size

from .arrays import ELEMENT, PACKED, Array, require, require_dtype

if TYPE_CHECKING:
    from .reference import TorchKernels

MAX_HEAD_DIM = 256
_BLOCK_TOKENS = 64


class Cache:
    """Keys and values of one layer; made by :meth:`btlm.kernels.Kernels.cache`.

    Only the kernels know the layout of its arrays.

    Args:
        implementation: Implementation that will use it.
        dtype, slots, heads, length, head_dim: See :meth:`btlm.kernels.Kernels.cache`.
    """

    # int8: keys uint8 [S, H, L/64, W/4, 64, 4], stored as q + 128; values int8 [S, H, L/4, W, 4]. int4: keys uint8
    # [S, H, L/64, W/8, 64, 4], stored as q + 8, the first four of eight dimensions in the low nibbles; values uint8
    # [S, H, L/8, W, 4], stored as q + 8, the first four of eight tokens in the low nibbles. Both have bf16 scales
    # [S, H, L], one per token and head. Else: keys [S, H, L/16, W, 16], values [S, H, L, W].
    #
    # In every layout 64 tokens of a head lie together, so that the arrays here are [S, H, L/64, elements].

    def __init__(
        self, implementation: "TorchKernels", dtype: str, slots: int, heads: int, length: int, head_dim: int
    ) -> None:
        blocks, elements = _cache_blocks(dtype, slots, heads, length, head_dim)
        self.dtype = dtype
        self.slots = slots
        self.heads = heads
        self.length = length
        self.head_dim = head_dim
        # np.zeros does not touch the memory: a page is used when the first token is written to it.
        self.keys: Array = np.zeros((slots, heads, blocks, elements), ELEMENT[dtype])
        self.values: Array = np.zeros(self.keys.shape, np.int8 if dtype == "int8" else ELEMENT[dtype])
        self.key_scales, self.value_scales = (
            np.zeros((slots, heads, blocks, _BLOCK_TOKENS), np.uint16) if dtype in PACKED else None for _ in range(2)
        )
        self.owner = type(implementation)
        arrays = self.keys, self.values, self.key_scales, self.value_scales
        self.handle = implementation.cache(dtype, *arrays, slots, heads, blocks * _BLOCK_TOKENS, head_dim)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of slot ``source`` to slot ``target``."""
        require(
            0 <= source < self.slots and 0 <= target < self.slots and 0 <= tokens <= self.length,
            f"{tokens} tokens cannot be copied from slot {source} to slot {target} of a cache of {self.slots} slots of "
            f"{self.length} tokens",
        )
        blocks = padded_size(tokens, _BLOCK_TOKENS) // _BLOCK_TOKENS
        for array in (self.keys, self.values, self.key_scales, self.value_scales):
            if array is not None:
                array[target, :, :blocks] = array[source, :, :blocks]


def cache_bytes(dtype: str, *, slots: int, heads: int, length: int, head_dim: int) -> int:
    """Bytes of a :class:`Cache`, which holds one layer.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """
    blocks, elements = _cache_blocks(dtype, slots, heads, length, head_dim)
    scales = 2 * _BLOCK_TOKENS if dtype in PACKED else 0
    return 2 * slots * heads * blocks * (elements * ELEMENT[dtype].itemsize + scales)


def _cache_blocks(dtype: str, slots: int, heads: int, length: int, head_dim: int) -> tuple[int, int]:
    """Number of blocks of 64 tokens in a slot, and elements of the keys of a block and head."""
    require_dtype(dtype)
    require(
        min(slots, heads, length) > 0,
        f"a cache of {slots} slots, {heads} heads and {length} tokens is empty; each must be at least 1",
    )
    require(0 < head_dim <= MAX_HEAD_DIM, f"heads of {head_dim} dimensions are not between 1 and {MAX_HEAD_DIM}")
    elements = _BLOCK_TOKENS * padded_size(head_dim, 16) // (2 if dtype == "int4" else 1)
    return padded_size(length, _BLOCK_TOKENS) // _BLOCK_TOKENS, elements
