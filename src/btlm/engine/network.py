"""The forward pass on the kernels: token ids of several requests at once to logits.

Letters: T tokens of all requests, P parts (consecutive tokens of one request), V vocabulary, R rows whose logits are
wanted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.shape import Shape
from btlm.checkpoint.tensor_file import MappedTensor
from btlm.errors import NotSupported
from btlm.kernels import Kernels, WeightMatrix
from btlm.model.architecture_btlm import (
    ATTENTION_OUTPUT,
    DOWN,
    FINAL_NORM,
    GATE,
    QUERY_KEY_VALUE,
    TOKEN_TABLE,
    UP,
    block_name,
)
from btlm.model.storage_btlm import BLOCK_ROWS, packed_shape, padded_size, scale_shape

from .cache import KVCache

Floats = npt.NDArray[np.float32]

MAX_TOKENS = 256  # per forward pass
LOGIT_ROWS = 64  # rows of logits for which memory is counted
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names, and those used here


@dataclass(frozen=True)
class _Norm:
    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class _Block:
    ln_1: _Norm
    query_key_value: WeightMatrix
    attention_output: WeightMatrix
    ln_2: _Norm
    up: WeightMatrix
    gate: WeightMatrix
    down: WeightMatrix


class Network:
    """BTLM on the kernels, with its weights in mapped files.

    Args:
        kernels: Kernels to compute with.
        shape: Shape of the network.
        tensors: Tensors by their names in the checkpoint.
        max_tokens: Tokens per forward pass at most; memory for their activations is allocated here.

    Raises:
        NotSupported: The engine cannot read the dtype of a tensor.
        ValueError: A tensor is missing or does not fit the shape.
    """

    def __init__(
        self, kernels: Kernels, shape: Shape, tensors: Mapping[str, MappedTensor], *, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.kernels = kernels
        self.shape = shape
        self.max_tokens = max_tokens
        load = _Loader(kernels, shape, tensors)
        self._blocks = [load.block(i) for i in range(shape.n_layer)]
        self._ln_f = load.norm(FINAL_NORM)
        self._table = load.table(TOKEN_TABLE)
        self._head = self._table if shape.tied else load.table("lm_head")
        self.weight_dtype = weight_dtype(shape, tensors)
        self._slopes = shape.slopes
        sizes = {"x": shape.n_embd, "normal": shape.n_embd, "attended": shape.n_embd, "qkv": 3 * shape.n_embd}
        sizes["inner"] = self._blocks[0].up.rows
        self._activations = {name: np.zeros((max_tokens, size), np.float32) for name, size in sizes.items()}

    def forward(
        self,
        ids: npt.NDArray[np.int64],
        segments: npt.NDArray[np.int64],
        cache: KVCache,
        rows: npt.NDArray[np.int64],
    ) -> Floats:
        """Append tokens to the cache and predict what follows some of them.

        Args:
            ids: ``[T]``, at most ``max_tokens``.
            segments: ``[P, 4]``: per part the row of its first token in ``ids``, the slot in the cache, the position
                of that token, and the number of tokens.
            cache: The cache; its slots hold the tokens before them.
            rows: ``[R]``, rows of ``ids`` whose logits are wanted.

        Returns:
            Logits, muP's multiplier included, ``[R, V]``.
        """
        kernels, shape = self.kernels, self.shape
        x, normal, attended, qkv, inner = (array[: len(ids)] for array in self._activations.values())
        kernels.embed(ids, self._table, shape.embeddings_scale, x)
        for i, (block, layer) in enumerate(zip(self._blocks, cache.layers, strict=True)):
            scale = shape.attention_scale / (i + 1 if shape.inverse_layer_idx else 1)
            kernels.layer_norm(x, block.ln_1.weight, block.ln_1.bias, shape.layer_norm_epsilon, normal)
            kernels.linear(normal, block.query_key_value, qkv)
            kernels.attend(qkv, layer, segments, self._slopes, scale, attended)
            kernels.linear(attended, block.attention_output, x, add=True)
            kernels.layer_norm(x, block.ln_2.weight, block.ln_2.bias, shape.layer_norm_epsilon, normal)
            kernels.linear(normal, block.up, inner, gate=block.gate)
            kernels.linear(inner, block.down, x, add=True)
        wanted = np.ascontiguousarray(x[rows])
        kernels.layer_norm(wanted, self._ln_f.weight, self._ln_f.bias, shape.layer_norm_epsilon, wanted)
        wanted *= np.float32(shape.logits_scale)
        logits = np.empty((len(rows), self._head.rows), np.float32)
        if len(rows):
            kernels.linear(wanted, self._head, logits)
        return logits[:, : shape.vocab_size]


def activation_bytes(shape: Shape, max_tokens: int = MAX_TOKENS) -> int:
    """Bytes of a forward pass: activations, in fp32 and as the kernels round them, and logits."""
    widths = 6 * shape.n_embd + 5 * shape.n_inner // 4
    return 4 * (max_tokens * widths + LOGIT_ROWS * shape.vocab_size)


def weight_dtype(shape: Shape, tensors: Mapping[str, MappedTensor]) -> str:
    """Dtype of the weights: ``"4bit"`` or ``"8bit"`` if they are quantized, else that of the token table.

    Returns:
        ``"4bit"``, ``"8bit"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``.

    Raises:
        NotSupported: The engine cannot read the dtype of the table.
        ValueError: The table is missing.
    """
    if shape.bits is not None:
        return f"{shape.bits}bit"
    name = f"{TOKEN_TABLE}.weight"
    tensor = _find(tensors, name)
    if tensor.dtype not in _FLOATS:
        raise _unreadable(name, tensor)
    return _FLOATS[tensor.dtype]


class _Loader:
    """Makes the network's parameters from the tensors of a checkpoint."""

    def __init__(self, kernels: Kernels, shape: Shape, tensors: Mapping[str, MappedTensor]) -> None:
        self.kernels = kernels
        self.shape = shape
        self.tensors = tensors

    def block(self, index: int) -> _Block:
        width, inner = self.shape.n_embd, self.shape.n_inner
        if self.shape.bits is not None:
            inner = padded_size(inner, self.shape.group_size)
        name = block_name(index)
        return _Block(
            self.norm(f"{name}.ln_1"),
            self._projection(f"{name}.{QUERY_KEY_VALUE}", 3 * width, width),
            self._projection(f"{name}.{ATTENTION_OUTPUT}", width, width),
            self.norm(f"{name}.ln_2"),
            self._projection(f"{name}.{UP}", inner, width),
            self._projection(f"{name}.{GATE}", inner, width),
            self._projection(f"{name}.{DOWN}", width, inner),
        )

    def norm(self, name: str) -> _Norm:
        size = self.shape.n_embd
        return _Norm(self._vector(f"{name}.weight", size), self._vector(f"{name}.bias", size))

    def table(self, name: str) -> WeightMatrix:
        rows, columns = self.shape.vocab_size, self.shape.n_embd
        if self.shape.bits is not None:
            return self._packed(name, self.shape.table_bits, padded_size(rows, BLOCK_ROWS), columns, None)
        return self._plain(name, rows, columns, None, input_major=False)

    def _projection(self, name: str, rows: int, columns: int) -> WeightMatrix:
        bias = self._vector(f"{name}.bias", rows)
        if self.shape.bits is not None:
            return self._packed(name, self.shape.bits, rows, columns, bias)
        return self._plain(name, rows, columns, bias, input_major=True)

    def _packed(self, name: str, bits: int, rows: int, columns: int, bias: Floats | None) -> WeightMatrix:
        weight = self._tensor(f"{name}.weight", ("U8",), packed_shape(bits, rows, columns))
        scale = self._tensor(f"{name}.weight_scale", ("BF16",), scale_shape(self.shape.group_size, rows, columns))
        return self.kernels.matrix(f"int{bits}", weight, scale, bias)

    def _plain(self, name: str, rows: int, columns: int, bias: Floats | None, *, input_major: bool) -> WeightMatrix:
        shape = (columns, rows) if input_major else (rows, columns)
        weight = self._tensor(f"{name}.weight", tuple(_FLOATS), shape)
        dtype = "bfloat16" if weight.dtype == np.uint16 else "float32"
        return self.kernels.matrix(dtype, weight, bias=bias, input_major=input_major)

    def _vector(self, name: str, size: int) -> Floats:
        vector = self._tensor(name, tuple(_FLOATS), (size,))
        if vector.dtype == np.uint16:
            return (vector.astype(np.uint32) << 16).view(np.float32)
        return vector

    def _tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        tensor = _find(self.tensors, name)
        if tensor.dtype not in ("U8", *_FLOATS):
            raise _unreadable(name, tensor)
        if tensor.values.shape != shape or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.values.shape)} where config.json makes it {dtypes[0]} "
                f"{list(shape)}."
            )
        return tensor.values.astype(np.float32) if tensor.dtype == "F16" else tensor.values


def _find(tensors: Mapping[str, MappedTensor], name: str) -> MappedTensor:
    tensor = tensors.get(name) or tensors.get(name.removeprefix("transformer."))
    if tensor is None:
        raise ValueError(f"The weights lack {name}; the checkpoint does not fit its config.json.")
    return tensor


def _unreadable(name: str, tensor: MappedTensor) -> NotSupported:
    return NotSupported(f"{name} is stored as {tensor.dtype}, which the engine does not read.")
