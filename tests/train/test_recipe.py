import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from btlm.train import Recipe, load_recipe
from btlm.train.recipe import Optimizer, Stage
from tests.train.tiny import MODEL, tiny_recipe

ROOT = Path(__file__).parents[2]
RAW: dict[str, Any] = {
    "model": MODEL,
    "optimizer": {"lr": 0.01, "warmup_tokens": 100},
    "stages": [
        {"sequence_length": 16, "batch_tokens": 64, "tokens": 640},
        {"sequence_length": 32, "batch_tokens": 128, "tokens": 640},
    ],
    "micro_batch_tokens": 32,
}


def write(folder: Path, raw: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def problems(folder: Path, raw: object) -> list[str]:
    """What load_recipe finds, without the name of the file and the full stop."""
    path = write(folder, raw)
    with pytest.raises(ValueError, match=rf"^{path}: ") as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{path}: ")[:-1].split("; ")


# What a recipe says


def test_a_recipe_holds_what_the_file_says(tmp_path: Path) -> None:
    raw = RAW | {
        "seed": 0,
        "eval_every_tokens": 7,
        "eval_tokens_per_source": 8,
        "checkpoint_every_steps": 9,
        "optimizer": {
            "lr": 0.01,
            "warmup_tokens": 0,
            "final_lr_ratio": 0,
            "betas": [0.8, 0.9],
            "eps": 1e-6,
            "weight_decay": 0.0,
            "clip_norm": 2,
        },
    }
    assert load_recipe(str(write(tmp_path, raw))) == Recipe(
        model=MODEL,
        optimizer=Optimizer(0.01, 0, 0, (0.8, 0.9), 1e-6, 0.0, 2),
        stages=[Stage(16, 64, 640), Stage(32, 128, 640)],
        micro_batch_tokens=32,
        seed=0,
        eval_every_tokens=7,
        eval_tokens_per_source=8,
        checkpoint_every_steps=9,
    )


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RAW))
    assert recipe.optimizer == Optimizer(0.01, 100, 0.0085, (0.9, 0.95), 1e-8, 0.1, 1.0)
    assert (recipe.micro_batch_tokens, recipe.seed) == (32, 1)
    assert recipe.config.n_embd == 32


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.total_tokens == sum(stage.tokens for stage in recipe.stages), "no part of a step is dropped"
    assert recipe.lr_factor(recipe.total_tokens) == pytest.approx(recipe.optimizer.final_lr_ratio)


def test_only_whole_steps_are_counted() -> None:
    recipe = tiny_recipe(stages=[Stage(16, 64, 64 * 4 + 63), Stage(32, 64, 64 * 3 + 1)])
    assert [stage.steps for stage in recipe.stages] == [4, 3]
    assert (recipe.total_steps, recipe.total_tokens) == (7, 64 * 7)


# BTLM-3B-8k: the figures of the paper and the model card


def test_btlm_3b() -> None:
    recipe = load_recipe(ROOT / "recipes/btlm-3b.yaml")
    first, second = recipe.stages
    assert (first.steps, recipe.total_steps) == (119_727, 159_636)
    assert first.batch_tokens == 1920 * first.sequence_length == second.batch_tokens == 480 * second.sequence_length
    assert recipe.optimizer.warmup_tokens == 95 * 3_932_160
    assert recipe.total_tokens == pytest.approx(627.7e9, rel=1e-4)
    assert first.tokens / recipe.total_tokens == pytest.approx(0.75, abs=1e-4)
    config = recipe.config
    assert config.num_parameters() == 2_646_255_744
    flops = [config.flops_per_token(s.sequence_length, training=True) * s.tokens for s in recipe.stages]
    assert sum(flops) == pytest.approx(1.11e22, rel=0.005)
    assert recipe.optimizer.lr * recipe.lr_factor(recipe.total_tokens) == pytest.approx(1.02e-4)


def test_schedule_of_btlm_3b() -> None:
    recipe = load_recipe(ROOT / "recipes/btlm-3b.yaml")
    for step in (1, 2, 50, 94, 95):
        assert recipe.lr_factor(step * 3_932_160) == pytest.approx(step / 95)
    # 159,541 steps down in one line; 119,727 is the last at 2,048 tokens a row.
    for step in (95, 96, 10_000, 119_726, 119_727, 119_728, 159_635, 159_636):
        assert recipe.lr_factor(step * 3_932_160) == pytest.approx(1 - (1 - 0.0085) * (step - 95) / 159_541)


# The schedule


