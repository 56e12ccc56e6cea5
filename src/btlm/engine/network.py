"""The forward pass on the kernels: token ids of several requests at once to logits.

Letters: T tokens of all requests, P parts (consecutive tokens of one request), V vocabulary, R rows whose logits are
wanted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.tensor_file import MappedTensor
from btlm.errors import LogitsNotFinite, NotSupported
from btlm.kernels import Kernels, WeightMatrix
from btlm.model.architecture_btlm import (
    ATTENTION_OUTPUT,
    DOWN,
    FINAL_NORM,
    GATE,
    HEAD,
    POSITION_TABLE,
    QUERY_KEY_VALUE,
    TOKEN_TABLE,
    UP,
    Architecture,
    block_name,
)
from btlm.model.storage_btlm import stored_matrices

from .activation import activate
from .cache import Layers
from .supported import check_positions, slopes

Floats = npt.NDArray[np.float32]

MAX_TOKENS = 256  # per forward pass
LOGIT_ROWS = 64  # rows of logits for which memory is counted
_PIECE = 2**22  # numbers that are looked at together
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
    gate: WeightMatrix | None
    """None without SwiGLU."""
    down: WeightMatrix


class Network:
    """BTLM on the kernels, with its weights in mapped files.

    Args:
        kernels: Kernels to compute with.
        architecture: The network, which the engine supports.
        tensors: Tensors by their names in the checkpoint.
        max_tokens: Tokens per forward pass at most; memory for their activations is allocated here.

    Raises:
        NotSupported: The engine cannot read the dtype of a tensor.
        ValueError: A tensor is missing or does not fit the architecture.
    """

    def __init__(
        self,
        kernels: Kernels,
        architecture: Architecture,
        tensors: Mapping[str, MappedTensor],
        *,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.kernels = kernels
        self.architecture = architecture
        self.max_tokens = max_tokens
        load = _Loader(kernels, architecture, tensors)
        self._tensors = tensors
        self._blocks = [load.block(i) for i in range(architecture.n_layer)]
        self._ln_f = load.norm(FINAL_NORM)
        self._table = load.matrix(TOKEN_TABLE)
        learned = architecture.position_embedding_type == "learned"
        self._positions = load.vector(f"{POSITION_TABLE}.weight") if learned else None
        self._head = self._table if architecture.tie_word_embeddings else load.matrix(HEAD)
        self.weight_dtype = weight_dtype(architecture, tensors)
        self._slopes = slopes(architecture)
        width, inner = architecture.n_embd, self._blocks[0].up.rows
        sizes = {"x": width, "normal": width, "attended": width, "qkv": 3 * width, "inner": inner}
        self._activations = {name: np.zeros((max_tokens, size), np.float32) for name, size in sizes.items()}

    def forward(
        self,
        ids: npt.NDArray[np.int64],
        segments: npt.NDArray[np.int64],
        cache: Layers,
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

        Raises:
            TooLong: There is no learned position for a token.
            LogitsNotFinite: Activations or logits of some parts are NaN or infinite; the others can be computed again.
        """
        kernels, architecture = self.kernels, self.architecture
        x, normal, attended, qkv, inner = (array[: len(ids)] for array in self._activations.values())
        kernels.embed(ids, self._table, architecture.mup_embeddings_scale, x)
        if self._positions is not None:
            for row, _, start, count in segments.tolist():
                check_positions(architecture, start + count)
                x[row : row + count] += self._positions[start : start + count]
        for i, (block, layer) in enumerate(zip(self._blocks, cache.layers, strict=True)):
            scale = architecture.attention_scale / (i + 1 if architecture.scale_attn_by_inverse_layer_idx else 1)
            kernels.layer_norm(x, block.ln_1.weight, block.ln_1.bias, architecture.layer_norm_epsilon, normal)
            kernels.linear(normal, block.query_key_value, qkv)
            kernels.attend(qkv, layer, segments, self._slopes, scale, attended)
            kernels.linear(attended, block.attention_output, x, add=True)
            kernels.layer_norm(x, block.ln_2.weight, block.ln_2.bias, architecture.layer_norm_epsilon, normal)
            kernels.linear(normal, block.up, inner, gate=block.gate)
            if block.gate is None:
                activate(architecture.activation_function, inner)
            kernels.linear(inner, block.down, x, add=True)
        wanted = np.ascontiguousarray(x[rows])
        kernels.layer_norm(wanted, self._ln_f.weight, self._ln_f.bias, architecture.layer_norm_epsilon, wanted)
        with np.errstate(over="ignore"):  # of a scale that fp32 does not hold; the logits tell of it
            wanted *= np.float32(architecture.logits_scale)
        logits = np.empty((len(rows), self._head.rows), np.float32)
        if len(rows):
            kernels.linear(wanted, self._head, logits)
        logits = logits[:, : architecture.vocab_size]
        # NaN in a sum stays there, so that the sums of the last block tell of every block.
        if not (np.isfinite(x).all() and np.isfinite(logits).all()):
            finite: Any = np.isfinite(x).all(axis=1)
            finite[rows] &= np.isfinite(logits).all(axis=1)
            parts = [i for i, (row, _, _, count) in enumerate(segments) if not finite[row : row + count].all()]
            raise LogitsNotFinite(self._why_not_finite, parts)
        return logits

    @cached_property
    def _why_not_finite(self) -> str:
        wrong = (name for name, tensor in self._tensors.items() if not _is_finite(tensor))
        return LogitsNotFinite.problem_of(next(wrong, None))


