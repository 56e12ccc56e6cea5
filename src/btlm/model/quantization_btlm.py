"""Weights in four or eight bits, one scale a group of inputs, decoded while loading.

A folder whose ``config.json`` holds

    "quantization_config": {"quant_method": "btlm", "bits": 4, "group_size": 128, "table_bits": 8}

loads through ``from_pretrained`` as a plain model: its matrices are decoded to the dtype of the model, nothing of the
storage is left in memory, and a plain checkpoint is written when the model is saved.

Storage of a matrix with N outputs and K inputs, both padded with zeros (:func:`stored_matrices`), in the order in which
kernels read it: a row of blocks holds 16 outputs, and a block 64 bytes.

- ``weight``, 4 bits: uint8 ``[N/16, K/8, 64]``; byte ``4 n + i`` of block ``[r, c]`` holds two values of the output
  ``16 r + n``: input ``8 c + i`` in its low and input ``8 c + 4 + i`` in its high nibble. A value is ``(q - 8) scale``.
- ``weight``, 8 bits: uint8 ``[N/16, K/4, 64]``; byte ``4 n + i`` of block ``[r, c]`` is input ``4 c + i`` of the output
  ``16 r + n``. A value is ``(q - 128) scale``.
- ``weight_scale``: bf16 ``[N/16, K/group_size, 16]``: the scale of output ``16 r + n`` and group ``g`` of inputs at
  ``[r, g, n]``; of either sign, and 0 for a group of zeros.
- ``bias``: fp32 ``[N]``.

Letters: N outputs, K inputs, G groups of inputs, R rows of blocks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_btlm import BTLMConfig

QUANT_METHOD = "btlm"
BITS = (4, 8)
GROUP_SIZES = (64, 128)
# Outputs of a block of stored weights.
BLOCK_ROWS = 16

_BLOCK_BYTES = 64
_MATRICES = ("c_attn", "c_proj", "c_fc", "c_fc2")
_TABLES = ("wte", "lm_head")


class BTLMQuantizationConfig(QuantizationConfigMixin):
    """How the weights of a folder are stored.

    Args:
        bits: Of the matrices of the blocks, 4 or 8.
        group_size: Inputs that share a scale, 64 or 128.
        table_bits: Of the token table, and of the head where it is not tied, 4 or 8.
        quant_method: ``"btlm"``.
        **kwargs: None.

    Raises:
        ValueError: Anything else is given, or one of them is missing.
    """

    # Transformers drops the quantization from the configuration once the weights are decoded.
    dequantize = True

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        table_bits: int | None = None,
        quant_method: str = QUANT_METHOD,
        **kwargs: Any,
    ) -> None:
        values = {"quant_method": quant_method, "bits": bits, "group_size": group_size, "table_bits": table_bits}
        known = quant_method == QUANT_METHOD and _one_of(bits, BITS) and _one_of(table_bits, BITS)
        if not known or not _one_of(group_size, GROUP_SIZES) or kwargs:
            given = {key: value for key, value in values.items() if value is not None} | kwargs
            older = given == {"quant_method": QUANT_METHOD, "bits": 8}
            raise ValueError(
                f'quantization_config is {given}; this version reads {{"quant_method": "{QUANT_METHOD}", '
                f'"bits": 4 or 8, "group_size": 64 or 128, "table_bits": 4 or 8}}; '
                + ("that is the form of an older version, " if older else "")
                + "make the folder again with `btlm quantize`."
            )
        assert bits is not None
        assert group_size is not None
        assert table_bits is not None
        self.bits = bits
        self.group_size = group_size
        self.table_bits = table_bits
        self.quant_method = quant_method  # type: ignore[assignment]  # Transformers lists its own methods in an enum


class BTLMQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` read quantized folders."""

    quantization_config: BTLMQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Give each matrix the shape that it has in the file, beside its scales."""
        for name, stored in stored_matrices(model, self.quantization_config).items():
            module = model.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            device = module.weight.device
            weight = torch.empty(stored.weight_shape, dtype=torch.uint8, device=device)
            module.weight = nn.Parameter(weight, requires_grad=False)
            # bf16 whatever the dtype of the model: Transformers casts what it reads to the dtype that it finds here.
            scale = torch.empty(stored.scale_shape, dtype=torch.bfloat16, device=device)
            module.weight_scale = nn.Parameter(scale, requires_grad=False)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                module.bias = nn.Parameter(bias.new_empty(stored.padded_outputs))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Decode to the dtype of the model, without the padding, and restore plain parameters.

        Raises:
            ValueError: A tensor of the file has another shape than the configuration gives it.
        """
        dtype = next(module.weight.dtype for module in model.modules() if isinstance(module, nn.LayerNorm))
        for name, stored in stored_matrices(model, self.quantization_config).items():
            module = model.get_submodule(name)
            bias = getattr(module, "bias", None)
            weight = _checked(name, "weight", module.weight, stored.weight_shape)
            scale = _checked(name, "weight_scale", module.weight_scale, stored.scale_shape)
            decoded = dequantize(weight, scale, stored.bits, self.quantization_config.group_size)
            decoded = decoded[: stored.outputs, : stored.inputs].to(dtype)
            module.weight = nn.Parameter((decoded.T if isinstance(module, Conv1D) else decoded).contiguous())
            del module.weight_scale
            if bias is not None:
                bias = _checked(name, "bias", bias, (stored.padded_outputs,))
                module.bias = nn.Parameter(bias.detach()[: stored.outputs].clone())
        model.tie_weights()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """The loaded model is plain and saves as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is plain and trains as such."""
        return True


