"""Arrays for the kernels, and results in numpy and fp64, independent of the native kernels and of torch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.kernels import Cache, Kernels, WeightMatrix

Array = npt.NDArray[Any]
PACKED = ("int4", "int8")


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """Round to the nearest bf16 number, ties to even; returns its bits."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: Array) -> npt.NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


class Weights:
    """The arrays of a random matrix."""

    def __init__(
        self,
        rng: np.random.Generator,
        dtype: str,
        rows: int,
        columns: int,
        *,
        group: int = 0,
        input_major: bool = False,
        bias: bool = True,
    ) -> None:
        self.dtype, self.rows, self.columns, self.group = dtype, rows, columns, group
        self.input_major = input_major
        self.scale = None
        self.bias = rng.standard_normal(rows, dtype=np.float32) if bias else None
        if dtype in PACKED:
            self.weight: Array = rng.integers(
                0, 256, (rows // 16, columns // (8 if dtype == "int4" else 4), 64), np.uint8
            )
            self.scale = to_bf16(rng.standard_normal((rows // 16, columns // group, 16)) * 0.02)
            self.scale[0, 0, :3] = 0  # a group of zeros
        else:
            weight = rng.standard_normal((columns, rows) if input_major else (rows, columns), dtype=np.float32)
            self.weight = to_bf16(weight) if dtype == "bfloat16" else weight

    def matrix(self, kernels: Kernels) -> WeightMatrix:
        return kernels.matrix(self.dtype, self.weight, self.scale, self.bias, input_major=self.input_major)

    def dense(self) -> npt.NDArray[np.float64]:
        """The matrix ``[rows, columns]``, decoded value by value from the description of the storage."""
        if self.dtype not in PACKED:
            plain = from_bf16(self.weight) if self.dtype == "bfloat16" else self.weight
            return (plain.T if self.input_major else plain).astype(np.float64)
        assert self.scale is not None
        dense = np.empty((self.rows, self.columns))
        for n in range(self.rows):
            for k in range(self.columns):
                if self.dtype == "int4":
                    byte = int(self.weight[n // 16, k // 8, 4 * (n % 16) + k % 4])
                    value = (byte & 15 if k % 8 < 4 else byte >> 4) - 8
                else:
                    value = int(self.weight[n // 16, k // 4, 4 * (n % 16) + k % 4]) - 128
                dense[n, k] = value * float(from_bf16(self.scale[n // 16, k // self.group, n % 16 : n % 16 + 1])[0])
        return dense


def rounded(x: Array, group: int) -> npt.NDArray[np.float64]:
    """Inputs rounded as for a packed matrix: to eight bits, with one scale per token and group."""
    groups = x.reshape(len(x), -1, group)
    most = np.abs(groups).max(-1, keepdims=True)
    q = np.rint(groups * (np.float32(127) / most))
    values: npt.NDArray[np.float64] = (q.astype(np.float64) * (most.astype(np.float64) / 127)).reshape(x.shape)
    return values


def silu(x: Array) -> Array:
    opened: Array = x / (1 + np.exp(-x))
    return opened


def same_contents(a: Cache, b: Cache) -> bool:
    """Whether two caches hold the same bytes."""
    names = ("keys", "values", "key_scales", "value_scales")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in pairs)


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
