"""What of the plug-in needs no vLLM: how vLLM finds it, what it refuses, and how it splits weights over devices."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.errors import NotSupported, TooLong
from btlm.serve.vllm.limits import ConfigHook, check_backend, check_config
from btlm.serve.vllm.weights import padded_inner, pieces
from tests.model.tiny import assert_near, tiny_config, tiny_model

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_vllm_finds_the_plugin():
    points = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["btlm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_finding_the_plugin_loads_neither_vllm_nor_torch():
    program = "import sys, btlm.serve.vllm; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Refusals


def test_quantized_weights_are_refused():
    with pytest.raises(NotSupported, match="have 4 bits in the format of `btlm quantize`"):
        check_config(Checkpoint.open(BUNDLED_MODEL).config())


def test_dynamic_interpolation_is_refused():
    with pytest.raises(NotSupported, match=r"set a fixed one in config\.json"):
        check_config(tiny_config(alibi_scaling={"type": "linear", "train_seq_len": 32}))


def test_a_backend_without_alibi_is_refused():
    with pytest.raises(NotSupported, match="FLASHINFER does not compute ALiBi; set the attention backend to"):
        check_backend("FLASHINFER")
    check_backend("FLASH_ATTN")


def test_vllm_is_told_of_alibi():
    config = tiny_config(alibi_scaling={"type": "linear", "factor": 2.0})
    ConfigHook.verify_and_update_model_config(SimpleNamespace(hf_config=config, max_model_len=1000))
    assert config.alibi


def test_learned_positions_end():
    learned = SimpleNamespace(hf_config=tiny_config(position_embedding_type="learned"), max_model_len=65)
    with pytest.raises(TooLong, match="max_model_len is 65, but the learned positions end at 64"):
        ConfigHook.verify_and_update_model_config(learned)
    learned.max_model_len = 64
    ConfigHook.verify_and_update_model_config(learned)
    assert not learned.hf_config.alibi


# Weights


def share(tensor, device, num_devices, dim=0):
    """A device's part of a tensor, as vLLM's parallel layers take it."""
    return tensor.chunk(num_devices, dim)[device]


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("activation", ["swiglu", "gelu_new"])
def test_the_shares_of_the_devices_make_the_whole_layer(num_devices, activation):
    model = tiny_model(activation_function=activation)
    config = model.config
    found = {
        (p.parameter, p.part): p.tensor for p in pieces(model.state_dict().items(), config.architecture, num_devices)
    }
    block, name = model.transformer.h[1], "transformer.h.1"
    inner = padded_inner(config.inner_dim, num_devices)
    x = torch.randn(7, config.n_embd)

    heads, outputs = [], []
    for device in range(num_devices):
        qkv = {
            part: F.linear(
                x,
                share(found[f"{name}.attn.c_attn.weight", part], device, num_devices),
                share(found[f"{name}.attn.c_attn.bias", part], device, num_devices),
            )
            for part in "qkv"
        }
        heads.append(qkv)
        down = share(found[f"{name}.mlp.c_proj.weight", None], device, num_devices, 1)
        assert down.shape == (config.n_embd, inner // num_devices)
        if activation == "swiglu":
            gate, up = (
                F.linear(
                    x,
                    share(found[f"{name}.mlp.gate_up.weight", part], device, num_devices),
                    share(found[f"{name}.mlp.gate_up.bias", part], device, num_devices),
                )
                for part in (0, 1)
            )
            hidden = F.silu(gate) * up
        else:
            weight, bias = (
                share(found[f"{name}.mlp.c_fc.{kind}", None], device, num_devices) for kind in ("weight", "bias")
            )
            hidden = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        outputs.append(F.linear(hidden, down))
    whole = torch.cat([torch.cat([qkv[part] for qkv in heads], -1) for part in "qkv"], -1)
    assert_near(whole, block.attn.c_attn(x), 1e-4)
    assert_near(sum(outputs) + found[f"{name}.mlp.c_proj.bias", None], block.mlp(x), 1e-4)


def test_every_tensor_is_taken_once():
    model = tiny_model()
    architecture = model.config.architecture
    old = {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    taken = list(pieces({**model.state_dict(), **old}.items(), architecture, 1))
    assert len({(piece.parameter, piece.part) for piece in taken}) == len(taken)
    assert {piece.stored for piece in taken} == architecture.tensors.keys() - {"transformer.relative_pe.slopes"}


def test_an_untied_head_is_taken():
    model = tiny_model(tie_word_embeddings=False)
    assert "lm_head.weight" in {
        piece.parameter for piece in pieces(model.state_dict().items(), model.config.architecture, 1)
    }


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("transformer.h.9.ln_1.bias", [48], "transformer.h.9.ln_1.bias is not a tensor of BTLM"),
        ("transformer.ln_f.bias", [47], r"transformer.ln_f.bias is \[47\] where config.json makes it \[48\]"),
    ],
)
def test_other_weights_are_refused(name, shape, told):
    with pytest.raises(ValueError, match=told):
        list(pieces([(name, torch.ones(shape))], tiny_config().architecture, 1))


def test_the_released_width_is_padded():
    assert [padded_inner(6826, devices) for devices in (1, 2, 4, 8)] == [6848, 6912, 6912, 7168]