def activation_bytes(architecture: Architecture, max_tokens: int = MAX_TOKENS) -> int:
    """Bytes of a forward pass: activations, in fp32 and as the kernels round them, and logits."""
    widths = 6 * architecture.n_embd + 5 * architecture.inner_dim // 4
    return 4 * (max_tokens * widths + LOGIT_ROWS * architecture.vocab_size)


def weight_dtype(architecture: Architecture, tensors: Mapping[str, MappedTensor]) -> str:
    """Dtype of the weights: ``"4bit"`` or ``"8bit"`` if they are quantized, else that of the token table.

    Returns:
        ``"4bit"``, ``"8bit"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``.

    Raises:
        NotSupported: The engine cannot read the dtype of the table.
        ValueError: The table is missing.
    """
    if architecture.quantization is not None:
        return f"{architecture.quantization.bits}bit"
    name = f"{TOKEN_TABLE}.weight"
    tensor = _find(tensors, name)
    if tensor.dtype not in _FLOATS:
        raise _unreadable(name, tensor)
    return _FLOATS[tensor.dtype]


class _Loader:
    """Makes the network's parameters from the tensors of a checkpoint."""

    def __init__(self, kernels: Kernels, architecture: Architecture, tensors: Mapping[str, MappedTensor]) -> None:
        self._kernels = kernels
        self._tensors = tensors
        self._matrices = architecture.matrices
        self._shapes = {name: facts.shape for name, facts in architecture.tensors.items()}
        quantization = architecture.quantization
        self._stored = {} if quantization is None else stored_matrices(architecture, quantization)
        for name, stored in self._stored.items():
            if f"{name}.bias" in self._shapes:
                self._shapes[f"{name}.bias"] = (stored.padded_outputs,)

    def block(self, index: int) -> _Block:
        name = block_name(index)
        return _Block(
            self.norm(f"{name}.ln_1"),
            self.matrix(f"{name}.{QUERY_KEY_VALUE}"),
            self.matrix(f"{name}.{ATTENTION_OUTPUT}"),
            self.norm(f"{name}.ln_2"),
            self.matrix(f"{name}.{UP}"),
            self.matrix(f"{name}.{GATE}") if GATE in self._matrices else None,
            self.matrix(f"{name}.{DOWN}"),
        )

    def norm(self, name: str) -> _Norm:
        return _Norm(self.vector(f"{name}.weight"), self.vector(f"{name}.bias"))

    def matrix(self, name: str) -> WeightMatrix:
        """A matrix of a block, which has a bias and is stored as ``[inputs, outputs]``, or a table with neither."""
        bias = self.vector(f"{name}.bias") if f"{name}.bias" in self._shapes else None
        if stored := self._stored.get(name):
            weight = self._tensor(f"{name}.weight", ("U8",), stored.weight_shape)
            scale = self._tensor(f"{name}.weight_scale", ("BF16",), stored.scale_shape)
            return self._kernels.matrix(f"int{stored.bits}", weight, scale, bias)
        weight = self._tensor(f"{name}.weight", tuple(_FLOATS), self._shapes[f"{name}.weight"])
        dtype = "bfloat16" if weight.dtype == np.uint16 else "float32"
        return self._kernels.matrix(dtype, weight, bias=bias, input_major=bias is not None)

    def vector(self, name: str) -> Floats:
        """A tensor in fp32."""
        vector = self._tensor(name, tuple(_FLOATS), self._shapes[name])
        if vector.dtype == np.uint16:
            return (vector.astype(np.uint32) << 16).view(np.float32)
        return vector

    def _tensor(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        tensor = _find(self._tensors, name)
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


def _is_finite(tensor: MappedTensor) -> bool:
    values = tensor.values.reshape(-1)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        if tensor.dtype == "BF16" and ((piece & 0x7F80) == 0x7F80).any():  # all bits of the exponent
            return False
        if tensor.dtype in ("F32", "F16") and not np.isfinite(piece).all():
            return False
    return True


def _unreadable(name: str, tensor: MappedTensor) -> NotSupported:
    return NotSupported(f"{name} is stored as {tensor.dtype}, which the engine does not read.")
