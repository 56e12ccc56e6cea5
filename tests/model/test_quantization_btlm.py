"""Folders of packed weights load as plain models."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from btlm.model.architecture_btlm import Quantization
from btlm.model.quantization_btlm import BTLMQuantizationConfig, dequantize
from btlm.model.storage_btlm import pack, pack_scale, stored_matrices
from tests.model.tiny import tiny_model, tokens

QUANTIZED = {"quant_method": "btlm", "bits": 4, "group_size": 64, "table_bits": 8}
# Two groups of inputs, and a feed-forward width that is padded from 75 to 128.
WIDE = {"n_embd": 128, "n_head": 4, "n_inner": 75}


def random_q(outputs, inputs, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (outputs, inputs), generator=generator).to(torch.uint8)


def to_bf16(scale_NG):
    return torch.from_numpy(pack_scale(scale_NG.numpy())).view(torch.bfloat16)


def write_folder(folder, model, quantization):
    """Write a folder of random integers; returns the weights that they stand for, by the name of their module."""
    storage = Quantization(*(quantization[key] for key in ("bits", "group_size", "table_bits")))
    matrices = stored_matrices(model.config.architecture, storage)
    state, values = {}, {}
    for name, tensor in model.state_dict().items():
        matrix = matrices.get(name.rpartition(".")[0])
        if matrix is None:
            state[name] = tensor.float().contiguous()
        elif name.endswith(".bias"):
            state[name] = torch.nn.functional.pad(tensor, (0, matrix.padded_outputs - matrix.outputs))
        else:
            # The padding has values too, which have to be cut off.
            q = random_q(matrix.padded_outputs, matrix.padded_inputs, matrix.bits, seed=len(state))
            groups = matrix.padded_inputs // matrix.group_size
            state[name] = torch.from_numpy(pack(q.numpy(), matrix.bits))
            # So small that only bf16 can represent the scales; fp16 has no such exponents.
            state[f"{name}_scale"] = to_bf16(torch.randn(matrix.padded_outputs, groups) * 1e-8)
            full = dequantize(state[name], state[f"{name}_scale"], matrix.bits, matrix.group_size)
            values[name.removesuffix(".weight")] = full[: matrix.outputs, : matrix.inputs]
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    model.config.quantization_config = quantization
    model.config.dtype = torch.float32  # else Transformers takes the dtype of the first tensor, a scale
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    del model.config.quantization_config
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return values


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": False},
        {"activation_function": "gelu_new", "position_embedding_type": "learned"},
        {"vocab_size": 96},
    ],
)
@pytest.mark.parametrize(
    "quantization", [QUANTIZED, {**QUANTIZED, "bits": 8, "group_size": 128}, {**QUANTIZED, "table_bits": 4}]
)
def test_a_quantized_folder_loads_as_a_plain_model(tmp_path, variant, quantization):
    original = tiny_model(**WIDE, **variant)
    values = write_folder(tmp_path / "few", original, quantization)
    result: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "few", output_loading_info=True)
    loaded, report = result
    assert not any(report.values())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tied = original.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    assert len(values) == 3 * (4 + ("activation_function" not in variant)) + (1 if tied else 2)
    for name, parameter in original.named_parameters():
        module, _, kind = name.rpartition(".")
        ours = loaded.get_parameter(name)
        assert ours.shape == parameter.shape
        if kind == "weight" and module in values:
            expected = values[module].T if isinstance(original.get_submodule(module), Conv1D) else values[module]
            assert torch.equal(ours, expected), name
        elif not (tied and module == "lm_head"):
            assert torch.equal(ours, parameter), name

    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(tokens(2, 20) % 96).logits, loaded(tokens(2, 20) % 96).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_decoded_from_exact_scales_whatever_the_dtype(tmp_path, dtype):
    values = write_folder(tmp_path, tiny_model(**WIDE), {**QUANTIZED, "bits": 8})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for name, expected in values.items():
        weight = loaded.get_parameter(f"{name}.weight")
        expected = expected if isinstance(loaded.get_submodule(name), nn.Embedding) else expected.T
        assert torch.equal(weight, expected.to(dtype)), name


def test_zero_neurons_of_the_padding_change_nothing(tmp_path):
    """A plain model has the same logits as a model of the padded width with zeros in the padding."""
    narrow = tiny_model(**WIDE)
    wide = tiny_model(**{**WIDE, "n_inner": 128})
    state = narrow.state_dict()
    for name, tensor in wide.state_dict().items():
        if state[name].shape != tensor.shape:
            padding = [size for a, b in zip(tensor.shape, state[name].shape, strict=True) for size in (a - b, 0)]
            state[name] = torch.nn.functional.pad(state[name], padding[::-1])
    wide.load_state_dict(state)
    torch.testing.assert_close(wide(tokens(1, 20)).logits, narrow(tokens(1, 20)).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tensor", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight_scale", "transformer.h.0.mlp.c_fc.bias"]
)
def test_a_tensor_of_another_shape_is_refused(tmp_path, tensor):
    from safetensors.torch import load_file

    write_folder(tmp_path, tiny_model(**WIDE), QUANTIZED)
    state = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    state[tensor] = state[tensor][:-1].contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tensor} is .* where config.json makes it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"bits": True},
        {"group_size": 32},
        {"table_bits": 16},
        {"quant_method": "gptq"},
        {"sym": True},
        {"group_size": None},
        {"bits": "4"},
    ],
)
def test_other_storage_is_refused(wrong: dict[str, Any]):
    BTLMQuantizationConfig(**dict[str, Any](QUANTIZED))
    with pytest.raises(ValueError, match=r"^quantization_config is .*this version reads .*\.$") as error:
        BTLMQuantizationConfig(**dict[str, Any]({**QUANTIZED, **wrong}))
    assert "\n" not in str(error.value)


def test_the_form_of_an_older_version_is_named():
    with pytest.raises(ValueError, match="older version, make the folder again"):
        BTLMQuantizationConfig(quant_method="btlm", bits=8)
