"""Eight-bit folders load as plain models, within half a step of every weight."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from btlm.model import BTLMLMHeadModel
from btlm.model.quantization_btlm import BTLMQuantizationConfig, dequantize, quantize, quantized_state_dict
from tests.model.tiny import tiny_model, tokens


def write_eight_bit(model, folder):
    model.config.quantization_config = {"quant_method": "btlm", "bits": 8}
    model.config.save_pretrained(folder)
    del model.config.quantization_config
    save_file(quantized_state_dict(model), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("module", "channel_dim"), [(nn.Embedding(30, 7), 0), (nn.Linear(7, 30), 0), (Conv1D(30, 7), 1)]
)
def test_each_output_channel_has_a_scale_of_its_own(module, channel_dim):
    torch.manual_seed(0)
    channels = module.weight.shape[channel_dim]
    sizes = torch.logspace(-4, 2, channels).unsqueeze(1 - channel_dim)
    weight = torch.randn(module.weight.shape) * sizes
    stored, scale = quantize(weight, module)
    assert stored.dtype == torch.int8
    assert scale.shape == (channels,)
    error = (dequantize(stored, scale, module) - weight).abs()
    assert (error <= scale.unsqueeze(1 - channel_dim) * 0.5001).all()
    assert (stored.abs().amax(dim=1 - channel_dim) == 127).all()


def test_a_channel_of_zeros_stays_zero():
    module = Conv1D(3, 4)
    stored, scale = quantize(torch.zeros(4, 3), module)
    assert (dequantize(stored, scale, module) == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_an_eight_bit_folder_loads_as_a_plain_model(tmp_path, tied):
    original = tiny_model(tie_word_embeddings=tied)
    write_eight_bit(original, tmp_path / "eight")
    result: Any = BTLMLMHeadModel.from_pretrained(tmp_path / "eight", output_loading_info=True)
    loaded, report = result
    assert not any(report.values())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    for name, module in original.named_modules():
        weight = loaded.get_parameter(f"{name}.weight") if getattr(module, "mup_layer", None) else None
        if weight is not None and not (tied and name == "lm_head"):
            assert torch.equal(weight, dequantize(*quantize(module.weight, module), module)), name

    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = BTLMLMHeadModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(tokens(2, 20)).logits, loaded(tokens(2, 20)).logits)


def test_weights_take_a_byte_each():
    model = tiny_model()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    stored = sum(tensor.nbytes for tensor in quantized_state_dict(model).values() if tensor.dtype == torch.int8)
    assert stored == matrices


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"bits": 8, "group_size": 64}, {"quant_method": "gptq"}])
def test_other_storage_is_refused(wrong):
    with pytest.raises(ValueError, match="this version reads"):
        BTLMQuantizationConfig(**wrong)
