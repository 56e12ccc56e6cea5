"""Checkpoints of GPT-2, as Transformers' own classes write them and as they are on the Hub."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from btlm.checkpoint.gpt2 import config_of_gpt2
from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.to_transformers import load_model
from btlm.cli import main
from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.model.architecture_btlm import Architecture
from tests.checkpoint.tiny import END, byte_tokenizer, set_config

IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()


def save_gpt2(folder, **values):
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    ends = {"bos_token_id": END, "eos_token_id": END}
    config = GPT2Config(**{**sizes, **ends, **values})
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # biases and norms too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def as_on_the_hub(folder):
    """Names without a prefix, and buffers of causality that are not weights."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("on_the_hub", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"activation_function": "gelu", "n_inner": 96},  # as Cerebras-GPT
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ],
    ids=str,
)
def test_engine_and_model_are_gpt2(tmp_path, values, on_the_hub):
    theirs = save_gpt2(tmp_path, **values)
    if on_the_hub:
        as_on_the_hub(tmp_path)
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits
        ours = load_model(tmp_path, dtype="float32", device="cpu")[0](torch.tensor([IDS])).logits
    assert torch.allclose(ours, logits, atol=1e-4)
    exact = logits[0, :-1].double().log_softmax(-1)[torch.arange(39), IDS[1:]].numpy()
    engine = Engine.open(tmp_path, context=64)
    assert np.allclose(engine.score(IDS), exact, atol=1e-4)
    text = theirs.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, 40:]
    tokens = engine.generate(IDS, GenerationOptions(max_new_tokens=24), stop_ids=frozenset())
    assert [token.id for token in tokens] == text.tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_quantized_to_a_folder_of_btlm(tmp_path, bits):
    save_gpt2(tmp_path / "plain", initializer_range=0.05)
    as_on_the_hub(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "packed", bits=bits, group_size=64)
    model, _ = load_model(tmp_path / "packed", dtype="float32", device="cpu")
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits
    exact = logits[0, :-1].double().log_softmax(-1)[torch.arange(39), IDS[1:]].numpy()
    difference = np.asarray(Engine.open(tmp_path / "packed").score(IDS)) - exact
    assert np.sqrt(np.mean(difference**2)) < 0.03


def test_the_command_line(tmp_path, capsys):
    save_gpt2(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert main(["generate", "abc", "--model", str(tmp_path), "--max-new-tokens", "5"]) == 0
    assert main(["generate", "abc", "--model", str(tmp_path), "--max-new-tokens", "100"]) == 2
    assert "learned positions end at 64" in capsys.readouterr().err


def test_what_is_not_a_network_of_btlm(tmp_path):
    save_gpt2(tmp_path)
    for values, says in (
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"add_cross_attention": False, "width_scale": 0.5}, "GPT-2 has no width_scale"),
        ({"width_scale": ..., "position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"position_embedding_type": ..., "activation_function": "tanh"}, "activation_function is 'tanh', unknown"),
    ):
        set_config(tmp_path, **values)
        with pytest.raises(ValueError, match=says) as error:
            _ = Checkpoint.open(tmp_path).architecture
        assert "\n" not in str(error.value)


def test_defaults_are_those_of_transformers():
    theirs = Architecture.from_config(config_of_gpt2(GPT2Config().to_dict()))
    assert Architecture.from_config(config_of_gpt2({"model_type": "gpt2"})) == theirs
