"""The key-value cache: pages of 64 tokens, which requests share where their texts begin alike."""

from collections.abc import Iterable, Sequence

import numpy as np

from btlm.kernels import Cache, Kernels, PageTable, num_pages, page_bytes
from btlm.kernels.arrays import DTYPES, PAGE_TOKENS
from btlm.model.architecture_btlm import Architecture

CACHE_DTYPES = ("auto", *DTYPES)
_CACHE_OF_WEIGHTS = {
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "bfloat16",
    "8bit": "int8",
    "4bit": "int8",
}


class Layers:
    """Keys and values of the layers of a network.

    Args:
        layers: One cache per layer.
    """

    def __init__(self, layers: list[Cache]) -> None:
        self.layers = layers


class KVCache(Layers):
    """The cache of all layers, in pages of 64 tokens. Its memory is used as it fills.

    A slot holds the text of one request. Texts that begin alike share the pages of their beginning. Who holds a page is
    counted: slots, and callers that keep the pages of a text without a slot.

    Args:
        kernels: The kernels that will use it.
        architecture: The network.
        dtype: ``"int4"`` or ``"int8"``, with one scale per token and head, ``"bfloat16"`` or ``"float32"``.
        num_slots: Number of slots.
        capacity: Tokens per slot at most.
        tokens: Tokens of all texts together, rounded up to whole pages; all that the slots can hold if it is ``None``.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """

    def __init__(
        self,
        kernels: Kernels,
        architecture: Architecture,
        dtype: str,
        num_slots: int,
        capacity: int,
        tokens: int | None = None,
    ) -> None:
        pages = num_slots * num_pages(capacity) if tokens is None else num_pages(tokens)
        self.dtype = dtype
        self.num_slots = num_slots
        self.capacity = capacity
        self.num_pages = pages
        self._table = PageTable(num_slots, capacity, pages)
        self._holders = np.zeros(pages, np.int64)
        self._free = set(range(pages))
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]
        self._networks: list[Layers] = [self]
        super().__init__(self._make(kernels, architecture, dtype))

    def beside(self, kernels: Kernels, architecture: Architecture, dtype: str) -> Layers:
        """The layers of another network that reads the same texts: they have the same pages, shared in the same way."""
        other = Layers(self._make(kernels, architecture, dtype))
        self._networks.append(other)
        return other

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all texts together."""
        return self.num_pages * PAGE_TOKENS

    @property
    def free_pages(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """Number of slots and callers that hold a page."""
        return int(self._holders[page])

    def pages(self, slot: int) -> list[int]:
        """The pages of a slot, in the order of its tokens."""
        return self._pages[slot]

    def begin(self, slot: int, tokens: int, source: Sequence[int] = (), kept: int = 0, *, move: bool = False) -> None:
        """Give an empty slot pages for a number of tokens, the first of which are in the pages of another text.

        Whole pages of these are shared. The slot will append to the last one, so it gets a copy if that is filled in
        part, unless the caller gives it up.

        Args:
            slot: A slot without pages.
            tokens: Number of tokens that it needs places for, more than ``kept``.
            source: Pages of the other text, held by somebody during the call.
            kept: Number of tokens at the beginning of both texts.
            move: The page that is filled in part goes to the slot, and nobody else appends to it or reads it.
        """
        shared = list(source[: num_pages(kept) if move else kept // PAGE_TOKENS])
        new = self._take(num_pages(tokens) - len(shared))
        self._assign(slot, [*shared, *new])
        self.hold(self._pages[slot])
        if kept > len(shared) * PAGE_TOKENS:
            self._copy(source[len(shared)], new[0])

    def follow(self, slot: int, source: Sequence[int], kept: int) -> None:
        """Let a slot have the first tokens of another text in place of what it has there.

        Args:
            slot: A slot with pages for more than ``kept`` tokens.
            source: Pages of the other text.
            kept: Number of tokens at the beginning of both texts.
        """
        whole = kept // PAGE_TOKENS
        own = self._pages[slot]
        self.hold(source[:whole])
        self._assign(slot, [*source[:whole], *own[whole:]])
        self.drop(own[:whole])
        if kept % PAGE_TOKENS:
            self._copy(source[whole], own[whole])

    def end(self, slot: int, kept: int) -> list[int]:
        """Empty a slot; returns the pages of its first tokens, which the caller holds from now on."""
        pages = self._pages[slot]
        self._assign(slot, [])
        self.drop(pages[num_pages(kept) :])
        return pages[: num_pages(kept)]

    def hold(self, pages: Sequence[int]) -> None:
        """Keep pages from being given to others until they are dropped as often."""
        self._holders[list(pages)] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """The reverse of :meth:`hold`."""
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.add(page)

    def _take(self, number: int) -> list[int]:
        """Free pages: consecutive ones if possible, since a text is read faster where it lies side by side.

        Those with the lowest numbers are taken, whose memory has most likely been used before.
        """
        free = sorted(self._free)
        starts = (i for i in range(len(free) - number + 1) if free[i + number - 1] - free[i] == number - 1)
        start = next(starts, 0) if number else 0
        pages = free[start : start + number]
        self._free.difference_update(pages)
        return pages

    def _assign(self, slot: int, pages: list[int]) -> None:
        self._pages[slot] = pages
        self._table.assign(slot, pages)

    def _copy(self, source: int, target: int) -> None:
        for network in self._networks:
            for layer in network.layers:
                layer.copy(source, target)

    def _make(self, kernels: Kernels, architecture: Architecture, dtype: str) -> list[Cache]:
        heads, head_dim = architecture.n_head, architecture.head_dim
        return [kernels.cache(dtype, self._table, heads=heads, head_dim=head_dim) for _ in range(architecture.n_layer)]


def cache_dtype_of(name: str, weights: str) -> str:
    """The dtype of the cache that one of :data:`CACHE_DTYPES` means.

    Args:
        name: ``"auto"`` depends on the weights: int8 beside quantized ones, else their dtype (float32 for float16).
        weights: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"8bit"`` or ``"4bit"``.

    Raises:
        ValueError: There is no such dtype.
    """
    if name not in CACHE_DTYPES:
        raise ValueError(f"The cache dtype {name!r} is unknown; choose one of {', '.join(CACHE_DTYPES)}.")
    if weights not in _CACHE_OF_WEIGHTS:
        raise ValueError(f"The weight dtype {weights!r} is unknown; it is one of {', '.join(_CACHE_OF_WEIGHTS)}.")
    return _CACHE_OF_WEIGHTS[weights] if name == "auto" else name


def cache_bytes(architecture: Architecture, dtype: str, tokens: int) -> int:
    """Bytes of a full cache for a number of tokens, in whole pages.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """
    page = page_bytes(dtype, heads=architecture.n_head, head_dim=architecture.head_dim)
    return architecture.n_layer * num_pages(tokens) * page


def common_prefix(a: Iterable[int], b: Iterable[int]) -> int:
    """Number of tokens at the beginning that two sequences share."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
