import dataclasses
import json
import re
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.plan import plan as plan_module
from btlm.plan.info import run_info
from btlm.plan.memory import memory_per_device
from btlm.plan.options import Hardware
from btlm.plan.plan import plan as plan_at
from btlm.plan.plan import render, run_plan
from btlm.plan.speed import Speed, _part, measure_speed
from btlm.settings import to_yaml
from btlm.train import Recipe, load_recipe
from btlm.train.loop import train
from btlm.train.recipe import Lora, Parallelism, Precision, Stage, Start
from tests.train.tiny import MODEL, TOKEN_BYTES, tiny_recipe, tiny_shards

ROOT = Path(__file__).parents[2]
BTLM_3B = ROOT / "recipes/btlm-3b.yaml"
PARTS = ("weights", "gradients", "optimizer", "gathered", "activations", "head")
LORA = Lora(rank=4)


def plan(recipe: Recipe, devices: list[int] | None = None) -> dict[str, Any]:
    """The plan for devices of 989 TFLOP/s at an MFU of 0.4."""
    return plan_at(recipe, 0.4 * 989e12, devices)


# BTLM-3B-8k: figures of the paper, its recipes and the model card; FLOPs and days computed by hand


def test_btlm_3b() -> None:
    numbers = plan(load_recipe(BTLM_3B))
    assert numbers["parameters"] == {
        "total": 2_646_255_744,
        "without_embeddings": 2_517_597_824,
        "adapters": 0,
        "trained": 2_646_255_744,
    }
    assert [stage["steps"] for stage in numbers["stages"]] == [119_727, 39_909]
    assert [stage["tokens"] for stage in numbers["stages"]] == [470_785_720_320, 156_928_573_440]
    assert numbers["steps"] == 159_636
    assert numbers["tokens"] == pytest.approx(627.7e9, rel=1e-4)
    assert numbers["flops_by_parameters"] == pytest.approx(9.97e21, rel=1e-3)
    assert numbers["flops"] == pytest.approx(1.11e22, rel=5e-3)
    assert numbers["flops"] == sum(stage["flops"] for stage in numbers["stages"])
    # 1.11e22 FLOPs at 8 x 989e12 x 0.4 per second take 40.6 days.
    days = {row["devices"]: row["days"] for row in numbers["days"]}
    assert days[8] == pytest.approx(40.6, rel=5e-3)
    assert days[480] == pytest.approx(days[8] / 60)
    by_shards = {row["shards"]: row for row in numbers["memory"]}
    # 4, 4 and 8 bytes per parameter for weights, gradients and moments.
    assert [by_shards[1][part] for part in PARTS[:3]] == [10_585_022_976, 10_585_022_976, 21_170_045_952]
    # A single device casts the matrices of one block, and keeps the gradient of the head of 50,257 x 2,560.
    matrices = 4 * 2560 * 2560 + 3 * 2560 * 6826
    assert by_shards[1]["gathered"] == 2 * matrices + 4 * 128_657_920
    assert by_shards[8]["weights"] == 10_585_022_976 / 8


def test_days_follow_the_speed() -> None:
    recipe = load_recipe(BTLM_3B)
    (before,) = plan(recipe, devices=[8])["days"]
    (after,) = plan_at(recipe, 0.2 * 989e12, [32])["days"]
    assert after["days"] == pytest.approx(before["days"] / 2)
    assert (before["micro_batches"], after["micro_batches"]) == (60, 15)


def test_lora_trains_adapters_alone() -> None:
    recipe = tiny_recipe(lora=LORA)
    # Two blocks, rank 4: matrices of 32 + 96, 32 + 32, twice 32 + 44, and 44 + 32.
    adapters = 2 * 4 * (128 + 64 + 76 + 76 + 76)
    numbers = plan(recipe)
    assert numbers["parameters"] == {
        "total": 23_856,
        "without_embeddings": 23_856 - 6_400,
        "adapters": adapters,
        "trained": adapters,
    }
    row = numbers["memory"][0]
    assert [row[part] for part in PARTS[:3]] == [4 * (23_856 + adapters), 4 * adapters, 8 * adapters]
    assert numbers["flops_by_parameters"] == (4 * 23_856 + 6 * adapters) * 448
    # Two products with each of 2 x 8,320 and 6,400 weights, two operations each; three passes of causal attention.
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 44) + 200 * 32
    attention = 2 * 4 * 32 * 17 / 2
    assert numbers["stages"][0]["flops"] == (4 * weights + 3 * attention + 6 * adapters) * 256


