"""The kernels in torch: the reference for the native ones, and what runs where those were not built.

Shapes and roundings are those of :class:`btlm.kernels.Kernels`; torch adds in another order, so that the last bits of
sums differ from the native kernels.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from btlm.model.storage_btlm import dequantize, packed_shape, scale_shape

from .arrays import DTYPES, Floats, Halves

_LARGEST = {"int4": 7, "int8": 127}  # the largest number that is stored in a packed cache, per dtype
_SMALLEST = 1e-30  # smaller values are stored as 0: their reciprocal would overflow
_QUERIES = 256  # attended to at once: bounds the memory of the scores


class TorchKernels:
    """The implementation; see :class:`btlm.kernels.Kernels` for its operations.

    Args:
        threads: Number of threads; torch's own number is another one outside the operations.
    """

    name = "torch"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def matrix(self, *args: Any) -> "_Matrix":
        """A matrix; arguments as :class:`~btlm.kernels.implementation.Implementation` gives them."""
        return _Matrix(*args)

    def cache(self, *args: Any) -> "_Cache":
        """A cache; arguments as :class:`~btlm.kernels.implementation.Implementation` gives them."""
        return _Cache(*args)

    def linear(self, x: Floats, matrix: "_Matrix", out: Floats, gate: "_Matrix | None", add: bool) -> None:
        """See :meth:`btlm.kernels.Kernels.linear`."""
        with self._own_threads():
            inputs = _tensor(x)
            if matrix.group:
                inputs = _round_activations(inputs, matrix.group)
            product = _product(inputs, matrix)
            if gate is not None:
                product = product * F.silu(_product(inputs, gate))
            result = _tensor(out)
            result.copy_(result + product if add else product)

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
        """See :meth:`btlm.kernels.Kernels.layer_norm`."""
        with self._own_threads():
            _tensor(out).copy_(F.layer_norm(_tensor(x), (x.shape[1],), _tensor(weight), _tensor(bias), eps))

    def embed(self, ids: npt.NDArray[np.int64], matrix: "_Matrix", factor: float, out: Floats) -> None:
        """See :meth:`btlm.kernels.Kernels.embed`."""
        with self._own_threads():
            _tensor(out).copy_(matrix.dense()[_tensor(ids)] * factor)

    def attend(
        self, qkv: Floats, cache: "_Cache", segments: npt.NDArray[np.int64], slopes: Floats, scale: float, out: Floats
    ) -> None:
        """See :meth:`btlm.kernels.Kernels.attend`."""
        query_THD, key_THD, value_THD = _tensor(qkv).view(len(qkv), 3, cache.heads, cache.head_dim).unbind(1)
        result_THD = _tensor(out).view(len(out), cache.heads, cache.head_dim)
        with self._own_threads():
            for row, slot, start, count in segments.tolist():
                tokens = slice(row, row + count)
                cache.append(slot, start, key_THD[tokens], value_THD[tokens])
                _attend_segment(cache, slot, start, query_THD[tokens], _tensor(slopes), scale, result_THD[tokens])

    def sum_bytes(self, values: npt.NDArray[np.uint8]) -> int:
        """See :meth:`btlm.kernels.Kernels.sum_bytes`."""
        with self._own_threads():
            return int(_tensor(values).sum(dtype=torch.int64))

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        """Torch's number of threads belongs to the process: set it for one operation, then put it back."""
        before = torch.get_num_threads()
        if before == self.threads:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass
class _Matrix:
    dtype: str
    weight: npt.NDArray[Any]
    scale: Halves | None
    bias: Floats | None
    rows: int
    columns: int
    group: int
    input_major: bool

    def dense(self) -> Tensor:
        """The weights, fp32 ``[N, K]``."""
        weight = _tensor(self.weight)
        if self.dtype in _LARGEST:
            assert self.scale is not None
            bits = DTYPES[self.dtype]
            stored = self.weight.reshape(packed_shape(bits, self.rows, self.columns))
            scale = self.scale.reshape(scale_shape(self.group, self.rows, self.columns))
            return torch.from_numpy(dequantize(stored, scale, bits, self.group))
        plain = (_bf16(self.weight) if self.dtype == "bfloat16" else weight).float()
        if self.input_major:
            return plain.view(self.columns, self.rows).T
        return plain.view(self.rows, self.columns)


