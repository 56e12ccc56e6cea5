"""The kernels in torch: the reference that the native ones are tested against, and what runs where those were not
built.

Signatures, shapes and roundings are those of :class:`btlm.kernels.Kernels`; sums are torch's, in another order.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from btlm.model.quantization_btlm import dequantize

from .protocol import Floats, Halves

_PACKED = ("q4", "q8")
_CACHE_BITS = {"int4": 4, "int8": 8, "bf16": 16, "f32": 32}
_PACKED_CACHES = {"int4": 7, "int8": 127}
"""The largest number of each."""
_SMALLEST = 1e-30  # what is smaller is stored as 0: its reciprocal would overflow
_QUERIES = 256  # attended to at once: bounds the scores


@dataclass
class Matrix:
    """See :meth:`btlm.kernels.Kernels.Matrix`."""

    kind: str
    weight: npt.NDArray[Any]
    scale: Halves | None
    bias: Floats | None
    rows: int
    columns: int
    group: int = 0
    input_major: bool = False

    def __post_init__(self) -> None:
        packed = self.kind in _PACKED
        _require(packed or self.kind in ("bf16", "f32"), f"the kind of matrix {self.kind} is not q4, q8, bf16 or f32")
        sizes = [self.rows, self.columns]
        _require(min(sizes) > 0, f"a matrix of {sizes} is empty")
        count = self.rows * self.columns
        size = count * {"q4": 1, "q8": 2, "bf16": 4, "f32": 8}[self.kind] // 2
        _require(
            self.weight.nbytes == size,
            f"the weight holds {self.weight.nbytes} bytes, and {sizes} in {self.kind} takes {size}",
        )
        if packed:
            fits = self.group > 0 and self.group % 16 == 0 and self.columns % self.group == 0
            _require(fits, f"a group of {self.group} does not divide {self.columns} columns")
            _require(self.rows % 16 == 0, f"{self.rows} rows are no multiple of 16")
            scales = count // self.group
            _require(self.scale is not None and self.scale.size == scales, "the scales do not fit the matrix")
            _require(not self.input_major, "packed matrices have one layout")
        _require(self.bias is None or self.bias.size == self.rows, "the bias does not fit the matrix")

    def dense(self) -> Tensor:
        """The weights, fp32 ``[N, K]``."""
        weight = _tensor(self.weight)
        if self.kind in _PACKED:
            assert self.scale is not None
            bits = 4 if self.kind == "q4" else 8
            columns = self.columns // (8 if bits == 4 else 4)
            stored = weight.view(self.rows // 16, columns, 64)
            scale = _bf16(self.scale).view(self.rows // 16, self.columns // self.group, 16)
            return dequantize(stored, scale, bits, self.group)
        plain = (_bf16(self.weight) if self.kind == "bf16" else weight).float()
        if self.input_major:
            return plain.view(self.columns, self.rows).T
        return plain.view(self.rows, self.columns)


@dataclass
class Cache:
    """See :meth:`btlm.kernels.Kernels.Cache`."""

    kind: str
    keys: npt.NDArray[Any]
    values: npt.NDArray[Any]
    key_scales: Halves | None
    value_scales: Halves | None
    slots: int
    heads: int
    capacity: int
    head_dim: int

    def __post_init__(self) -> None:
        self.width = -(-self.head_dim // 16) * 16
        _require(self.kind in _CACHE_BITS, f"the kind of cache {self.kind} is not int4, int8, bf16 or f32")
        _require(
            min(self.slots, self.heads, self.capacity) > 0 and self.capacity % 64 == 0,
            "a cache needs slots, heads, and a capacity that is a multiple of 64",
        )
        _require(0 < self.head_dim <= 256, f"heads of {self.head_dim} exceed 256")
        tokens = self.slots * self.heads * self.capacity
        size = tokens * self.width * _CACHE_BITS[self.kind] // 8
        _require(
            self.keys.nbytes == size and self.values.nbytes == size, f"keys and values must take {size} bytes each"
        )
        scales = [self.key_scales, self.value_scales] if self.kind in _PACKED_CACHES else []
        _require(
            all(each is not None and each.size == tokens for each in scales),
            f"a cache of {self.kind} needs {tokens} scales each of keys and values",
        )

    def append(self, slot: int, start: int, key_THD: Tensor, value_THD: Tensor) -> None:
        """Store the keys and values of consecutive tokens."""
        positions = torch.arange(start, start + len(key_THD))
        slots, heads, capacity, width = self.slots, self.heads, self.capacity, self.width
        key_THW, value_THW = (F.pad(x, (0, width - self.head_dim)) for x in (key_THD, value_THD))
        keys, values = _tensor(self.keys), _tensor(self.values)
        if self.kind in _PACKED_CACHES:
            assert self.key_scales is not None
            assert self.value_scales is not None
            key_THW, key_scale = _quantize_heads(key_THW, _PACKED_CACHES[self.kind])
            value_THW, value_scale = _quantize_heads(value_THW, _PACKED_CACHES[self.kind])
            for scales, new in ((self.key_scales, key_scale), (self.value_scales, value_scale)):
                _bf16(scales).view(slots, heads, capacity)[slot, :, start : start + len(new)] = new.T
            if self.kind == "int4":
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
        if self.kind == "bf16":
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
        if self.kind in _PACKED_CACHES:
            assert self.key_scales is not None
            assert self.value_scales is not None
            if self.kind == "int4":
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
            if self.kind == "bf16":
                keys, values = _bf16(self.keys), _bf16(self.values)
            key_HLW = keys.view(slots, heads, capacity // 16, width, 16)[slot].transpose(2, 3)
            key = key_HLW.reshape(heads, capacity, width)[:, :length].float()
            value = values.view(slots, heads, capacity, width)[slot, :, :length].float()
        return key[..., : self.head_dim], value[..., : self.head_dim]


def linear(x: Floats, matrix: Matrix, out: Floats, gate: Matrix | None = None, add: bool = False) -> None:
    """See :meth:`btlm.kernels.Kernels.linear`."""
    if x.shape[1] != matrix.columns or out.shape != (len(x), matrix.rows):
        raise ValueError(
            f"x is {list(x.shape)} and out {list(out.shape)}; a matrix of {[matrix.rows, matrix.columns]} needs "
            f"{[len(x), matrix.columns]} and {[len(x), matrix.rows]}."
        )
    if gate is not None:
        same = [(m.kind, m.rows, m.columns, m.group, m.input_major) for m in (matrix, gate)]
        _require(same[0] == same[1], "the gate is not of the matrix's kind and shape")
    inputs = _tensor(x)
    if matrix.kind in _PACKED:
        inputs = _round_activations(inputs, matrix.group)
    product = _product(inputs, matrix)
    if gate is not None:
        product = product * F.silu(_product(inputs, gate))
    result = _tensor(out)
    result.copy_(result + product if add else product)


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float, out: Floats) -> None:
    """See :meth:`btlm.kernels.Kernels.layer_norm`."""
    columns = x.shape[1]
    _require(len(weight) == len(bias) == columns, f"weight and bias must be [{columns}]")
    _require_shape(out, x.shape, "out")
    _tensor(out).copy_(F.layer_norm(_tensor(x), (x.shape[1],), _tensor(weight), _tensor(bias), eps))


def embed(ids: npt.NDArray[np.int64], matrix: Matrix, factor: float, out: Floats) -> None:
    """See :meth:`btlm.kernels.Kernels.embed`."""
    for token in ids:
        if not 0 <= token < matrix.rows:
            raise ValueError(f"token {token} is not in a table of {matrix.rows}")
    _require_shape(out, (len(ids), matrix.columns), "out")
    _tensor(out).copy_(matrix.dense()[_tensor(ids)] * factor)


def attend(
    qkv: Floats, cache: Cache, segments: npt.NDArray[np.int64], slopes: Floats, scale: float, out: Floats
) -> None:
    """See :meth:`btlm.kernels.Kernels.attend`."""
    heads, head_dim = cache.heads, cache.head_dim
    _require_shape(qkv, (len(qkv), 3 * heads * head_dim), "qkv")
    _require_shape(out, (len(qkv), heads * head_dim), "out")
    _require(len(slopes) == heads, "there must be a slope a head")
    query_THD, key_THD, value_THD = _tensor(qkv).view(len(qkv), 3, heads, head_dim).unbind(1)
    result_THD = _tensor(out).view(len(out), heads, head_dim)
    for row, slot, start, count in segments.tolist():
        _require(count > 0 and row >= 0 and row + count <= len(qkv), "a segment exceeds the batch")
        if not (0 <= slot < cache.slots and start >= 0 and start + count <= cache.capacity):
            raise ValueError(
                f"a segment of {count} tokens from {start} in slot {slot} exceeds a cache of {cache.slots} slots of "
                f"{cache.capacity} tokens"
            )
        cache.append(slot, start, key_THD[row : row + count], value_THD[row : row + count])
        key_HKD, value_HKD = cache.contents(slot, start + count)
        for first in range(0, count, _QUERIES):
            queries = slice(row + first, row + min(first + _QUERIES, count))
            query_QHD = query_THD[queries]
            if cache.kind in _PACKED_CACHES:
                query_QHD, query_scale = _quantize_heads(query_QHD, 127)
                query_QHD = query_QHD * query_scale.float()[..., None]
            scores_HQK = torch.einsum("qhd,hkd->hqk", query_QHD * scale, key_HKD)
            positions_Q = torch.arange(start + first, start + first + len(query_QHD))
            distance_QK = torch.arange(start + count) - positions_Q[:, None]
            scores_HQK = scores_HQK + _tensor(slopes)[:, None, None] * distance_QK
            probabilities = scores_HQK.masked_fill(distance_QK > 0, -torch.inf).softmax(-1)
            result_THD[queries] = torch.einsum("hqk,hkd->qhd", probabilities, value_HKD)


def sum_bytes(values: npt.NDArray[np.uint8]) -> int:
    """See :meth:`btlm.kernels.Kernels.sum_bytes`."""
    return int(_tensor(values).sum(dtype=torch.int64))


def set_threads(threads: int) -> None:
    """See :meth:`btlm.kernels.Kernels.set_threads`."""
    if not 1 <= threads <= 1024:
        raise ValueError(f"{threads} threads are not between 1 and 1,024")
    torch.set_num_threads(threads)


def threads() -> int:
    """See :meth:`btlm.kernels.Kernels.threads`."""
    return torch.get_num_threads()


def paths() -> list[str]:
    """See :meth:`btlm.kernels.Kernels.paths`."""
    return ["torch"]


def path() -> str:
    """See :meth:`btlm.kernels.Kernels.path`."""
    return "torch"


def use_path(name: str) -> None:
    """See :meth:`btlm.kernels.Kernels.use_path`."""
    if name != "torch":
        raise ValueError(f"this machine has no instruction path {name}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _require_shape(array: npt.NDArray[Any], shape: tuple[int, ...], name: str) -> None:
    _require(array.shape == shape, f"{name} is {list(array.shape)}, and must be {list(shape)}")


def _product(inputs: Tensor, matrix: Matrix) -> Tensor:
    bias = None if matrix.bias is None else _tensor(matrix.bias)
    return F.linear(inputs, matrix.dense(), bias)


def _round_activations(x_TK: Tensor, group: int) -> Tensor:
    x = x_TK.view(len(x_TK), -1, group)
    most = x.abs().amax(-1, keepdim=True)
    used = most > _SMALLEST
    rounded = (x * torch.where(used, 127 / most, 0.0)).round()
    return (rounded * torch.where(used, most / 127, 0.0)).view_as(x_TK)


def _quantize_heads(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most the limit in fp32, and bf16 scales without the last dimension."""
    most = x.abs().amax(-1)
    bits = (most / limit).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)  # the next number above that bf16 has
    scale = torch.where(most > _SMALLEST, scale, 0.0)
    inverse = torch.where(most > _SMALLEST, 1 / scale, 0.0)
    return (x * inverse[..., None]).round(), scale.to(torch.bfloat16)


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # of mapped files, which are read alone
        return torch.from_numpy(array)


def _bf16(array: npt.NDArray[Any]) -> Tensor:
    return _tensor(array.view(np.int16)).view(torch.bfloat16)
