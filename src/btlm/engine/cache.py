"""Keys and values of many texts in memory that is set aside once."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.shape import Shape
from btlm.kernels import Kernels

KINDS = {"int4": "int4", "int8": "int8", "bfloat16": "bf16", "float32": "f32"}
CACHE_DTYPES = ("auto", *KINDS)
_BLOCK = 64  # tokens that the kernels visit together
_BITS = {"int4": 4, "int8": 8, "bfloat16": 16, "float32": 32}
_ELEMENT: dict[str, tuple[npt.DTypeLike, npt.DTypeLike]] = {
    "int4": (np.uint8, np.uint8),
    "int8": (np.uint8, np.int8),
    "bf16": (np.uint16, np.uint16),
    "f32": (np.float32, np.float32),
}


class KVCache:
    """A static cache: the same room for each of some texts. Memory is used as it fills.

    Args:
        kernels: That will use it.
        shape: Of the network.
        dtype: ``"int4"`` or ``"int8"``, with a scale a token and head, ``"bfloat16"`` or ``"float32"``.
        num_slots: Texts.
        capacity: Tokens of a text; rounded up to a multiple of 64.
    """

    def __init__(self, kernels: Kernels, shape: Shape, dtype: str, num_slots: int, capacity: int) -> None:
        self.dtype = dtype
        self.capacity = capacity
        room = -(-capacity // _BLOCK) * _BLOCK
        kind, heads = KINDS[dtype], shape.n_head
        width = -(-shape.head_dim // 16) * 16
        keys, values = _ELEMENT[kind]
        self._arrays: list[list[npt.NDArray[Any]]] = []
        self.layers = []
        for _ in range(shape.n_layer):
            # Zeros are not touched by the allocation, so that a page takes memory when the first token comes to it.
            of_block = _BLOCK * width // (2 if kind == "int4" else 1)
            keys_here = np.zeros((num_slots, heads, room // _BLOCK, of_block), keys)
            values_here = np.zeros((num_slots, heads, room // _BLOCK, of_block), values)
            scales: list[npt.NDArray[np.uint16]] = []
            if kind in ("int4", "int8"):
                scales = [np.zeros((num_slots, heads, room // _BLOCK, _BLOCK), np.uint16) for _ in range(2)]
            self._arrays.append([keys_here, values_here, *scales])
            key_scales, value_scales = scales if scales else (None, None)
            sizes = (num_slots, heads, room, shape.head_dim)
            self.layers.append(kernels.Cache(kind, keys_here, values_here, key_scales, value_scales, *sizes))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first tokens of another one."""
        blocks = -(-tokens // _BLOCK)
        for arrays in self._arrays:
            for array in arrays:
                array[target, :, :blocks] = array[source, :, :blocks]


def cache_dtype_of(name: str, weights: str) -> str:
    """The dtype that a name of :data:`CACHE_DTYPES` means beside weights of a dtype.

    Raises:
        ValueError: There is no such dtype.
    """
    if name not in CACHE_DTYPES:
        raise ValueError(f"The cache dtype {name!r} is unknown; choose one of {', '.join(CACHE_DTYPES)}.")
    if name != "auto":
        return name
    return {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}.get(weights, "int8")


def cache_bytes(shape: Shape, dtype: str, num_slots: int, capacity: int) -> int:
    """Bytes of a full cache."""
    room = -(-capacity // _BLOCK) * _BLOCK
    width = -(-shape.head_dim // 16) * 16
    of_head = _BITS[dtype] * width // 8 + (2 if dtype in ("int4", "int8") else 0)
    return 2 * num_slots * shape.n_layer * shape.n_head * room * of_head


def common_prefix(a: Iterable[int], b: Iterable[int]) -> int:
    """Number of tokens that two texts begin with together."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
