"""The kernels in torch: the reference for the native ones, and what runs where those were not built.

Shapes and roundings are those of :class:`btlm.kernels.Kernels`; torch adds in another order, so that the last bits of
sums differ from the native kernels.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from btlm.model.storage_btlm import dequantize, packed_shape, padded_size, scale_shape

from .arrays import DTYPES, PAGE_TOKENS, Floats, Halves, block_rows, num_pages

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
        """A matrix; arguments as :meth:`btlm.kernels.Kernels.matrix` gives them."""
        return _Matrix(*args)

    def cache(self, *args: Any) -> "_Cache":
        """A cache; arguments as :class:`btlm.kernels.Cache` gives them."""
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
            _tensor(out).copy_(matrix.dense[_tensor(ids)] * factor)

    def attend(
        self, qkv: Floats, cache: "_Cache", segments: npt.NDArray[np.int64], slopes: Floats, scale: float, out: Floats
    ) -> None:
        """See :meth:`btlm.kernels.Kernels.attend`."""
        qkv_T3HD = _tensor(qkv).view(len(qkv), 3, cache.heads, cache.head_dim)
        query_THD, key_THD, value_THD = qkv_T3HD.unbind(1)
        finite_TH1 = qkv_T3HD.isfinite().all(-1, keepdim=True).all(1)
        result_THD = _tensor(out).view(len(out), cache.heads, cache.head_dim)
        with self._own_threads():
            for row, slot, start, count in segments.tolist():
                tokens = slice(row, row + count)
                cache.append(slot, start, key_THD[tokens], value_THD[tokens])
                result = result_THD[tokens]
                _attend_segment(cache, slot, start, query_THD[tokens], _tensor(slopes), scale, result)
                result.masked_fill_(~finite_TH1[tokens], torch.nan)

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

    @cached_property
    def dense(self) -> Tensor:
        """The weights, fp32 ``[N, K]``; unpacked once, since that takes far longer than a product."""
        if self.dtype in _LARGEST:
            assert self.scale is not None
            bits = DTYPES[self.dtype]
            stored = self.weight.reshape(packed_shape(bits, self.rows, self.columns))
            scale = self.scale.reshape(scale_shape(self.group, self.rows, self.columns))
            return torch.from_numpy(dequantize(stored, scale, bits, self.group))
        plain = (_bf16(self.weight) if self.dtype == "bfloat16" else _tensor(self.weight)).float()
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
    table: npt.NDArray[np.int32]
    pages: int
    heads: int
    head_dim: int

    def append(self, slot: int, start: int, key_THD: Tensor, value_THD: Tensor) -> None:
        """Store the keys and values of consecutive tokens, each ``[T, H, D]``."""
        end = start + len(key_THD)
        blocks_HN = self._blocks(slot, start // PAGE_TOKENS, end)
        inside = slice(start % PAGE_TOKENS, start % PAGE_TOKENS + len(key_THD))
        for (stored, scale, zero, layout), new_THD in zip(self._arrays(), (key_THD, value_THD), strict=True):
            new_THW = F.pad(new_THD, (0, padded_size(self.head_dim, 16) - self.head_dim))
            if scale is not None:
                new_THW, scale_TH = _quantize_heads(new_THW, _LARGEST[self.dtype])
                scale_HT = scale[blocks_HN].flatten(1)
                scale_HT[:, inside] = scale_TH.T
                scale[blocks_HN] = scale_HT.view(*blocks_HN.shape, PAGE_TOKENS)
            numbers_HTW = self._decode(stored[blocks_HN], layout)
            numbers_HTW[:, inside] = (new_THW + zero).transpose(0, 1).to(stored.dtype)
            stored[blocks_HN] = self._encode(numbers_HTW, layout)

    def contents(self, slot: int, length: int) -> Iterator[Tensor]:
        """The first keys and the first values of a slot, each fp32 ``[H, length, D]``."""
        blocks_HN = self._blocks(slot, 0, length)
        for stored, scale, zero, layout in self._arrays():
            numbers_HLD = self._decode(stored[blocks_HN], layout)[:, :length, : self.head_dim].float() - zero
            if scale is not None:
                numbers_HLD *= scale[blocks_HN].flatten(1)[:, :length, None]
            yield numbers_HLD

    def _blocks(self, slot: int, first: int, end: int) -> Tensor:
        """Rows of the arrays with the blocks of a slot from page ``first`` to token ``end``, ``[H, N]``."""
        pages = self.table[slot, first : num_pages(end)]
        return torch.from_numpy(block_rows(pages, self.pages, self.heads))

    def _arrays(self) -> Iterator[tuple[Tensor, Tensor | None, int, "_Layout"]]:
        """Keys, then values: blocks ``[P * H, *]``, their scales ``[P * H, 64]``, the number that stands for 0, and the
        layout of a block."""
        packed = self.dtype in _LARGEST
        zeros = {"int4": (8, 8), "int8": (128, 0)}.get(self.dtype, (0, 0))
        layouts = (_Layout(False, 4), _Layout(True, 4)) if packed else (_Layout(True, 16), _Layout(True, 1))
        arrays, scales = (self.keys, self.values), (self.key_scales, self.value_scales)
        for array, scale, zero, layout in zip(arrays, scales, zeros, layouts, strict=True):
            stored = _bf16(array) if self.dtype == "bfloat16" else _tensor(array)
            yield stored, None if scale is None else _bf16(scale), zero, layout

    def _decode(self, stored: Tensor, layout: "_Layout") -> Tensor:
        """The numbers of stored blocks ``[H, T/64, *]``: ``[H, T, W]``."""
        by_tokens, inner = layout
        width = padded_size(self.head_dim, 16)
        pieces = stored.reshape(*stored.shape[:2], -1, width if by_tokens else 64, inner)
        halves = [pieces & 15, pieces >> 4] if self.dtype == "int4" else [pieces]
        order = (0, 1, 2, 3, 5, 4) if by_tokens else (0, 1, 4, 2, 3, 5)
        return torch.stack(halves, 3).permute(order).reshape(len(stored), -1, width)

    def _encode(self, numbers: Tensor, layout: "_Layout") -> Tensor:
        """The inverse of :meth:`_decode`."""
        by_tokens, inner = layout
        heads, tokens, width = numbers.shape
        halves = 2 if self.dtype == "int4" else 1
        if by_tokens:
            pieces = numbers.view(heads, tokens // 64, -1, halves, inner, width).transpose(4, 5)
        else:
            pieces = numbers.view(heads, tokens // 64, 64, -1, halves, inner).permute(0, 1, 3, 4, 2, 5)
        stored = pieces[:, :, :, 0] | pieces[:, :, :, 1] << 4 if halves == 2 else pieces[:, :, :, 0]
        return stored.reshape(heads, tokens // 64, -1)


class _Layout(NamedTuple):
    by_tokens: bool
    """A block is cut into pieces of tokens, ``[*, W, inner]``; else of dimensions, ``[*, 64, inner]``."""
    inner: int
    """Consecutive tokens or dimensions of a piece. In int4, a byte has those of two pieces."""


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
    return F.linear(inputs, matrix.dense, bias)


def _round_activations(x_TK: Tensor, group: int) -> Tensor:
    x = x_TK.view(len(x_TK), -1, group)
    most = x.abs().amax(-1, keepdim=True)
    used = most > _SMALLEST
    rounded = (x * torch.where(used, 127 / most, 0.0)).round()
    return (rounded * torch.where(used, most / 127, 0.0)).view_as(x_TK)


def _quantize_heads(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integers from ``-limit`` to ``limit``, in fp32, and bf16 scales without the last dimension.

    A head that is not finite is stored as zeros, so that it does not harm a later text in the same slot.
    """
    most = x.abs().amax(-1).nan_to_num(nan=0.0, posinf=0.0)
    bits = (most / limit).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)  # the next number above that bf16 has
    scale = torch.where(most > _SMALLEST, scale, 0.0)
    inverse = torch.where(most > _SMALLEST, 1 / scale, 0.0)
    return (x * inverse[..., None]).round().nan_to_num(nan=0.0), scale.to(torch.bfloat16)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings(action="ignore"):  # mapped files are read-only; the kernels only read them
        return torch.from_numpy(array)


def _bf16(array: npt.NDArray[Any]) -> Tensor:
    return _tensor(array.view(np.int16)).view(torch.bfloat16)
