import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from btlm.data.shards import TokenShards
from btlm.model import BTLMLMHeadModel
from btlm.train import Recipe, train
from btlm.train.model import prepare_model
from btlm.train.recipe import Checkpoints, Lora, Optimizer, Precision, Start
from tests.train.tiny import TOKEN_BYTES, tiny_recipe, tiny_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def base(shards: TokenShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folder of a trained model."""
    output = tmp_path_factory.mktemp("base") / "run"
    list(train(tiny_recipe(), shards, output, TOKEN_BYTES))
    return output / "model"


def tiny_from(base: Path, model: dict[str, Any] | None = None, **overrides: Any) -> Recipe:
    """The tiny run with the model of a folder and changes to its configuration."""
    return replace(tiny_recipe(start=Start(str(base)), **overrides), model=model or {})


# From a checkpoint


def test_training_goes_on_from_a_folder(shards: TokenShards, base: Path, tmp_path: Path) -> None:
    records = list(train(tiny_from(base), shards, tmp_path, TOKEN_BYTES))
    scratch = list(train(tiny_recipe(), shards, tmp_path / "scratch", TOKEN_BYTES))
    assert records[0]["loss"] < scratch[0]["loss"] - 0.3, "it starts with the loss at which the other run ended"
    model = BTLMLMHeadModel.from_pretrained(tmp_path / "model")
    assert model.config.mup_width_scale == 0.5


def test_the_weights_are_those_of_the_folder_in_fp32(base: Path, tmp_path: Path) -> None:
    BTLMLMHeadModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    trainee = prepare_model(tiny_from(tmp_path / "bf16"))
    expected = load_file(tmp_path / "bf16/model.safetensors")
    for name, parameter in trainee.trained().items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name].float()), name


def test_the_muP_groups_are_those_of_the_configuration(base: Path) -> None:  # noqa: N802
    groups = prepare_model(tiny_from(base)).parameter_groups(lr=0.5, weight_decay=0.1)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "matrices": (0.25, 0.1),
        "embeddings": (0.5, 0.1),
        "biases_and_norms": (0.5, 0.0),
    }


def test_position_interpolation_is_trained_and_kept(shards: TokenShards, base: Path, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    recipe = tiny_from(base, model={"n_positions": 64, "alibi_scaling": scaling})
    (first, *_) = train(recipe, shards, tmp_path, TOKEN_BYTES)
    plain = next(train(tiny_from(base), shards, tmp_path / "plain", TOKEN_BYTES))
    assert first["loss"] != plain["loss"]
    config = BTLMLMHeadModel.from_pretrained(tmp_path / "model").config
    assert config.alibi_scaling == scaling
    assert config.n_positions == 64


def test_a_folder_that_is_none_is_an_error(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"start\.model is '.*nowhere', which "):
        next(train(tiny_from(tmp_path / "nowhere"), shards, tmp_path / "run", TOKEN_BYTES))
    assert not (tmp_path / "run").exists()


def test_a_folder_without_weights_is_an_error(shards: TokenShards, base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"start\.model is '.*', which cannot be used: "):
        next(train(tiny_from(tmp_path), shards, tmp_path / "run", TOKEN_BYTES))


# Adapters

LORA = Lora(rank=2, alpha=4.0, dropout=0.1)


def lora_recipe(base: Path, **overrides: Any) -> Recipe:
    values = {"lora": LORA, "optimizer": Optimizer(lr=0.05, clip_norm=0.5, weight_decay=0.0), **overrides}
    return tiny_from(base, **values)


def test_adapters_are_trained_alone(shards: TokenShards, base: Path, tmp_path: Path) -> None:
    records = list(train(lora_recipe(base), shards, tmp_path, TOKEN_BYTES))
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    network = BTLMLMHeadModel.from_pretrained(base)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    adapted = PeftModel.from_pretrained(network, tmp_path / "model")
    merged = adapted.merge_and_unload()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".c_" in name and name.endswith("weight")}
    held_out = [record["nats_per_token"]["mean"] for record in records if "nats_per_token" in record]
    assert held_out[-1] < held_out[0]


def test_adapters_resume_bit_for_bit(shards: TokenShards, base: Path, tmp_path: Path) -> None:
    recipe = lora_recipe(base, checkpoints=Checkpoints(every_steps=1))
    expected = list(train(recipe, shards, tmp_path / "whole", TOKEN_BYTES))
    for record in train(recipe, shards, tmp_path / "parts", TOKEN_BYTES):
        if record["step"] == 3:
            break
    torch.manual_seed(99)
    rest = list(train(recipe, shards, tmp_path / "parts", TOKEN_BYTES))
    assert [r["step"] for r in rest] == [4, 5, 6, 7]
    assert [r["loss"] for r in rest] == [r["loss"] for r in expected[3:]]
    whole, parts = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_adapters_take_the_learning_rate_as_it_is(base: Path) -> None:
    trainee = prepare_model(lora_recipe(base))
    (group,) = trainee.parameter_groups(lr=0.5, weight_decay=0.1)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("adapters", 0.5, 0.1)
    assert len(group["params"]) == 2 * 5 * 2, "two matrices for each of five projections of two blocks"
    assert trainee.adapted


def test_layers_that_are_not_there_are_an_error(base: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.target_modules are \['q_proj'\]: "):
        prepare_model(lora_recipe(base, lora=Lora(target_modules=("q_proj",))))


# Compilation


@pytest.mark.slow
# torch's compiler reads the attribute, and hides the warning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_compute_the_same(
    shards: TokenShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "torch")
    for name, compiled in (("eager", False), ("compiled", True)):
        recipe = tiny_recipe(precision=Precision("float32", compile=compiled))
        list(train(recipe, shards, tmp_path / name, TOKEN_BYTES))
    eager, compiled_weights = (load_file(tmp_path / name / "model/model.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled_weights.keys()
    for name, tensor in eager.items():
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(compiled_weights[name], tensor, rtol=1e-3, atol=1e-4)
