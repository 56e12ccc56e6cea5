"""The programs in examples/, run on models and text made here."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from btlm import BTLMLMHeadModel
from btlm.data.shards import write_manifest, write_shard
from btlm.model.tokenization_btlm import load_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
LR = 0.02
WIDTH_SCALE = 0.25
RECIPE: dict[str, Any] = {
    "model": {
        "vocab_size": 50257,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 44,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "mup_embeddings_scale": 3.0,
        "mup_output_alpha": 1.2,
        "mup_scale_qk_dot_by_d": True,
    },
    "mup_base_width": 8,
    "optimizer": {"lr": 1.0},
    "schedule": {"warmup_tokens": 0},
    "micro_batch_tokens": 64,
    "stages": [{"sequence_length": 32, "batch_tokens": 64, "tokens": 64}],
}


@pytest.fixture(scope="module")
def hf_trainer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_trainer", EXAMPLES / "hf_trainer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, the fastest for such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    documents = [(np.arange(100, 140), 0, 160)] * 20
    write_manifest(folder, {"train": [write_shard(folder, "train-00000", documents)]}, ["made"])
    return folder


def run(hf_trainer: ModuleType, output: Path, *arguments: object) -> Any:
    options = ("--sequence-length", 32, "--batch-rows", 2, "--lr", LR, "--warmup-steps", 1)
    return hf_trainer.main([str(argument) for argument in ("--output", output, *options, *arguments)])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_recipe_s_model_learns_text_at_mup_s_learning_rates(hf_trainer, recipe, text, tmp_path):
    output = tmp_path / "run"
    trainer = run(hf_trainer, output, "--model", recipe, "--text", text, "--steps", 8)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    model = BTLMLMHeadModel.from_pretrained(output)
    assert torch.equal(model.transformer.wte.weight, trainer.model.transformer.wte.weight)
    assert (output / "tokenizer.json").exists()
    assert json.loads((output / "config.json").read_text())["use_cache"] is True

    # The learning rate of matrices is scaled by base width / width, and biases and norms have no weight decay.
    rates = {group["name"]: (group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert rates == {
        "matrices": (LR * WIDTH_SCALE, 0.1),
        "embeddings": (LR, 0.1),
        "biases_and_norms": (LR, 0.0),
    }
    expected = trainer.model.get_mup_param_groups(LR, 0.1)
    for actual, group in zip(trainer.optimizer.param_groups, expected, strict=True):
        assert list(map(id, actual["params"])) == list(map(id, group["params"]))


def test_a_checkpoint_goes_on_with_shards_in_bf16(hf_trainer, recipe, shards, text, tmp_path):
    run(hf_trainer, tmp_path / "first", "--model", recipe, "--text", text, "--steps", 1)
    trainer = run(hf_trainer, tmp_path / "run", "--model", tmp_path / "first", "--data", shards, "--steps", 8, "--bf16")
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.model.dtype == torch.float32
    assert BTLMLMHeadModel.from_pretrained(tmp_path / "run").dtype == torch.float32


def test_the_same_command_goes_on_from_the_last_checkpoint(hf_trainer, recipe, text, tmp_path):
    arguments = ("--model", recipe, "--text", text, "--save-steps", 2)
    whole = run(hf_trainer, tmp_path / "whole", *arguments, "--steps", 4)
    run(hf_trainer, tmp_path / "run", *arguments, "--steps", 4)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "lost")
    kept = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    written = kept.stat().st_mtime_ns
    again = run(hf_trainer, tmp_path / "run", *arguments, "--steps", 4)
    assert kept.stat().st_mtime_ns == written, "it started from the beginning"
    assert again.state.global_step == 4
    finished = run(hf_trainer, tmp_path / "run", *arguments, "--steps", 4)
    assert finished.state.global_step == 0, "nothing is left to train"
    for model in (again.model, finished.model, BTLMLMHeadModel.from_pretrained(tmp_path / "run")):
        for name, parameter in whole.model.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_rows_are_cut_from_one_stream(hf_trainer, recipe, shards, text, tmp_path):
    common = ("--model", recipe, "--output", tmp_path, "--steps", 1, "--sequence-length", 32)

    def stream(rows: Any) -> list[int]:
        return [token for index in range(len(rows)) for token in rows[index]["input_ids"].tolist()]

    args = hf_trainer.parse([str(argument) for argument in (*common, "--text", text, text)])
    expected = [*load_tokenizer()(text.read_text(), verbose=False).input_ids, 50256] * 2
    assert 0 <= len(expected) - len(rows := stream(hf_trainer.text_rows(args))) < 32
    assert rows == expected[: len(rows)]

    args = hf_trainer.parse([str(argument) for argument in (*common, "--data", shards)])
    assert stream(hf_trainer.shard_rows(args)) == ([*range(100, 140), 50256] * 20)[: 20 * 41 // 32 * 32]


def test_too_little_text_is_said(hf_trainer, recipe, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(ValueError, match="do not fill a row of 32"):
        run(hf_trainer, tmp_path / "run", "--model", recipe, "--text", tmp_path / "short.txt", "--steps", 1)
