"""Eight-bit storage of checkpoints: int8 weights with one scale an output channel, decoded while loading.

A folder whose ``config.json`` says ``"quantization_config": {"quant_method": "btlm", "bits": 8}`` holds, for every
weight matrix, int8 ``weight`` and fp32 ``weight_scale``, and loads through ``from_pretrained`` as a plain model: half
the bytes of bf16 on disk, nothing of it left in memory, and a plain checkpoint again when the model is saved.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .mup import MUP_TABLE

QUANT_METHOD = "btlm"


class BTLMQuantizationConfig(QuantizationConfigMixin):
    """How the weights of a folder are stored.

    Raises:
        ValueError: ``bits`` is not 8, or another key is given.
    """

    # Transformers drops the quantization from the configuration once the weights are decoded.
    dequantize = True

    def __init__(self, bits: int = 8, quant_method: str = QUANT_METHOD, **kwargs: Any) -> None:
        if bits != 8 or quant_method != QUANT_METHOD or kwargs:
            given = {"quant_method": quant_method, "bits": bits, **kwargs}
            raise ValueError(
                f'quantization_config is {given}; this version reads {{"quant_method": "{QUANT_METHOD}", "bits": 8}}.'
            )
        self.bits = bits
        self.quant_method = quant_method  # type: ignore[assignment]  # Transformers lists its own methods in an enum


class BTLMQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` read eight-bit folders."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Give each weight matrix the shape it has in the file: int8, beside its scales."""
        for module in _weight_modules(model):
            weight = module.weight
            assert isinstance(weight, Tensor)
            stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
            module.weight = nn.Parameter(stored, requires_grad=False)
            scale = torch.empty(_channels(module), dtype=torch.float32, device=weight.device)
            module.weight_scale = nn.Parameter(scale, requires_grad=False)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Decode to the dtype of the model and restore plain parameters."""
        for module in _weight_modules(model):
            stored, scale = module.weight, module.weight_scale
            assert isinstance(stored, Tensor)
            assert isinstance(scale, Tensor)
            weight = dequantize(stored, scale, module).to(model.dtype)
            module.weight = nn.Parameter(weight)
            del module.weight_scale
        model.tie_weights()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """The loaded model is plain and saves as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The loaded model is plain and trains as such."""
        return True


def quantize(weight: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Nearest int8 multiples of one scale an output channel, the largest weight of the channel at 127.

    Args:
        weight: Of ``module``: ``[in, out]`` for projections, ``[out, in]`` for tables.
        module: Tells the layout.

    Returns:
        int8 like ``weight``, and fp32 scales ``[out]``.
    """
    inputs = 1 if _rows_are_channels(module) else 0
    scale = weight.float().abs().amax(dim=inputs).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale.unsqueeze(inputs)).round().to(torch.int8), scale


def dequantize(weight: Tensor, scale: Tensor, module: nn.Module) -> Tensor:
    """The inverse of :func:`quantize`, in fp32."""
    return weight.float() * scale.unsqueeze(1 if _rows_are_channels(module) else 0)


def quantized_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of an eight-bit folder; a tied head is left to its token table."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    if tied:
        state.pop("lm_head.weight", None)
    for name, module in model.named_modules():
        if f"{name}.weight" in state and getattr(module, "mup_layer", None) in MUP_TABLE:
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = quantize(state[f"{name}.weight"], module)
    return state


def _weight_modules(model: PreTrainedModel) -> list[nn.Module]:
    tied = model.config.tie_word_embeddings
    layers = MUP_TABLE.keys() - ({"lm_head"} if tied else set())
    return [module for module in model.modules() if getattr(module, "mup_layer", None) in layers]


def _rows_are_channels(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.Linear))


def _channels(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[0 if _rows_are_channels(module) else 1]


# Not the library's decorators: this file may be imported twice, from the package and from inside a checkpoint.
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, BTLMQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, BTLMQuantizer)