def test_one_schedule_over_all_stages() -> None:
    recipe = tiny_recipe(
        optimizer=Optimizer(lr=1.0, warmup_tokens=128, final_lr_ratio=0.1),
        stages=[Stage(16, 64, 256), Stage(32, 128, 384)],
    )
    ends = [64, 128, 192, 256, 384, 512, 640]
    expected = [0.5, 1.0, *(1 - 0.9 * (end - 128) / 512 for end in ends[2:])]
    assert [recipe.lr_factor(end) for end in ends] == pytest.approx(expected)
    assert recipe.lr_factor(640) == pytest.approx(0.1)


def test_schedule_without_warm_up_and_of_warm_up_alone() -> None:
    stages = [Stage(16, 64, 640)]
    without = tiny_recipe(optimizer=Optimizer(lr=1.0, warmup_tokens=0, final_lr_ratio=0.0), stages=stages)
    assert [without.lr_factor(end) for end in (64, 320, 640)] == pytest.approx([0.9, 0.5, 0.0])
    for warmup in (640, 1280):
        alone = tiny_recipe(optimizer=Optimizer(lr=1.0, warmup_tokens=warmup), stages=stages)
        assert [alone.lr_factor(end) for end in (64, 640)] == pytest.approx([64 / warmup, 640 / warmup])


# Problems

CHANGES: list[tuple[str, Any, str]] = [
    # path to the key, its value, the problem
    ("colour", "red", "colour is not a key of a recipe"),
    ("optimizer.colour", 1, "optimizer.colour is not a key of a recipe"),
    ("stages.1.colour", 1, "stages[1].colour is not a key of a recipe"),
    ("model.colour", 1, "model.colour is not a key of BTLM's configuration"),
    ("model.7", 1, "model.7 is not a key of BTLM's configuration"),
    ("model", None, "model is None, not a mapping"),
    ("model", ["n_embd"], "model is ['n_embd'], not a mapping"),
    ("model.n_embd", 33, "Invalid BTLM configuration: n_head is 4, which does not divide n_embd (33)"),
    ("model.n_embd", "32", "Invalid BTLM configuration: n_embd is '32', not a positive whole number"),
    ("optimizer", 3, "optimizer is 3, not a mapping"),
    ("optimizer", [1], "optimizer is [1], not a mapping"),
    ("optimizer.lr", -1.0, "optimizer.lr is -1.0, not a number of at least 0"),
    ("optimizer.lr", float("nan"), "optimizer.lr is nan, not a number of at least 0"),
    ("optimizer.lr", float("inf"), "optimizer.lr is inf, not a number of at least 0"),
    ("optimizer.lr", True, "optimizer.lr is True, not a number of at least 0"),
    ("optimizer.lr", None, "optimizer.lr is None, not a number of at least 0"),
    (
        "optimizer.eps",
        "1e-8",
        "optimizer.eps is '1e-8', not a number of at least 0 (YAML takes 1e-3 for text: write 1.0e-3)",
    ),
    ("optimizer.warmup_tokens", -1, "optimizer.warmup_tokens is -1, not a whole number of at least 0"),
    ("optimizer.warmup_tokens", 0.5, "optimizer.warmup_tokens is 0.5, not a whole number of at least 0"),
    *(
        ("optimizer.betas", betas, f"optimizer.betas is {betas!r}, not two numbers in [0, 1)")
        for betas in (0.9, [0.9], [0.9, 1.0], [0.9, -0.1], [0.9, 0.95, 0.99], ["0.9", 0.95], None)
    ),
    ("stages", None, "stages is None, not a list of stages"),
    ("stages", [], "stages is [], not a list of stages"),
    ("stages", {"tokens": 1}, "stages is {'tokens': 1}, not a list of stages"),
    ("stages.0", "long", "stages[0] is 'long', not a mapping"),
    ("stages.0.batch_tokens", 0, "stages[0].batch_tokens is 0, not a whole number of at least 1"),
    ("stages.0.sequence_length", 1, "stages[0].sequence_length is 1, not a whole number of at least 2"),
    ("stages.0.sequence_length", 16.0, "stages[0].sequence_length is 16.0, not a whole number of at least 2"),
    ("stages.0.sequence_length", "16", "stages[0].sequence_length is '16', not a whole number of at least 2"),
    ("stages.0.tokens", -640, "stages[0].tokens is -640, not a whole number of at least 1"),
    ("stages.0.tokens", 63, "stages[0].batch_tokens (64) is more than its tokens (63)"),
    ("stages.1.batch_tokens", 144, "stages[1].batch_tokens (144) is no multiple of sequence_length (32)"),
    ("micro_batch_tokens", 128, "stages[0].batch_tokens (64) is no multiple of micro_batch_tokens (128)"),
    ("micro_batch_tokens", 0, "micro_batch_tokens is 0, not a whole number of at least 1"),
    ("micro_batch_tokens", "8k", "micro_batch_tokens is '8k', not a whole number of at least 1"),
    ("seed", "one", "seed is 'one', not a whole number of at least 0"),
    ("seed", -1, "seed is -1, not a whole number of at least 0"),
    ("seed", True, "seed is True, not a whole number of at least 0"),
    ("seed", None, "seed is None, not a whole number of at least 0"),
    ("eval_every_tokens", 0, "eval_every_tokens is 0, not a whole number of at least 1"),
    ("eval_tokens_per_source", -5, "eval_tokens_per_source is -5, not a whole number of at least 1"),
    ("checkpoint_every_steps", 0, "checkpoint_every_steps is 0, not a whole number of at least 1"),
    ("source_weights", {"books": 1}, "source_weights is not a key of a recipe"),
]


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(RAW)
    at: Any = raw
    *parents, last = path.split(".")
    for key in parents:
        at = at[int(key) if key.isdigit() else key]
    at[int(last) if last.isdigit() else last] = value
    return raw


