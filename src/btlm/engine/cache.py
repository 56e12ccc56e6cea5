"""Preallocated key-value cache, one slot per request."""

from collections.abc import Iterable
from itertools import takewhile

from btlm.kernels import Kernels
from btlm.kernels import cache_bytes as layer_bytes
from btlm.kernels.arrays import DTYPES
from btlm.model.architecture_btlm import Architecture

CACHE_DTYPES = ("auto", *DTYPES)
_CACHE_OF_WEIGHTS = {
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "bfloat16",
    "8bit": "int8",
    "4bit": "int8",
}


class KVCache:
    """The cache of all layers. Its memory is used as it fills.

    Args:
        kernels: The kernels that will use it.
        architecture: The network.
        dtype: ``"int4"`` or ``"int8"``, with one scale per token and head, ``"bfloat16"`` or ``"float32"``.
        num_slots: Number of slots.
        capacity: Tokens per slot.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """

    def __init__(self, kernels: Kernels, architecture: Architecture, dtype: str, num_slots: int, capacity: int) -> None:
        self.dtype = dtype
        self.num_slots = num_slots
        self.capacity = capacity
        self.layers = [
            kernels.cache(
                dtype, slots=num_slots, heads=architecture.n_head, length=capacity, head_dim=architecture.head_dim
            )
            for _ in range(architecture.n_layer)
        ]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of slot ``source`` to slot ``target``."""
        for layer in self.layers:
            layer.copy(source, target, tokens)


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


def cache_bytes(architecture: Architecture, dtype: str, num_slots: int, capacity: int) -> int:
    """Bytes of a full cache.

    Raises:
        ValueError: There is no such dtype, or a size is impossible.
    """
    sizes = {"slots": num_slots, "heads": architecture.n_head, "length": capacity, "head_dim": architecture.head_dim}
    return architecture.n_layer * layer_bytes(dtype, **sizes)


def common_prefix(a: Iterable[int], b: Iterable[int]) -> int:
    """Number of tokens at the beginning that two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
