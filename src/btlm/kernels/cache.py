"""The cache of keys and values of one layer: its layout, which only the kernels know.

Letters: P pages of 64 tokens, H heads, W head dimension, rounded up to a multiple of 16.

A page holds blocks, the 64 tokens of each head. Blocks are stored by runs of 16 pages, ``[P/16, H, 16]``, so that a
head's tokens in consecutive pages are read like one array; the last run has the remaining pages.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from btlm.model.storage_btlm import padded_size

from .arrays import ELEMENT, PACKED, PAGE_TOKENS, Array, block_rows, num_pages, require, require_dtype, untouched_zeros

if TYPE_CHECKING:
    from .reference import TorchKernels

MAX_HEAD_DIM = 256


class PageTable:
    """The pages of each slot: where the layers of a network keep its tokens.

    Slots can share pages, and then only one of them may append to a page.

    Args:
        slots: Number of sequences.
        length: Tokens per slot.
        pages: Number of pages of 64 tokens, for all slots. Without it every slot has pages of its own.

    Raises:
        ValueError: A size is impossible.
    """

    def __init__(self, slots: int, length: int, pages: int | None = None) -> None:
        per_slot = num_pages(length)
        self.slots = slots
        self.length = length
        self.pages = slots * per_slot if pages is None else pages
        require(
            min(slots, length, self.pages) > 0,
            f"a cache of {slots} slots of {length} tokens in {self.pages} pages is empty; each must be at least 1",
        )
        self.entries: npt.NDArray[np.int32] = np.full((slots, per_slot), -1, np.int32)
        if pages is None:
            self.entries[:] = np.arange(self.pages).reshape(slots, per_slot)

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot these pages, in the order of its tokens, instead of those that it had.

        Raises:
            ValueError: There is no such slot or page, or the slot cannot have so many.
        """
        require(
            0 <= slot < self.slots
            and len(pages) <= self.entries.shape[1]
            and all(0 <= page < self.pages for page in pages),
            f"slot {slot} cannot have the pages {list(pages)}, in a cache of {self.slots} slots of "
            f"{self.entries.shape[1]} pages and {self.pages} pages in all",
        )
        self.entries[slot] = -1
        self.entries[slot, : len(pages)] = pages


class Cache:
    """Keys and values of one layer; made by :meth:`btlm.kernels.Kernels.cache`.

    Only the kernels know the layout of its arrays.

    Args:
        implementation: Implementation that will use it.
        dtype, table, heads, head_dim: See :meth:`btlm.kernels.Kernels.cache`.
    """

    # The arrays have one row per block. int8: keys uint8 [W/4, 64, 4], stored as q + 128; values int8 [64/4, W, 4].
    # int4: keys uint8 [W/8, 64, 4], stored as q + 8, the first four of eight dimensions in the low nibbles; values
    # uint8 [64/8, W, 4], stored as q + 8, the first four of eight tokens in the low nibbles. Both have bf16 scales
    # [64], one per token and head. Else: keys [64/16, W, 16], values [64, W].

    def __init__(self, implementation: "TorchKernels", dtype: str, table: PageTable, heads: int, head_dim: int) -> None:
        elements = _page_elements(dtype, heads, head_dim)
        self.dtype = dtype
        self.table = table
        self.heads = heads
        self.head_dim = head_dim
        # Memory that is not touched: a page is used when the first token is written to it.
        self.keys: Array = untouched_zeros((table.pages * heads, elements), ELEMENT[dtype])
        self.values: Array = untouched_zeros(self.keys.shape, np.dtype(np.int8) if dtype == "int8" else ELEMENT[dtype])
        self.key_scales, self.value_scales = (
            np.zeros((table.pages * heads, PAGE_TOKENS), np.uint16) if dtype in PACKED else None for _ in range(2)
        )
        self.owner = type(implementation)
        arrays = self.keys, self.values, self.key_scales, self.value_scales
        self.handle = implementation.cache(dtype, *arrays, table.entries, table.pages, heads, head_dim)

    def copy(self, source: int, target: int) -> None:
        """Copy page ``source`` to page ``target``.

        Raises:
            ValueError: There is no such page.
        """
        require(
            0 <= source < self.table.pages and 0 <= target < self.table.pages,
            f"page {source} cannot be copied to page {target} of a cache of {self.table.pages} pages",
        )
        read, written = block_rows(np.array([[source], [target]]), self.table.pages, self.heads)
        for array in (self.keys, self.values, self.key_scales, self.value_scales):
            if array is not None:
                array[written] = array[read]


def page_bytes(dtype: str, *, heads: int, head_dim: int) -> int:
    """Bytes of a page of a :class:`Cache`, which holds one layer.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """
    elements = _page_elements(dtype, heads, head_dim)
    scales = 2 * PAGE_TOKENS if dtype in PACKED else 0
    return 2 * heads * (elements * ELEMENT[dtype].itemsize + scales)


def _page_elements(dtype: str, heads: int, head_dim: int) -> int:
    """Elements of the keys of a page and head."""
    require_dtype(dtype)
    require(heads > 0, f"{heads} heads are not possible; there must be at least 1")
    require(0 < head_dim <= MAX_HEAD_DIM, f"heads of {head_dim} dimensions are not between 1 and {MAX_HEAD_DIM}")
    return PAGE_TOKENS * padded_size(head_dim, 16) // (2 if dtype == "int4" else 1)
