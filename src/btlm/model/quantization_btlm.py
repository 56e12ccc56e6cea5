"""Weights in four or eight bits, one scale per group of inputs, decoded while loading.

A folder whose ``config.json`` holds

    "quantization_config": {"quant_method": "btlm", "bits": 4, "group_size": 128, "table_bits": 8}

loads through ``from_pretrained`` as a plain model: its matrices are decoded to the dtype of the model, nothing of the
storage is left in memory, and a plain checkpoint is written when the model is saved.

:mod:`.storage_btlm` describes the storage.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .architecture_btlm import HEAD, Quantization
from .config_keys_btlm import QUANT_METHOD, quantization_problem
from .configuration_btlm import BTLMConfig
from .storage_btlm import StoredMatrix, stored_matrices
from .storage_btlm import dequantize as dequantize_array


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
        if problem := quantization_problem({**values, **kwargs}):
            raise ValueError(f"{problem}.")
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
        for name, stored in _matrices_of(model, self.quantization_config).items():
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
        for name, stored in _matrices_of(model, self.quantization_config).items():
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


def dequantize(stored: Tensor, scale: Tensor, bits: int, group_size: int) -> Tensor:
    """The values of a stored matrix, with its padding: see :func:`.storage_btlm.dequantize`.

    Args:
        stored: uint8 ``[N/16, K/8 or K/4, 64]``, on any device.
        scale: bf16 ``[N/16, K/group_size, 16]``.
        bits: 4 or 8.
        group_size: Number of inputs that share a scale.

    Returns:
        fp32 ``[N, K]`` on the same device.
    """
    scales = scale.detach().cpu().contiguous().view(torch.uint16).numpy()
    values = dequantize_array(stored.detach().cpu().numpy(), scales, bits, group_size)
    return torch.from_numpy(values).to(stored.device)


def _matrices_of(model: PreTrainedModel, quantization: BTLMQuantizationConfig) -> dict[str, StoredMatrix]:
    """The stored matrices by the names of their modules in a model, which may lack the head and the prefix of names."""
    assert isinstance(model.config, BTLMConfig)
    stored = Quantization(quantization.bits, quantization.group_size, quantization.table_bits)
    matrices = stored_matrices(model.config.architecture, stored)
    if hasattr(model, model.base_model_prefix):
        return {name: matrix for name, matrix in matrices.items() if name != HEAD or hasattr(model, HEAD)}
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): matrix for name, matrix in matrices.items() if name.startswith(prefix)}


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