@pytest.mark.parametrize(("path", "value", "problem"), CHANGES, ids=lambda part: str(part)[:40])
def test_a_problem_is_named(tmp_path: Path, path: str, value: Any, problem: str) -> None:
    assert problem in problems(tmp_path, changed(path, value))


def test_lengths_have_to_divide_the_longest(tmp_path: Path) -> None:
    raw = changed("stages.0", {"sequence_length": 24, "batch_tokens": 96, "tokens": 960})
    assert problems(tmp_path, raw) == ["stages[0].sequence_length (24) does not divide 32"]


@pytest.mark.parametrize("path", ["model", "optimizer", "stages"])
def test_a_missing_key_is_named(tmp_path: Path, path: str) -> None:
    assert problems(tmp_path, {key: value for key, value in RAW.items() if key != path}) == [f"{path} is missing"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    raw = {
        "colour": "red",
        "model": MODEL | {"n_head": 5, "vocab_size": 0, "shape": "round"},
        "optimizer": {"lr": -1.0, "momentum": 0.9},
        "stages": [
            {"sequence_length": 24, "batch_tokens": 100, "tokens": 1000},
            {"sequence_length": 32, "batch_tokens": 128},
            "the end",
            {"sequence_length": 64, "batch_tokens": 128, "tokens": 64, "lr": 1},
            {"sequence_length": 64, "batch_tokens": 128, "tokens": 64},
        ],
        "micro_batch_tokens": 48,
        "seed": "one",
    }
    assert sorted(problems(tmp_path, raw)) == sorted(
        [
            "colour is not a key of a recipe",
            "model.shape is not a key of BTLM's configuration",
            "Invalid BTLM configuration: vocab_size is 0, not a positive whole number",
            "n_head is 5, which does not divide n_embd (32)",
            "optimizer.momentum is not a key of a recipe",
            "optimizer.warmup_tokens is missing",
            "optimizer.lr is -1.0, not a number of at least 0",
            "stages[0].batch_tokens (100) is no multiple of sequence_length (24)",
            "stages[0].batch_tokens (100) is no multiple of micro_batch_tokens (48)",
            "stages[0].sequence_length (24) does not divide 64",
            "stages[1].tokens is missing",
            "stages[2] is 'the end', not a mapping",
            "stages[3].lr is not a key of a recipe",
            "stages[4].batch_tokens (128) is no multiple of micro_batch_tokens (48)",
            "stages[4].batch_tokens (128) is more than its tokens (64)",
            "seed is 'one', not a whole number of at least 0",
        ]
    )


@pytest.mark.parametrize("raw", [None, [], "recipe", 3])
def test_a_file_without_keys_is_an_error(tmp_path: Path, raw: object) -> None:
    assert problems(tmp_path, raw) == [f"the content is {raw!r}, not a mapping"]


@pytest.mark.parametrize("content", [b"model: {", b"a: b: c", b"\xff\xfe", b"model: !!python/object:x.y {}"])
def test_a_file_that_is_no_yaml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is not a readable recipe: [^\n]+\.$") as caught:
        load_recipe(path)
    assert type(caught.value) is ValueError


def test_a_recipe_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml is not a readable recipe: .*No such file"):
        load_recipe(tmp_path / "nothing.yaml")