def test_more_shards_until_they_make_little_difference() -> None:
    memory = plan(load_recipe(BTLM_3B))["memory"]
    assert [row["shards"] for row in memory] == [2**power for power in range(len(memory))]
    assert all(after["total"] <= 0.95 * before["total"] for before, after in pairwise(memory))
    following = memory_per_device(load_recipe(BTLM_3B), 2 * memory[-1]["shards"])
    assert following["total"] > 0.95 * memory[-1]["total"]
    for row in memory:
        assert row["total"] == sum(row[part] for part in PARTS)
    # Four rows per step, then two: at most two devices can share them.
    assert [row["shards"] for row in plan(tiny_recipe())["memory"]] == [1, 2]


def test_replicas_hold_the_state_several_times() -> None:
    recipe = dataclasses.replace(load_recipe(BTLM_3B), parallelism=Parallelism(4, "bfloat16"))
    rows = plan(recipe)["days"]
    assert [row["devices"] for row in rows] == [4, 8, 16, 32, 80, 160, 480]
    assert [row["shards"] for row in rows] == [1, 2, 4, 8, 20, 40, 120]
    assert rows[1]["memory"] == memory_per_device(recipe, 2)["total"]


def test_a_device_with_less_than_a_micro_batch_needs_less() -> None:
    recipe = tiny_recipe(stages=[Stage(16, 64, 256)], micro_batch_tokens=64)
    row = plan(recipe, devices=[4])["days"][0]
    assert (row["micro_batches"], row["micro_batch_tokens"]) == (1, 16)
    assert row["memory"] == memory_per_device(dataclasses.replace(recipe, micro_batch_tokens=16), 4)["total"]


def test_the_largest_batch_decides_on_micro_batches_and_memory() -> None:
    """A stage of fewer tokens per step needs less; the plan has to fit all of them."""
    stages = [Stage(16, 64, 256), Stage(16, 32, 64), Stage(32, 128, 256)]
    recipe = tiny_recipe(stages=stages, micro_batch_tokens=64)
    (row,) = plan(recipe, devices=[1])["days"]
    assert (row["micro_batches"], row["micro_batch_tokens"]) == (2, 64)
    assert row["memory"] == memory_per_device(recipe, 1)["total"]
    (row,) = plan(recipe, devices=[2])["days"]
    assert (row["micro_batches"], row["micro_batch_tokens"]) == (1, 64)


# Inputs of a plan


def test_nothing_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BTLMConfig(**MODEL).save_pretrained(tmp_path)  # a folder without weights

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan builds nothing")

    monkeypatch.setattr(nn.Module, "__init__", forbidden)
    monkeypatch.setattr(torch.UntypedStorage, "__new__", forbidden)
    for name in ("empty", "zeros", "tensor", "randn", "load"):
        monkeypatch.setattr(torch, name, forbidden)
    assert plan(load_recipe(BTLM_3B))["steps"] == 159_636
    started = Recipe(
        **{field.name: getattr(tiny_recipe(), field.name) for field in dataclasses.fields(Recipe)}
        | {"model": {}, "start": Start(str(tmp_path)), "lora": LORA}
    )
    numbers = plan(started)
    assert numbers["parameters"] == plan(tiny_recipe(lora=LORA))["parameters"]


