import builtins
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from btlm.data.shards import TokenShards
from btlm.train import train
from btlm.train.metrics import (
    SPIKE_WINDOW,
    SpikeMonitor,
    matrix_rate,
    open_sinks,
    read_metrics,
    scalars,
    truncate_metrics,
)
from btlm.train.recipe import Watching
from tests.train.tiny import TOKEN_BYTES, tiny_recipe, tiny_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


# Spikes

# Mean 3.0, standard deviation 0.1.
STEADY = [2.9, 3.1] * (SPIKE_WINDOW // 2)


def test_a_spike_is_told_by_its_deviations() -> None:
    monitor = SpikeMonitor(6.0, STEADY)
    assert monitor.check(3.59) is None
    assert SpikeMonitor(6.0, STEADY).check(3.7) == pytest.approx(7.0)
    assert SpikeMonitor(6.0, STEADY).check(1.0) is None, "a falling loss is not a spike"


def test_a_spike_does_not_hide_the_next() -> None:
    monitor = SpikeMonitor(6.0, STEADY)
    found = [monitor.check(9.0) for _ in range(5)]
    assert found[0] == pytest.approx(60.0)
    assert all(deviations is not None and deviations > 30 for deviations in found)


def test_a_lasting_rise_is_no_spike_for_ever() -> None:
    monitor = SpikeMonitor(6.0, STEADY)
    found = [monitor.check(4.0) for _ in range(2 * SPIKE_WINDOW)]
    assert found[0] is not None
    assert found[-1] is None


def test_too_few_losses_tell_nothing() -> None:
    assert SpikeMonitor(6.0, STEADY[:-1]).check(99.0) is None


def test_earlier_spikes_count_as_little_after_a_resume() -> None:
    after = SpikeMonitor(6.0, [*STEADY, 50.0]).check(3.8)
    assert after == SpikeMonitor(6.0, [*STEADY, 9.0]).check(3.8), "however high it was"
    assert after is not None


def test_a_spike_is_recorded(shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeMonitor, "check", lambda _, loss: 8.5 if loss > 5.5 else None)
    records = list(train(tiny_recipe(), shards, tmp_path, TOKEN_BYTES))
    assert [record.get("spike") for record in records] == [8.5, *[None] * 6]


# Metrics


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.5}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert [record["step"] for record in truncate_metrics(tmp_path, 2)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    assert read_metrics(tmp_path / "none") == truncate_metrics(tmp_path / "none", 1) == []


def test_numbers_of_a_record() -> None:
    record = {"step": 3, "loss": 1.5, "bits_per_byte": {"books": 2.0, "mean": 2.5}}
    assert scalars(record) == {"train/loss": 1.5, "bits_per_byte/books": 2.0, "bits_per_byte/mean": 2.5}


# TensorBoard and W&B


def test_tensorboard_has_every_step_once_after_a_resume(
    shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of the same second and process are told apart by this number, and read in the order of their names.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    recipe = tiny_recipe(watching=Watching())
    for record in train(recipe, shards, tmp_path, TOKEN_BYTES):
        if record["step"] == 5:
            break
    records = list(train(recipe, shards, tmp_path, TOKEN_BYTES))
    assert records[0]["step"] == 5, "resumed after step 4"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {record["step"]: record["loss"] for record in read_metrics(tmp_path)}
    assert logged == pytest.approx(expected)
    assert len(events.Scalars("train/loss")) == 7
    assert [event.step for event in events.Scalars("bits_per_byte/mean")] == [3, 6, 7]


def test_weights_and_biases_gets_the_records(
    shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values["train/loss"])), finish=lambda: calls.append(("finish",))
    )

    def init(**options: Any) -> SimpleNamespace:
        calls.append((options["project"], options["config"]["optimizer"]["lr"]))
        return run

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = tiny_recipe(watching=Watching(tensorboard=False, wandb_project="btlm"))
    records = list(train(recipe, shards, tmp_path, TOKEN_BYTES))
    assert calls == [("btlm", 0.02), *((record["step"], record["loss"]) for record in records), ("finish",)]


@pytest.mark.parametrize(
    ("watching", "missing", "message"),
    [
        (
            Watching(),
            "torch.utils.tensorboard",
            r"watching\.tensorboard needs TensorBoard: pip install tensorboard",
        ),
        (Watching(False, "p"), "wandb", r"watching\.wandb_project needs W&B: pip install wandb, or set it to null"),
    ],
)
def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watching: Watching, missing: str, message: str
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=message), open_sinks(tiny_recipe(watching=watching), tmp_path, 0):
        pass


def test_a_cpu_has_no_matrix_rate_and_a_run_on_it_no_mfu(shards: TokenShards, tmp_path: Path) -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32) is None
    assert not any("mfu" in record for record in train(tiny_recipe(), shards, tmp_path, TOKEN_BYTES))


def test_the_matrix_rate_of_a_gpu_is_that_of_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, *(time for i in range(15) for time in (10.0 * i, 10.0 * i + 1 + (i != 7)))])
    monkeypatch.setattr("btlm.train.metrics.time.perf_counter", lambda: next(clock))
    for name in ("linspace", "mm"):
        monkeypatch.setattr(torch, name, lambda *_, **__: torch.zeros(1).expand(8192 * 8192))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    rate = matrix_rate(torch.device("cuda"), torch.bfloat16)
    assert rate == 2 * 8192**3, "one second, the first product only warms up"
