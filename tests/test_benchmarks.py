"""Every script of benchmarks/ runs from end to end."""

import argparse
import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = [
    path for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")) if "__main__" in path.read_text()
]
# These take seconds at most; the others start several processes, or load torch and Transformers.
FAST = ("kernel_speed.py",)


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, id=path.stem, marks=() if path.name in FAST else pytest.mark.slow) for path in SCRIPTS],
)
def test_a_benchmark_runs(script: Path) -> None:
    """A peer that is not installed is left out."""
    done = subprocess.run([sys.executable, str(script), "--smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout or "without llama.cpp" in done.stdout
    assert "| nan" not in done.stdout


@pytest.mark.parametrize(("base_width", "expected"), [(64, 64), (None, 128)])
def test_the_learning_rates_of_given_values_need_no_search(
    monkeypatch: pytest.MonkeyPatch, base_width: int | None, expected: int
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = importlib.import_module("mup_learning_rate")
    trained: list[dict[str, Any]] = []

    class Parabola:
        def losses(self, runs: list[dict[str, Any]]) -> list[float]:
            trained.extend(runs := list(runs))
            return [(math.log2(run["values"]["lr"]) + 6) ** 2 for run in runs]

    args = argparse.Namespace(values=[0.2, 7.5, 0.7], base_width=base_width, widths=[128, 256], grid=[-8, -8], seeds=2)
    results = script.sweep(Parabola(), args)
    assert {run["base_width"] for run in trained} == {expected}
    given = {"initializer_range": 0.2, "mup_embeddings_scale": 7.5, "mup_output_alpha": 0.7}
    assert all({**run["values"], "lr": 1} == {**given, "lr": 1} for run in trained)
    by_rate = {-9: [9.0], -8: [4.0], -7: [1.0, 1.0], -6: [0.0, 0.0], -5: [1.0, 1.0]}
    assert results == {name: dict.fromkeys((128, 256), by_rate) for name in ("muP", "standard")}


def test_models_trained_together_are_those_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that a GPU takes as graphs are written anew for it, and must stay those of :func:`btlm.train.train`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bytes_of, together, tiny = map(importlib.import_module, ("byte_stream", "models_together", "tiny_inputs"))

    from btlm.train import Recipe, train
    from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Precision, Schedule, Stage, Watching

    model = {
        "vocab_size": bytes_of.VOCAB_SIZE,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_inner": 85,
    }
    model |= {"bos_token_id": 256, "eos_token_id": 256, "activation_function": "swiglu"}
    model |= {"position_embedding_type": "alibi", "mup_width_scale": 0.5, "mup_embeddings_scale": 4.0}
    recipes = [
        Recipe(
            model=model | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            optimizer=Optimizer(lr=lr, clip_norm=0.5),
            schedule=Schedule(warmup_tokens=512),
            stages=[Stage(64, 256, 2048)],
            micro_batch_tokens=256,
            seed=seed,
            evaluation=Evaluation(every_tokens=4096, tokens_per_source=300),
            checkpoints=Checkpoints(every_steps=100),
            watching=Watching(tensorboard=False),
            precision=Precision(dtype="float32"),
        )
        for lr, seed in ((1e-2, 1), (3e-2, 2))
    ]
    stream = bytes_of.ByteStream([tiny.write_documents(tmp_path)], 20_000)
    losses = together.train_together(recipes, stream, torch.device("cpu"))
    for recipe, loss in zip(recipes, losses, strict=True):
        records = list(train(recipe, stream, tmp_path / str(recipe.seed), bytes_of.token_bytes(), "cpu"))
        assert loss == pytest.approx(records[-1]["bits_per_byte"]["mean"] * math.log(2), rel=1e-6)
        assert loss < records[0]["loss"]
