"""Arrays for the kernels, and what they mean in fp64 numpy: a third opinion beside the native kernels and torch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.kernels import Kernels, LayerCache, WeightMatrix

Array = npt.NDArray[Any]
PACKED = ("q4", "q8")


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Nearest, ties to even."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: Array) -> npt.NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


class Weights:
    """The arrays of a random matrix."""

    def __init__(
        self,
        rng: np.random.Generator,
        kind: str,
        rows: int,
        columns: int,
        *,
        group: int = 0,
        input_major: bool = False,
        bias: bool = True,
    ) -> None:
        self.kind, self.rows, self.columns, self.group = kind, rows, columns, group
        self.input_major = input_major
        self.scale = None
        self.bias = rng.standard_normal(rows, dtype=np.float32) if bias else None
        if kind in PACKED:
            self.weight: Array = rng.integers(0, 256, (rows // 16, columns // (8 if kind == "q4" else 4), 64), np.uint8)
            self.scale = to_bf16(rng.standard_normal((rows // 16, columns // group, 16)) * 0.02)
            self.scale[0, 0, :3] = 0  # a group of zeros
        else:
            weight = rng.standard_normal((columns, rows) if input_major else (rows, columns), dtype=np.float32)
            self.weight = to_bf16(weight) if kind == "bf16" else weight

    def matrix(self, kernels: Kernels) -> WeightMatrix:
        sizes = (self.rows, self.columns, self.group, self.input_major)
        return kernels.Matrix(self.kind, self.weight, self.scale, self.bias, *sizes)

    def dense(self) -> npt.NDArray[np.float64]:
        """``[rows, columns]``, by the description of the storage, value by value."""
        if self.kind not in PACKED:
            plain = from_bf16(self.weight) if self.kind == "bf16" else self.weight
            return (plain.T if self.input_major else plain).astype(np.float64)
        assert self.scale is not None
        dense = np.empty((self.rows, self.columns))
        for n in range(self.rows):
            for k in range(self.columns):
                if self.kind == "q4":
                    byte = int(self.weight[n // 16, k // 8, 4 * (n % 16) + k % 4])
                    value = (byte & 15 if k % 8 < 4 else byte >> 4) - 8
                else:
                    value = int(self.weight[n // 16, k // 4, 4 * (n % 16) + k % 4]) - 128
                dense[n, k] = value * float(from_bf16(self.scale[n // 16, k // self.group, n % 16 : n % 16 + 1])[0])
        return dense


def rounded(x: Array, group: int) -> npt.NDArray[np.float64]:
    """Inputs of a packed matrix as it sees them: eight bits, a scale a token and group."""
    groups = x.reshape(len(x), -1, group)
    most = np.abs(groups).max(-1, keepdims=True)
    q = np.rint(groups * (np.float32(127) / most))
    values: npt.NDArray[np.float64] = (q.astype(np.float64) * (most.astype(np.float64) / 127)).reshape(x.shape)
    return values


def silu(x: Array) -> Array:
    opened: Array = x / (1 + np.exp(-x))
    return opened


class CacheArrays:
    """The arrays of an empty cache."""

    def __init__(self, kind: str, *, slots: int, heads: int, capacity: int, head_dim: int) -> None:
        self.kind, self.sizes = kind, (slots, heads, capacity, head_dim)
        room = slots * heads * capacity * (-(-head_dim // 16) * 16) // (2 if kind == "int4" else 1)
        packed = kind in ("int4", "int8")
        self.keys: Array = np.zeros(room, np.uint8 if packed else {"bf16": np.uint16, "f32": np.float32}[kind])
        self.values: Array = np.zeros(room, np.int8 if kind == "int8" else self.keys.dtype)
        scales = slots * heads * capacity
        self.key_scales = np.zeros(scales, np.uint16) if packed else None
        self.value_scales = np.zeros(scales, np.uint16) if packed else None

    def cache(self, kernels: Kernels) -> LayerCache:
        return kernels.Cache(self.kind, self.keys, self.values, self.key_scales, self.value_scales, *self.sizes)

    def same_as(self, other: "CacheArrays") -> bool:
        pairs = [(self.keys, other.keys), (self.values, other.values)]
        if self.key_scales is not None and other.key_scales is not None:
            assert self.value_scales is not None
            assert other.value_scales is not None
            pairs += [(self.key_scales, other.key_scales), (self.value_scales, other.value_scales)]
        return all(np.array_equal(a, b) for a, b in pairs)


def attention(qkv: Array, heads: int, slopes: Array, scale: float) -> Array:
    """Causal attention with ALiBi of one text, in fp64: ``[T, 3 * H * D]`` to ``[T, H * D]``."""
    query, key, value = qkv.astype(np.float64).reshape(len(qkv), 3, heads, -1).transpose(1, 2, 0, 3)
    position = np.arange(len(qkv))
    distance = position[None, :] - position[:, None]
    scores = query @ key.transpose(0, 2, 1) * scale + slopes.astype(np.float64)[:, None, None] * distance
    scores = np.where(distance > 0, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    return np.ascontiguousarray(mixed.transpose(1, 0, 2)).reshape(len(qkv), -1)


def furthest(a: Array, b: Array) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