class StoredMatrix(NamedTuple):
    """Sizes of one matrix in a file."""

    bits: int
    group_size: int
    outputs: int
    inputs: int
    padded_outputs: int
    padded_inputs: int

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """``[N/16, K/8 or K/4, 64]``."""
        columns = _BLOCK_BYTES // BLOCK_ROWS * 8 // self.bits
        return self.padded_outputs // BLOCK_ROWS, self.padded_inputs // columns, _BLOCK_BYTES

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        """``[N/16, G, 16]``."""
        return self.padded_outputs // BLOCK_ROWS, self.padded_inputs // self.group_size, BLOCK_ROWS


def stored_matrices(model: PreTrainedModel, quantization: BTLMQuantizationConfig) -> dict[str, StoredMatrix]:
    """The matrices that are stored in few bits, by the name of their module; a tied head is not one of them.

    Outputs are padded to a multiple of 16, and the feed-forward width, as outputs and as inputs, to a multiple of the
    group size.

    Args:
        model: On any device; its matrices are not looked at.
        quantization: Of the folder.

    Raises:
        ValueError: The group size does not divide the width of the model.
    """
    group_size = quantization.group_size
    assert isinstance(model.config, BTLMConfig)
    if problem := group_size_problem(model.config, group_size):
        raise ValueError(problem)
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "mup_layer", None)
        if layer in _MATRICES:
            assert isinstance(module, Conv1D)
            outputs, inputs = module.nf, module.nx
            padded = padded_size(outputs, group_size), padded_size(inputs, group_size)
            found[name] = StoredMatrix(quantization.bits, group_size, outputs, inputs, *padded)
        elif layer in _TABLES and not (layer == "lm_head" and model.config.tie_word_embeddings):
            outputs, inputs = model.config.vocab_size, model.config.n_embd
            padded = padded_size(outputs, BLOCK_ROWS), inputs
            found[name] = StoredMatrix(quantization.table_bits, group_size, outputs, inputs, *padded)
    return found


def group_size_problem(config: BTLMConfig, group_size: int) -> str | None:
    """Why matrices of this model cannot be cut in groups of ``group_size`` inputs, in one line; None if they can."""
    if config.n_embd % group_size == 0:
        return None
    fitting = " or ".join(str(size) for size in GROUP_SIZES if config.n_embd % size == 0)
    remedy = f"use {fitting}" if fitting else "neither 64 nor 128 does, and such a model cannot be quantized"
    return f"The group size {group_size} does not divide n_embd, which is {config.n_embd}; {remedy}."


def padded_size(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def pack(q: Tensor, bits: int) -> Tensor:
    """Integers to stored blocks.

    Args:
        q: uint8 ``[N, K]``, below ``2 ** bits``; N a multiple of 16, K of 8.
        bits: 4 or 8.

    Returns:
        uint8 ``[N/16, K/8, 64]`` for 4 bits, where byte ``j`` of ``[r, c]`` is
        ``q[16 r + j // 4, 8 c + j % 4] + 16 q[16 r + j // 4, 8 c + 4 + j % 4]``; ``[N/16, K/4, 64]`` for 8 bits, where
        it is ``q[16 r + j // 4, 4 c + j % 4]``.
    """
    outputs, inputs = q.shape
    if bits == 4:
        halves = q.reshape(outputs, inputs // 8, 2, 4)
        q = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(outputs, inputs // 2)
    blocks = q.reshape(outputs // BLOCK_ROWS, BLOCK_ROWS, -1, 4).transpose(1, 2)
    stored: Tensor = blocks.reshape(outputs // BLOCK_ROWS, -1, _BLOCK_BYTES)
    return stored


def unpack(stored: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[N, K]``."""
    rows = stored.shape[0]
    q: Tensor = stored.reshape(rows, -1, BLOCK_ROWS, 4).transpose(1, 2).reshape(rows * BLOCK_ROWS, -1, 4)
    if bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=2)
    return q.reshape(rows * BLOCK_ROWS, -1)


def pack_scale(scale_NG: Tensor) -> Tensor:
    """Scales ``[N, G]`` as they are stored: bf16 ``[N/16, G, 16]``."""
    blocks = scale_NG.reshape(-1, BLOCK_ROWS, scale_NG.shape[1])
    return blocks.transpose(1, 2).to(torch.bfloat16).contiguous()


def unpack_scale(stored: Tensor) -> Tensor:
    """The inverse of :func:`pack_scale`, in fp32."""
    return stored.float().transpose(1, 2).reshape(-1, stored.shape[1])


def dequantize(stored: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    """The values of a stored matrix, with its padding.

    Args:
        stored: uint8 ``[N/16, K/8 or K/4, 64]``, as :func:`pack` makes it.
        scale: bf16 ``[N/16, K/group_size, 16]``.
        bits: 4 or 8.
        group_size: Inputs that share a scale.

    Returns:
        fp32 ``[N, K]``: ``(q - 2 ** (bits - 1)) scale``, which fp32 holds exactly.
    """
    q = unpack(stored, bits)
    groups_NGg = q.view(len(q), -1, group_size).float() - 2 ** (bits - 1)
    values: Tensor = (groups_NGg * unpack_scale(scale)[:, :, None]).view(q.shape)
    return values


def _one_of(value: object, choices: tuple[int, ...]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in choices


def _checked(module: str, name: str, tensor: Tensor | nn.Module, shape: tuple[int, ...]) -> Tensor:
    # Transformers leaves the shapes of quantized files to the quantizer.
    assert isinstance(tensor, Tensor)
    dtype = {"weight": torch.uint8, "weight_scale": torch.bfloat16}.get(name, tensor.dtype)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{module}.{name} is {tensor.dtype} {list(tensor.shape)} where config.json makes it {dtype} {list(shape)}"
        )
    return tensor


# Not the library's decorators: this file may be imported twice, from the package and from inside a checkpoint.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, BTLMQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, BTLMQuantizer)