@dataclass
class _Cache:
    dtype: str
    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    key_scales: Halves | None
    value_scales: Halves | None
    slots: int
    heads: int
    capacity: int
    head_dim: int

    @property
    def width(self) -> int:
        """W: the head dimension rounded up to a multiple of 16."""
        return -(-self.head_dim // 16) * 16

    def append(self, slot: int, start: int, key_THD: Tensor, value_THD: Tensor) -> None:
        """Store the keys and values of consecutive tokens, each ``[T, H, D]``."""
        positions = torch.arange(start, start + len(key_THD))
        slots, heads, capacity, width = self.slots, self.heads, self.capacity, self.width
        key_THW, value_THW = (F.pad(x, (0, width - self.head_dim)) for x in (key_THD, value_THD))
        keys, values = _tensor(self.keys), _tensor(self.values)
        if self.dtype in _LARGEST:
            assert self.key_scales is not None
            assert self.value_scales is not None
            key_THW, key_scale = _quantize_heads(key_THW, _LARGEST[self.dtype])
            value_THW, value_scale = _quantize_heads(value_THW, _LARGEST[self.dtype])
            for scales, new in ((self.key_scales, key_scale), (self.value_scales, value_scale)):
                _bf16(scales).view(slots, heads, capacity)[slot, :, start : start + len(new)] = new.T
            if self.dtype == "int4":
                key_THW8, value_THW8 = ((x + 8).to(torch.uint8) for x in (key_THW, value_THW))
                stored_keys = keys.view(slots, heads, capacity // 64, width // 8, 64, 4)[slot]
                low, high = key_THW8.view(len(positions), heads, width // 8, 2, 4).unbind(3)
                stored_keys[:, positions // 64, :, positions % 64] = low | high << 4
                stored_values = values.view(slots, heads, capacity // 8, width, 4)[slot]
                for token, position in enumerate(positions.tolist()):  # two tokens share a byte
                    byte = stored_values[:, position // 8, :, position % 4]
                    new = value_THW8[token]
                    byte.copy_(byte & 15 | new << 4 if position % 8 >= 4 else byte & 240 | new)
                return
            stored_keys = keys.view(slots, heads, capacity // 64, width // 4, 64, 4)[slot]
            stored_keys[:, positions // 64, :, positions % 64] = (
                (key_THW + 128).to(torch.uint8).view(len(positions), heads, width // 4, 4)
            )
            stored_values = values.view(slots, heads, capacity // 4, width, 4)[slot]
            stored_values[:, positions // 4, :, positions % 4] = value_THW.to(torch.int8)
            return
        if self.dtype == "bfloat16":
            keys, values = _bf16(self.keys), _bf16(self.values)
        stored_keys = keys.view(slots, heads, capacity // 16, width, 16)[slot]
        stored_keys[:, positions // 16, :, positions % 16] = key_THW.to(keys.dtype)
        values.view(slots, heads, capacity, width)[slot, :, start : start + len(positions)] = value_THW.transpose(
            0, 1
        ).to(values.dtype)

    def contents(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """The first keys and values of a slot, fp32 ``[H, length, D]``."""
        slots, heads, capacity, width = self.slots, self.heads, self.capacity, self.width
        keys, values = _tensor(self.keys), _tensor(self.values)
        if self.dtype in _LARGEST:
            assert self.key_scales is not None
            assert self.value_scales is not None
            if self.dtype == "int4":
                packed = keys.view(slots, heads, capacity // 64, width // 8, 64, 4)[slot]
                key_HLW = torch.stack([packed & 15, packed >> 4], 3).permute(0, 1, 4, 2, 3, 5)
                packed = values.view(slots, heads, capacity // 8, width, 4)[slot]
                value_HLW = torch.stack([packed & 15, packed >> 4], 2).transpose(3, 4)
                zeros = (8, 8)
            else:
                key_HLW = keys.view(slots, heads, capacity // 64, width // 4, 64, 4)[slot].transpose(2, 3)
                value_HLW = values.view(slots, heads, capacity // 4, width, 4)[slot].transpose(2, 3)
                zeros = (128, 0)
            key = key_HLW.reshape(heads, capacity, width)[:, :length].float() - zeros[0]
            value = value_HLW.reshape(heads, capacity, width)[:, :length].float() - zeros[1]
            key = key * _bf16(self.key_scales).view(slots, heads, capacity)[slot, :, :length, None]
            value = value * _bf16(self.value_scales).view(slots, heads, capacity)[slot, :, :length, None]
        else:
            if self.dtype == "bfloat16":
                keys, values = _bf16(self.keys), _bf16(self.values)
            key_HLW = keys.view(slots, heads, capacity // 16, width, 16)[slot].transpose(2, 3)
            key = key_HLW.reshape(heads, capacity, width)[:, :length].float()
            value = values.view(slots, heads, capacity, width)[slot, :, :length].float()
        return key[..., : self.head_dim], value[..., : self.head_dim]


def _attend_segment(
    cache: _Cache, slot: int, start: int, query_THD: Tensor, slopes: Tensor, scale: float, result_THD: Tensor
) -> None:
    count = len(query_THD)
    key_HKD, value_HKD = cache.contents(slot, start + count)
    for first in range(0, count, _QUERIES):
        queries = slice(first, min(first + _QUERIES, count))
        query_QHD = query_THD[queries]
        if cache.dtype in _LARGEST:
            query_QHD, query_scale = _quantize_heads(query_QHD, 127)
            query_QHD = query_QHD * query_scale.float()[..., None]
        scores_HQK = torch.einsum("qhd,hkd->hqk", query_QHD * scale, key_HKD)
        positions_Q = torch.arange(start + first, start + first + len(query_QHD))
        distance_QK = torch.arange(start + count) - positions_Q[:, None]
        scores_HQK = scores_HQK + slopes[:, None, None] * distance_QK
        probabilities = scores_HQK.masked_fill(distance_QK > 0, -torch.inf).softmax(-1)
        result_THD[queries] = torch.einsum("hqk,hkd->qhd", probabilities, value_HKD)


def _product(inputs: Tensor, matrix: _Matrix) -> Tensor:
    bias = None if matrix.bias is None else _tensor(matrix.bias)
    return F.linear(inputs, matrix.dense(), bias)


def _round_activations(x_TK: Tensor, group: int) -> Tensor:
    x = x_TK.view(len(x_TK), -1, group)
    most = x.abs().amax(-1, keepdim=True)
    used = most > _SMALLEST
    rounded = (x * torch.where(used, 127 / most, 0.0)).round()
    return (rounded * torch.where(used, most / 127, 0.0)).view_as(x_TK)


def _quantize_heads(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integers from ``-limit`` to ``limit``, in fp32, and bf16 scales without the last dimension."""
    most = x.abs().amax(-1)
    bits = (most / limit).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)  # the next number above that bf16 has
    scale = torch.where(most > _SMALLEST, scale, 0.0)
    inverse = torch.where(most > _SMALLEST, 1 / scale, 0.0)
    return (x * inverse[..., None]).round(), scale.to(torch.bfloat16)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # mapped files are read-only; the kernels only read them
        return torch.from_numpy(array)


def _bf16(array: npt.NDArray[Any]) -> Tensor:
    return _tensor(array.view(np.int16)).view(torch.bfloat16)
