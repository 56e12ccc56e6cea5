"""Checkpoints of known shapes with random weights, whose speed and memory are those of trained ones."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.tensor_file import make_header
from btlm.checkpoint.weight_files import ITEM_BYTES
from btlm.model.architecture_btlm import BTLM_3B, Architecture
from btlm.model.config_keys_btlm import MODEL_TYPE, QUANT_METHOD
from btlm.model.storage_btlm import stored_matrices

DTYPES = ("4bit", "8bit", "bfloat16", "float32")

_GROUP, _TABLE_BITS = 128, 8
_POOL = 4_194_301  # bytes or elements that a file repeats; odd, so that rows differ

# Random weights have no end-of-text.
_LEFT_OUT = ("quantization", "bos_token_id", "eos_token_id")
_BTLM_3B = {key: value for key, value in asdict(BTLM_3B).items() if key not in _LEFT_OUT}
# Llama-7B (arXiv 2302.13971) has RMSNorm, rotary positions and no biases; this shape has BTLM's blocks at Llama's
# sizes. The matrices, which cause nearly all of the cost, are the same.
_LLAMA_7B = {"vocab_size": 32000, "n_embd": 4096, "n_inner": 11008, "mup_width_scale": 0.0625}
SHAPES: dict[str, dict[str, Any]] = {
    "btlm-3b": _BTLM_3B,
    "llama-7b": {**_BTLM_3B, **_LLAMA_7B, "tie_word_embeddings": False},
}


class _Tensor(NamedTuple):
    dtype: str  # of safetensors
    shape: tuple[int, ...]
    role: str  # "packed", "scale", "matrix", "one" or "zero"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def shape_config(sizes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a shape.

    Args:
        sizes: Sizes as in :data:`SHAPES`; those of BTLM-3B where one is missing.
        dtype: One of :data:`DTYPES`; quantized weights have groups of 128 and tables of eight bits.
    """
    config = {"model_type": MODEL_TYPE, "architectures": ["BTLMLMHeadModel"], **_BTLM_3B, **sizes}
    config["dtype"] = dtype if dtype in ("bfloat16", "float32") else "float32"
    if bits := {"4bit": 4, "8bit": 8}.get(dtype):
        stored = {"bits": bits, "group_size": _GROUP, "table_bits": _TABLE_BITS}
        config["quantization_config"] = {"quant_method": QUANT_METHOD, **stored}
    return config


def random_weight_bytes(sizes: Mapping[str, Any], dtype: str) -> int:
    """Bytes of the weights that :func:`write_random_model` writes."""
    return sum(tensor.nbytes for tensor in _layout(sizes, dtype).values())


def write_random_model(
    folder: Path, sizes: Mapping[str, Any], dtype: str, *, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write a checkpoint of a shape with random weights, a few MB in memory at a time.

    Args:
        folder: Folder that receives ``config.json`` and ``model.safetensors``.
        sizes, dtype: As for :func:`shape_config`.
        on_bytes: Called with the number of bytes written so far.
    """
    (folder / "config.json").write_text(json.dumps(shape_config(sizes, dtype), indent=2) + "\n", encoding="utf-8")
    layout = _layout(sizes, dtype)
    header = make_header({name: (tensor.dtype, tensor.shape) for name, tensor in layout.items()})
    pools = _pools(dtype)
    written = 0
    with (folder / "model.safetensors").open("xb") as file:
        file.write(header.content)
        for tensor in (layout[name] for name in header.starts):
            left = math.prod(tensor.shape)
            while left:
                part = pools[tensor.dtype, tensor.role][:left]
                file.write(part.data)
                left -= len(part)
                written += part.nbytes
                if on_bytes is not None:
                    on_bytes(written)


def _layout(sizes: Mapping[str, Any], dtype: str) -> dict[str, _Tensor]:
    """The tensors of a shape."""
    architecture = Architecture.from_config(shape_config(sizes, dtype))
    quantization = architecture.quantization
    matrices = {} if quantization is None else stored_matrices(architecture, quantization)
    plain, tensors = "BF16" if dtype == "bfloat16" else "F32", dict[str, _Tensor]()
    for name, tensor in architecture.tensors.items():
        module, _, part = name.rpartition(".")
        matrix = matrices.get(module)
        if tensor.kind in ("matrix", "token table"):
            if matrix is None:
                tensors[name] = _Tensor(plain, tensor.shape, "matrix")
            else:
                tensors[name] = _Tensor("U8", matrix.weight_shape, "packed")
                tensors[f"{name}_scale"] = _Tensor("BF16", matrix.scale_shape, "scale")
        elif tensor.kind in ("bias", "norm"):
            size = tensor.shape if matrix is None else (matrix.padded_outputs,)
            tensors[name] = _Tensor(plain, size, "one" if part == "weight" else "zero")
    return tensors


def _pools(dtype: str) -> dict[tuple[str, str], npt.NDArray[Any]]:
    """Values to fill tensors with, by dtype and role; matrices have a standard deviation of about 0.02."""
    rng = np.random.default_rng(0)
    normal = (0.02 * rng.standard_normal(_POOL, np.float32)).astype(np.float32)
    scale = np.float32(0.02 / (4.6 if dtype == "4bit" else 74))  # divided by the standard deviation of uniform q
    few = 65_536
    pools: dict[tuple[str, str], npt.NDArray[Any]] = {
        ("U8", "packed"): rng.integers(1, 256, _POOL, np.uint8),
        ("BF16", "scale"): _bf16(np.full(few, scale, np.float32)),
        ("F32", "matrix"): normal,
        ("BF16", "matrix"): _bf16(normal),
    }
    for role, value in (("zero", 0), ("one", 1)):
        pools["F32", role] = np.full(few, value, np.float32)
        pools["BF16", role] = _bf16(pools["F32", role])
    return pools


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Values as bf16 bits, rounded towards zero, which is good enough here."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