@pytest.mark.parametrize("count", [3, 5])
def test_devices_that_cannot_share_the_batches_are_named(count: int) -> None:
    problem = rf"^devices has {count}, which cannot share the batches of the recipe evenly; give some of 1, 2\.$"
    with pytest.raises(ValueError, match=problem):
        plan(tiny_recipe(), devices=[1, count])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"mfu": 0.0}, "mfu is 0.0, not a number above 0 and at most 1"),
        ({"mfu": 40.0}, "mfu is 40.0, not a number"),
        ({"mfu": float("nan")}, "mfu is nan, not a number"),
        ({"peak_tflops": -989}, "peak_tflops is -989, not a number above 0"),
        ({"peak_tflops": 9.89e14}, "peak_tflops is 989000000000000.0, not a number"),
        ({"devices": [0]}, "devices is [0], not a list"),
        ({"devices": []}, "devices is [], not a list"),
        ({"hardware": "h1000"}, "hardware is 'h1000', not one of a100, h100, h200"),
        ({"mfu": 0.3}, "mfu is a share of a peak; give hardware or peak_tflops, too."),
        ({"hardware": "h100", "peak_tflops": 1.0}, "hardware and peak_tflops both give the peak of a device; leave"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Hardware(**values)


# This machine and others


def test_the_plan_is_for_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(plan_module, "measure_speed", lambda *_: Speed(1e15, "abacus", 4, 2, 8192))
    run_plan(BTLM_3B)
    text = capsys.readouterr().out
    # 1.11e22 FLOPs at 1e15 per second take 128 days; this machine has four devices.
    days = re.findall(r"^  (\d+) +\d+ .* (\d+)(?:\.\d)? days", text, re.MULTILINE)
    assert days == [("1", "128"), ("2", "64"), ("4", "32")]
    words = " ".join(text.split())
    assert "measured on this machine (abacus): 1.00 PFLOP/s per device in passes of 2 blocks on 8,192 tokens" in words
    assert "H100" not in text


def test_errors_come_before_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "measure_speed", None)
    with pytest.raises(ValueError, match=r"^devices has 7, which cannot share"):
        run_plan(BTLM_3B, Hardware(devices=[7]))


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_speed_is_that_of_passes_of_the_model(monkeypatch: pytest.MonkeyPatch, lora: Lora | None) -> None:
    recipe = tiny_recipe(lora=lora)
    clock = iter([0.0, 1.0, 100.0, 104.0, 200.0, 202.0, 300.0, 308.0])
    monkeypatch.setattr("btlm.plan.speed.time.process_time", lambda: next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    speed = measure_speed(recipe, "cpu")
    # The fastest pass after the first took two seconds of processor time on four threads: half a second.
    flops = 16 * plan(recipe)["stages"][0]["flops"] / 256
    assert speed.flops_per_s == pytest.approx(flops / 0.5)
    assert speed[1:] == ("CPU, 4 threads", 1, 2, 16)


def test_a_large_model_is_measured_by_a_part_of_it() -> None:
    recipe = load_recipe(BTLM_3B)
    part, length = _part(recipe, on_gpu=False)
    assert (part.config.n_layer, part.config.n_embd, part.precision) == (1, 2560, Precision("bfloat16", True, False))
    assert part.config.flops_per_token(length, training=True) * length == pytest.approx(5e11, rel=0.03)
    assert part.config.mup_width_scale == 0.1
    part, length = _part(load_recipe(ROOT / "recipes/btlm-tiny.yaml"), on_gpu=False)
    assert (part.config.n_layer, length) == (6, 2048), "the whole model"
    part, length = _part(recipe, on_gpu=True)
    assert (part.config.n_layer, length) == (4, 2048)


def test_replicas_have_to_share_the_rows() -> None:
    with pytest.raises(ValueError, match=r"^parallelism\.replicate is 3, but the steps have 2 rows to share; give a "):
        plan(tiny_recipe(parallelism=Parallelism(3)))
    with pytest.raises(ValueError, match=r"^devices has 1, which .*; give some of 2\.$"):
        plan(tiny_recipe(parallelism=Parallelism(2)), devices=[1])


@pytest.mark.parametrize("targets", [("wte",), ("c_attn", "lm_head"), ("attn",), ("fc",)])
def test_adapters_of_other_matrices(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^lora\.target_modules are {', '.join(targets)}; a plan counts "):
        plan(tiny_recipe(lora=Lora(target_modules=targets)))


def test_a_target_of_other_activations_is_passed_over() -> None:
    both, one = (
        plan(tiny_recipe({"activation_function": "gelu"}, lora=Lora(target_modules=targets)))
        for targets in (("c_fc", "c_fc2"), ("c_fc",))
    )
    assert both == one


# Tables


def rendered(name: str, numbers: dict[str, Any]) -> str:
    output = StringIO()
    Console(width=80, file=output).print(render(name, numbers))
    return output.getvalue()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_of_shipped_recipes_fit_80_columns(path: Path) -> None:
    recipe = load_recipe(path)
    if recipe.start is not None:  # its model is not in the repository
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
        recipe = Recipe(**fields | {"start": None, "model": load_recipe(BTLM_3B).model | recipe.model})
    text = rendered(path.name, plan(recipe))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    # Every row of a table is one line.
    assert [line.split()[0] for line in lines if " shard" in line and "GB" in line] == [
        f"{row['shards']:,}" for row in plan(recipe)["memory"] if row["total"] >= 1e9
    ]


def test_tables_hold_the_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run_plan(BTLM_3B, Hardware("h100"))
    text = capsys.readouterr().out
    for part in (
        "btlm-3b.yaml",
        "2,646,255,744 parameters, 2,517,597,824 without",
        "159,636",
        "628 B  1.11e+22",
        "tokens is 9.97e+21",
        "10.6 GB   10.6 GB   21.2 GB",
        "assumptions: MFU 0.4 at any number of devices, and a peak of 989 TFLOP/s each",
        "(dense bf16 products on an H100 SXM, NVIDIA's data sheet)",
        "block inputs are kept, the rest is recomputed",
        "40.5 days",
        "16.2 hours",
    ):
        assert part in text
    run_plan(BTLM_3B, Hardware(None, 312.0, 0.5, [40]), {"micro_batch_tokens": 16_384})
    text = capsys.readouterr().out
    assert "assumptions: MFU 0.5 at any number of devices, and a peak of 312 TFLOP/s each" in text
    assert "H100" not in text
    assert "16,384 tokens per micro-batch" in text


def test_tables_of_variants() -> None:
    text = rendered("r", plan(tiny_recipe(lora=LORA, precision=Precision("float32"), parallelism=Parallelism(2))))
    for part in (
        "more in adapters, the only ones that are trained",
        "(4 x frozen + 6 x trained parameters) x tokens",
        "2 replicas: devices are that many times the shards",
        " seconds",
    ):
        assert part in text
    assert "recomputed" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("lora", [None, LORA])
def test_training_plan_and_info_count_the_same_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lora: Lora | None
) -> None:
    monkeypatch.setattr("btlm.train.loop.matrix_rate", lambda *_: 1.0)  # so that MFU is FLOPs over seconds
    values: dict[str, Any] = {"stages": [Stage(16, 64, 64), Stage(32, 64, 64)]}
    if lora is not None:
        BTLMLMHeadModel(BTLMConfig(**MODEL)).save_pretrained(tmp_path / "base")
        values |= {"model": {}, "start": Start(str(tmp_path / "base")), "lora": lora}
    recipe = dataclasses.replace(tiny_recipe(), **values)
    records = list(train(recipe, tiny_shards(tmp_path / "shards"), tmp_path / "run", TOKEN_BYTES))
    by_training = [record["mfu"] / record["tokens_per_s"] for record in records]
    by_plan = [stage["flops"] / stage["tokens"] for stage in plan(recipe)["stages"]]
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    run_info(tmp_path / "recipe.yaml", as_json=True)
    info = json.loads(capsys.readouterr().out)["flops_per_token"][-1]  # at the whole context, 32 tokens
    assert by_training == pytest.approx(by_plan)
    assert info["training"] == by_plan[-1]
    # By hand: six operations per trained weight, four per frozen one, and causal attention three times.
    weights, attention = 2 * (4 * 32 * 32 + 3 * 32 * 44) + 200 * 32, 2 * 4 * 32 * 33 / 2
    adapters = 2 * 4 * (128 + 64 + 76 + 76 + 76)
    expected = 6 * weights if lora is None else 4 * weights + 6 * adapters
    assert by_plan[-1] == expected + 3 * attention
