import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from btlm.checkpoint.locate import checkpoint_folder
from btlm.model import BTLMConfig
from btlm.settings import plain, to_yaml
from btlm.train import Recipe, load_recipe
from btlm.train.recipe import (
    Checkpoints,
    Data,
    Evaluation,
    Lora,
    Optimizer,
    Parallelism,
    Precision,
    Schedule,
    Stage,
    Start,
    Watching,
)
from tests.train.tiny import MODEL, tiny_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
RAW: dict[str, Any] = {
    "model": MODEL,
    "optimizer": {"lr": 0.01},
    "schedule": {"warmup_tokens": 100},
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


def problems(folder: Path, raw: object, changes: dict[str, Any] | None = None) -> list[str]:
    """The problems that load_recipe reports, without the name of the file and the full stop."""
    path = write(folder, raw)
    with pytest.raises(ValueError, match=rf"^{path}: ") as caught:
        load_recipe(path, changes)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message.removeprefix(f"{path}: ")[:-1].split("; ")


# Reading a recipe

# Every key is set, and none to its default.
EVERY_KEY: dict[str, Any] = {
    "optimizer": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-12, "weight_decay": 0.0, "clip_norm": 2},
    "schedule": {"warmup_tokens": 64, "final_lr_ratio": 1e-22, "decay": "cosine", "start_tokens": 7},
    "stages": [{"sequence_length": 16, "batch_tokens": 64, "tokens": 640}],
    "model": {"n_positions": 64, "alibi_scaling": {"type": "linear", "factor": 2.0}, "attn_pdrop": 1e-7},
    "start": {"model": "1e-3"},
    "lora": {"rank": 3, "alpha": 1e16, "dropout": 0.125, "target_modules": ["c_attn", "null"]},
    "micro_batch_tokens": 32,
    "seed": 0,
    "data": {"mask_documents": True},
    "precision": {"dtype": "float32", "activation_checkpointing": True, "compile": True},
    "parallelism": {"replicate": 2, "gather_dtype": "float32"},
    "evaluation": {"every_tokens": 7, "tokens_per_source": 8},
    "checkpoints": {"every_steps": 9, "keep_last": 4, "keep_every_steps": 90},
    "watching": {"tensorboard": False, "wandb_project": "Versuch ü", "spike_deviations": 4.5},
}
EVERYTHING = Recipe(
    optimizer=Optimizer(1e-3, (0.8, 0.99), 1e-12, 0.0, 2),
    schedule=Schedule(64, 1e-22, "cosine", 7),
    stages=[Stage(16, 64, 640)],
    model={"n_positions": 64, "alibi_scaling": {"type": "linear", "factor": 2.0}, "attn_pdrop": 1e-7},
    start=Start("1e-3"),
    lora=Lora(3, 1e16, 0.125, ("c_attn", "null")),
    micro_batch_tokens=32,
    seed=0,
    data=Data(mask_documents=True),
    precision=Precision("float32", activation_checkpointing=True, compile=True),
    parallelism=Parallelism(2, "float32"),
    evaluation=Evaluation(7, 8),
    checkpoints=Checkpoints(9, 4, 90),
    watching=Watching(tensorboard=False, wandb_project="Versuch ü", spike_deviations=4.5),
)


def test_a_recipe_holds_what_the_file_says(tmp_path: Path) -> None:
    assert load_recipe(str(write(tmp_path, EVERY_KEY))) == EVERYTHING


def test_defaults_are_those_of_the_paper(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, RAW))
    assert recipe.optimizer == Optimizer(0.01, (0.9, 0.95), 1e-8, 0.1, 1.0)
    assert recipe.schedule == Schedule(100, 0.0085, "linear", 0)
    assert (recipe.seed, recipe.data.mask_documents) == (1, False)
    assert recipe.precision == Precision("bfloat16", activation_checkpointing=False, compile=False)
    assert recipe.config.n_embd == 32


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.total_tokens == sum(stage.tokens for stage in recipe.stages), "no part of a step is dropped"
    assert recipe.lr_factor(recipe.total_tokens) == pytest.approx(recipe.schedule.final_lr_ratio)
    assert recipe.evaluation.every_tokens % recipe.stages[0].batch_tokens == 0
    if recipe.start is None:
        assert recipe.config.n_positions >= max(stage.sequence_length for stage in recipe.stages)


def test_what_the_shipped_recipes_are_for() -> None:
    recipes = {path.stem: load_recipe(path) for path in SHIPPED}
    assert {name for name, recipe in recipes.items() if recipe.start} == {"continue", "finetune-32k", "lora"}
    assert {name for name, recipe in recipes.items() if recipe.lora} == {"lora"}
    long = recipes["finetune-32k"]
    # The factor of position interpolation is the new context divided by the training context of 8,192 (model card).
    assert long.model["alibi_scaling"] == {"type": "linear", "factor": 32_768 / 8192}
    assert long.model["n_positions"] == long.stages[0].sequence_length == 32_768
    multipliers = ("initializer_range", "mup_embeddings_scale", "mup_output_alpha")
    # The proxies begin with BTLM-3B's values at their own width; btlm-tiny has those found at its proxy's width.
    for name, width in (("btlm-proxy-40m", 256), ("btlm-tiny-proxy", 128)):
        assert recipes[name].config.n_embd == recipes[name].mup_base_width == width
        assert recipes[name].config.mup_width_scale == 1.0
        for key in multipliers:
            assert getattr(recipes[name].config, key) == getattr(recipes["btlm-3b"].config, key)
    tiny = recipes["btlm-tiny"]
    assert (tiny.config.n_embd, tiny.mup_base_width, tiny.config.mup_width_scale) == (256, 128, 0.5)
    assert [getattr(tiny.config, key) for key in multipliers] == [0.0815, 4.03, 1.311]
    # 40 M parameters, 800 M tokens: the nearest published proxy (Cerebras-GPT).
    assert recipes["btlm-proxy-40m"].total_tokens == pytest.approx(800e6, rel=1e-3)


def test_only_whole_steps_are_counted() -> None:
    recipe = tiny_recipe(stages=[Stage(16, 64, 64 * 4 + 63), Stage(32, 64, 64 * 3 + 1)])
    assert [stage.steps for stage in recipe.stages] == [4, 3]
    assert (recipe.total_steps, recipe.total_tokens) == (7, 64 * 7)


# BTLM-3B-8k: the figures of the paper and the model card


def test_btlm_3b() -> None:
    recipe = load_recipe(ROOT / "recipes/btlm-3b.yaml")
    first, second = recipe.stages
    assert (first.steps, recipe.total_steps) == (119_727, 159_636)
    assert (first.sequence_length, second.sequence_length) == (2048, 8192)
    assert first.batch_tokens == 1920 * 2048 == second.batch_tokens == 480 * 8192
    assert recipe.schedule == Schedule(95 * 3_932_160, 0.0085, "linear", 0)
    assert recipe.optimizer == Optimizer(0.012, (0.9, 0.95), 1e-8, 0.1, 1.0)
    assert recipe.seed == 1
    assert recipe.data.mask_documents is False
    assert recipe.precision.dtype == "bfloat16"
    assert recipe.evaluation.every_tokens == recipe.checkpoints.every_steps * 3_932_160 == 200 * 3_932_160
    assert recipe.total_tokens == pytest.approx(627.7e9, rel=1e-4)
    assert first.tokens == pytest.approx(470.8e9, rel=1e-4)
    config = recipe.config
    assert config.num_parameters() == 2_646_255_744
    flops = [config.flops_per_token(s.sequence_length, training=True) * s.tokens for s in recipe.stages]
    assert sum(flops) == pytest.approx(1.11e22, rel=0.005)
    assert recipe.optimizer.lr * recipe.lr_factor(recipe.total_tokens) == pytest.approx(1.02e-4)


def test_configuration_of_btlm_3b() -> None:
    config = load_recipe(ROOT / "recipes/btlm-3b.yaml").config
    released = {
        "vocab_size": 50257,
        "n_positions": 8192,
        "n_embd": 2560,
        "n_layer": 32,
        "n_head": 32,
        "n_inner": 6826,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.073,
        "mup_width_scale": 0.1,
        "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True,
        "alibi_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    assert {key: getattr(config, key) for key in released} == released


def test_schedule_of_btlm_3b() -> None:
    recipe = load_recipe(ROOT / "recipes/btlm-3b.yaml")
    for step in (1, 2, 50, 94, 95):
        assert recipe.lr_factor(step * 3_932_160) == pytest.approx(step / 95)
    # The learning rate falls linearly over 159,541 steps; step 119,727 is the last one with 2,048 tokens per row.
    for step in (95, 96, 10_000, 119_726, 119_727, 119_728, 159_635, 159_636):
        assert recipe.lr_factor(step * 3_932_160) == pytest.approx(1 - (1 - 0.0085) * (step - 95) / 159_541)


# The schedule


def factors(schedule: Schedule, ends: list[int], stages: list[Stage] | None = None) -> list[float]:
    recipe = tiny_recipe(schedule=schedule, stages=stages or [Stage(16, 64, 256), Stage(32, 128, 384)])
    return [recipe.lr_factor(end) for end in ends]


ENDS = [64, 128, 192, 256, 384, 512, 640]


def test_one_line_over_all_stages() -> None:
    # From 128 to 640 tokens: 512 tokens, of which every 64 take an eighth of 1 - 0.2.
    expected = [0.5, 1.0, 0.9, 0.8, 0.6, 0.4, 0.2]
    assert factors(Schedule(128, 0.2), ENDS) == pytest.approx(expected)


def test_half_a_cosine() -> None:
    # Half way (384) lies in the middle of 1 and 0.2; a quarter of the way (256) at 0.6 + 0.4 * sqrt(1/2).
    root = math.sqrt(0.5)
    found = factors(Schedule(128, 0.2, "cosine"), [64, 128, 256, 384, 512, 640])
    assert found == pytest.approx([0.5, 1.0, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root, 0.2])


def test_constant_after_warm_up() -> None:
    assert factors(Schedule(128, 0.2, "constant"), ENDS) == [0.5, *[1.0] * 6]


def test_schedule_without_warm_up_and_of_warm_up_alone() -> None:
    stages = [Stage(16, 64, 640)]
    assert factors(Schedule(0, 0.0), [64, 320, 640], stages) == pytest.approx([0.9, 0.5, 0.0])
    assert factors(Schedule(640, 0.0), [64, 320, 639, 640], stages) == pytest.approx([0.1, 0.5, 639 / 640, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # A model has seen 1,280 tokens and sees 640 more. If the schedule is resumed, its line goes from 128 to 1,920
        # tokens.
        (Schedule(128, 0.0, start_tokens=1280), [1 - 1216 / 1792, 1 - 1472 / 1792, 0.0]),
        (Schedule(128, 0.0, "cosine", 1280), [(1 + math.cos(math.pi * t / 1792)) / 2 for t in (1216, 1472, 1792)]),
        (Schedule(128, 0.0, "constant", 1280), [1.0, 1.0, 1.0]),
        # In the middle of its warm-up: 100 of 228 tokens.
        (Schedule(228, 0.0, start_tokens=100), [164 / 228, 1 - 192 / 512, 0.0]),
        # Restarted, it begins with the warm-up.
        (Schedule(128, 0.0), [0.5, 1 - 192 / 512, 0.0]),
    ],
)
def test_a_schedule_resumed_and_restarted(schedule: Schedule, expected: list[float]) -> None:
    assert factors(schedule, [64, 320, 640]) == pytest.approx(expected, abs=1e-12)


# muP from a base width

NO_SCALE = {key: value for key, value in MODEL.items() if key != "mup_width_scale"}


@pytest.mark.parametrize(("base", "width_scale"), [(8, 0.25), (32, 1.0), (64, 2.0)])
def test_width_scale_is_base_width_over_width(tmp_path: Path, base: int, width_scale: float) -> None:
    recipe = load_recipe(write(tmp_path, RAW | {"model": NO_SCALE, "mup_base_width": base}))
    assert recipe.config.mup_width_scale == width_scale
    assert "mup_width_scale" not in recipe.model, "the content of the file is not changed"
    assert recipe == load_recipe(write(tmp_path, plain(recipe)))


def test_base_width_and_width_scale_may_agree(tmp_path: Path) -> None:
    raw = RAW | {"model": NO_SCALE | {"mup_width_scale": 0.3333333}, "mup_base_width": 32}
    raw["model"] |= {"n_embd": 96}
    assert load_recipe(write(tmp_path, raw)).config.mup_width_scale == 1 / 3


# Writing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_written_and_read_back(tmp_path: Path, path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_everything_is_written_and_read_back(tmp_path: Path) -> None:
    for section in dataclasses.fields(EVERYTHING):
        value = getattr(EVERYTHING, section.name)
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                if item.name == "gather_dtype":  # bf16 does not go with fp32 products; btlm-3b.yaml has it
                    continue
                assert getattr(value, item.name) != item.default, f"{section.name}.{item.name} tests nothing"
        elif section.name != "mup_base_width":  # which does not go with a start
            assert value != section.default, f"{section.name} tests nothing"
    text = to_yaml(EVERYTHING)
    (tmp_path / "again.yaml").write_text(text, encoding="ascii")
    assert load_recipe(tmp_path / "again.yaml") == EVERYTHING
    assert plain(EVERYTHING) == yaml.safe_load(text) == EVERY_KEY | {"mup_base_width": None}
    assert list(yaml.safe_load(text)) == [item.name for item in dataclasses.fields(Recipe)], "in the order of the class"


@pytest.mark.parametrize("value", [1e-8, 1e-5, 1.5e-7, 0.1, 1 / 3, 5e-324, 1e16, 1e22, 1.7e308, 12.0, 0.0, 3])
def test_numbers_are_read_back_as_the_same_numbers(tmp_path: Path, value: float) -> None:
    recipe = tiny_recipe(optimizer=Optimizer(lr=value, eps=value))
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    again = load_recipe(tmp_path / "again.yaml").optimizer
    assert (again.lr, again.eps) == (value, value)
    assert type(again.lr) is type(value)


# Changes on top of the file


def test_changes_by_dotted_key(tmp_path: Path) -> None:
    changes = {
        "seed": 3,
        "optimizer.lr": 1.0,
        "precision.compile": True,  # a section that the file lacks
        "model.alibi_scaling.factor": 3.0,  # two levels that the file has not
        "model.alibi_scaling.type": "linear",
        "stages": [{"sequence_length": 32, "batch_tokens": 32, "tokens": 320}],
    }
    changed = load_recipe(write(tmp_path, RAW), changes)
    assert changed == dataclasses.replace(
        load_recipe(write(tmp_path, RAW)),
        seed=3,
        optimizer=Optimizer(1.0),
        precision=Precision(compile=True),
        model=MODEL | {"alibi_scaling": {"factor": 3.0, "type": "linear"}},
        stages=[Stage(32, 32, 320)],
    )


def test_a_section_that_a_written_recipe_left_empty_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny_recipe()))
    assert "start: null" in path.read_text()
    recipe = load_recipe(path, {"start.model": "folder", "lora.rank": 2, "model": {}})
    assert (recipe.start, recipe.lora) == (Start("folder"), Lora(rank=2))
    assert load_recipe(path, {"model": MODEL | {"n_layer": 1}}).config.n_layer == 1


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("stages.0.tokens", 64, "stages.0.tokens cannot be set, since stages has no keys: set stages as a whole"),
        ("seed.first", 1, "seed.first cannot be set, since seed has no keys: set seed as a whole"),
        (
            "optimizer.lr.peak",
            1,
            "optimizer.lr.peak cannot be set, since optimizer.lr has no keys: set optimizer.lr as a ",
        ),
        (
            "optimizer.lr",
            "1e-3",
            "optimizer.lr is '1e-3', not a number of at least 0 (YAML takes 1e-3 for text: write 1.",
        ),
        ("optimiser.lr", 1.0, "optimiser is not a key of a recipe: did you mean optimizer?"),
        ("optimizer.", 1.0, "optimizer. is not a key of a recipe (optimizer has lr, betas, "),
    ],
)
def test_a_change_that_cannot_be(tmp_path: Path, key: str, value: object, problem: str) -> None:
    (found,) = problems(tmp_path, RAW | {"seed": 1}, {key: value})
    assert found.startswith(problem)


# A model to continue from


def started(folder: Path, **model: Any) -> Recipe:
    raw = {key: value for key, value in RAW.items() if key != "model"} | {"start": {"model": str(folder)}}
    return load_recipe(write(folder.parent, raw | ({"model": model} if model else {})))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    BTLMConfig(**MODEL | {"resid_pdrop": 0.25}).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_start_brings_its_configuration(checkpoint: Path) -> None:
    config = started(checkpoint).config
    assert {key: getattr(config, key) for key in MODEL} == MODEL | {"resid_pdrop": 0.25}


def test_what_may_be_changed_of_a_start(checkpoint: Path) -> None:
    changes: dict[str, Any] = {
        "n_positions": 128,
        "alibi_scaling": {"type": "linear", "factor": 4.0},
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.125,
        "attn_pdrop": 0.5,
    }
    config = started(checkpoint, **changes).config
    assert {key: getattr(config, key) for key in MODEL | changes} == MODEL | changes
    assert json.loads((checkpoint / "config.json").read_text())["n_positions"] == 32, "the file is not touched"


def test_values_that_a_start_cannot_have(checkpoint: Path) -> None:
    recipe = started(checkpoint, alibi_scaling={"type": "cubic"}, n_positions="many", attn_pdrop=1)
    with pytest.raises(
        ValueError, match=r"n_positions is 'many', .*attn_pdrop is 1, .*alibi_scaling is \{'type': 'cub"
    ):
        _ = recipe.config


def test_rows_longer_than_the_learned_positions_of_a_start(checkpoint: Path) -> None:
    BTLMConfig(**MODEL | {"position_embedding_type": "learned"}).save_pretrained(checkpoint)
    assert started(checkpoint).config.n_positions == 32
    too_long = (
        r"stages\[1\]\.sequence_length \(32\) is more than the model's learned positions \(n_positions is 16\)\.$"
    )
    with pytest.raises(ValueError, match=too_long):
        _ = started(checkpoint, n_positions=16).config
    with pytest.raises(ValueError, match="n_positions is 'many', not a positive whole number"):
        _ = started(checkpoint, n_positions="many").config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "{folder} has no config.json"),
        ("{", "{folder}/config.json cannot be read as JSON"),
        ("[]", "{folder} is not a BTLM checkpoint: its config.json names no model_type"),
        ("{}", "{folder} is not a BTLM checkpoint: its config.json names no model_type"),
        ('{"model_type": "llama"}', "{folder} is not a BTLM checkpoint: its config.json has the model_type 'llama'"),
        (
            '{"model_type": "btlm", "n_head": 7}',
            "{folder}/config.json: Invalid BTLM configuration: n_head is 7, which do",
        ),
    ],
)
def test_a_start_that_is_no_checkpoint(tmp_path: Path, content: str | None, reason: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^start\.model is ") as caught:
        _ = started(folder).config
    message = str(caught.value)
    place = f"start.model is '{folder}', which cannot be used: "
    assert message.startswith(place + reason.replace("{folder}", str(folder)))
    assert "\n" not in message


@pytest.mark.parametrize("name", ["./nothing", "somebody/nothing", "", "a b:c"])
def test_a_start_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    raw = {key: value for key, value in RAW.items() if key != "model"} | {"start": {"model": name}}
    recipe = load_recipe(write(tmp_path, raw))
    with pytest.raises(ValueError, match=rf"^start\.model is '{name}', which cannot be used: [^\n]+\.$"):
        _ = recipe.config


def test_a_start_is_found_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Path | str] = []

    def count(name: Path | str, *, weights: bool = True) -> Path:
        found.append(name)
        return checkpoint_folder(name, weights=weights)

    monkeypatch.setattr("btlm.checkpoint.open.checkpoint_folder", count)
    BTLMConfig(**MODEL).save_pretrained(checkpoint)
    recipe = started(checkpoint)
    first = recipe.config
    first.n_embd = 7  # a new object each time
    assert recipe.config.n_embd == MODEL["n_embd"]
    assert found == [str(checkpoint)]


# Problems

KEYS = (
    "optimizer, schedule, stages, model, mup_base_width, start, lora, micro_batch_tokens, seed, data, precision, "
    "parallelism, evaluation, checkpoints, watching"
)
BY_DIMENSION = "muP divides scores by the head dimension, so set it to true"
WRITTEN_OUT = "(written out, as in 1_000_000)"
NOT_TEXT = "(YAML takes 1e-3 for text: write 1.0e-3)"
CHANGES: list[tuple[str, Any, str]] = [
    # path to the key, its value, the problem
    ("colour", "red", f"colour is not a key of a recipe (a recipe has {KEYS})"),
    (
        "optimizer.warmup_tokens",
        1,
        "optimizer.warmup_tokens is not a key of a recipe (optimizer has lr, betas, eps, weight_decay, clip_norm)",
    ),
    (
        "schedule.lr",
        1,
        "schedule.lr is not a key of a recipe (schedule has warmup_tokens, final_lr_ratio, decay, start_tokens)",
    ),
    (
        "stages.1.colour",
        1,
        "stages[1].colour is not a key of a recipe (stages[1] has sequence_length, batch_tokens, tokens)",
    ),
    *(
        (section, {"colour": 1}, f"{section}.colour is not a key of a recipe ({section} has {keys})")
        for section, keys in {
            "start": "model",
            "lora": "rank, alpha, dropout, target_modules",
            "data": "mask_documents",
            "precision": "dtype, activation_checkpointing, compile",
            "parallelism": "replicate, gather_dtype",
            "evaluation": "every_tokens, tokens_per_source",
            "checkpoints": "every_steps, keep_last, keep_every_steps",
            "watching": "tensorboard, wandb_project, spike_deviations",
        }.items()
    ),
    # Nearly right
    ("stages.1.batch_token", 1, "stages[1].batch_token is not a key of a recipe: did you mean batch_tokens?"),
    (
        "lora",
        {"target_module": ["c_attn"]},
        "lora.target_module is not a key of a recipe: did you mean target_modules?",
    ),
    ("model.n_embed", 1, "model.n_embed is not a key of BTLM's configuration: did you mean n_embd?"),
    # The shape
    ("model.colour", 1, "model.colour is not a key of BTLM's configuration (see btlm.BTLMConfig)"),
    ("model.7", 1, "model.7 is not a key of BTLM's configuration (see btlm.BTLMConfig)"),
    ("model.dtype", "x", "model.dtype is not a key of BTLM's configuration (see btlm.BTLMConfig)"),
    ("model", None, "model is None, not a mapping"),
    ("model", ["n_embd"], "model is ['n_embd'], not a mapping"),
    ("model", {}, "model is missing: give its shape, or name a model to go on from in start.model"),
    ("model.n_embd", 33, "Invalid BTLM configuration: n_head is 4, which does not divide n_embd (33)"),
    ("model.n_embd", "32", "Invalid BTLM configuration: n_embd is '32', not a positive whole number"),
    # Numbers
    ("optimizer", 3, "optimizer is 3, not a mapping"),
    ("optimizer", [1], "optimizer is [1], not a mapping"),
    ("optimizer.lr", -1.0, "optimizer.lr is -1.0, not a number of at least 0"),
    ("optimizer.lr", float("nan"), "optimizer.lr is nan, not a number of at least 0"),
    ("optimizer.lr", float("inf"), "optimizer.lr is inf, not a number of at least 0"),
    ("optimizer.lr", True, "optimizer.lr is True, not a number of at least 0"),
    ("optimizer.lr", None, "optimizer.lr is None, not a number of at least 0"),
    ("optimizer.eps", "1e-8", f"optimizer.eps is '1e-8', not a number of at least 0 {NOT_TEXT}"),
    ("optimizer.weight_decay", -0.1, "optimizer.weight_decay is -0.1, not a number of at least 0"),
    ("optimizer.clip_norm", "1e0", f"optimizer.clip_norm is '1e0', not a number of at least 0 {NOT_TEXT}"),
    ("schedule.final_lr_ratio", 1.5, "schedule.final_lr_ratio is 1.5, not a number from 0 to 1"),
    ("schedule.final_lr_ratio", -0.5, "schedule.final_lr_ratio is -0.5, not a number from 0 to 1"),
    ("schedule.final_lr_ratio", "1e-2", f"schedule.final_lr_ratio is '1e-2', not a number from 0 to 1 {NOT_TEXT}"),
    ("lora", {"alpha": "1e1"}, f"lora.alpha is '1e1', not a number of at least 0 {NOT_TEXT}"),
    ("lora", {"dropout": 1.0}, "lora.dropout is 1.0, not a number in [0, 1)"),
    ("watching", {"spike_deviations": -1}, "watching.spike_deviations is -1, not a number of at least 0"),
    *(
        ("optimizer.betas", betas, f"optimizer.betas is {betas!r}, not two numbers in [0, 1)")
        for betas in (0.9, [0.9], [0.9, 1.0], [0.9, -0.1], [0.9, 0.95, 0.99], ["0.9", 0.95], None)
    ),
    # Whole numbers
    ("schedule.warmup_tokens", -1, "schedule.warmup_tokens is -1, not a whole number of at least 0"),
    ("schedule.warmup_tokens", 0.5, f"schedule.warmup_tokens is 0.5, not a whole number of at least 0 {WRITTEN_OUT}"),
    (
        "schedule.start_tokens",
        1e9,
        f"schedule.start_tokens is 1000000000.0, not a whole number of at least 0 {WRITTEN_OUT}",
    ),
    ("stages.0.batch_tokens", 0, "stages[0].batch_tokens is 0, not a whole number of at least 1"),
    ("stages.0.sequence_length", 1, "stages[0].sequence_length is 1, not a whole number of at least 2"),
    (
        "stages.0.sequence_length",
        "16",
        f"stages[0].sequence_length is '16', not a whole number of at least 2 {WRITTEN_OUT}",
    ),
    ("stages.0.tokens", -640, "stages[0].tokens is -640, not a whole number of at least 1"),
    ("stages.0.tokens", "1e9", f"stages[0].tokens is '1e9', not a whole number of at least 1 {WRITTEN_OUT}"),
    ("micro_batch_tokens", 0, "micro_batch_tokens is 0, not a whole number of at least 1"),
    ("micro_batch_tokens", "8k", f"micro_batch_tokens is '8k', not a whole number of at least 1 {WRITTEN_OUT}"),
    ("mup_base_width", 0, "mup_base_width is 0, not a whole number of at least 1"),
    ("seed", -1, "seed is -1, not a whole number of at least 0"),
    ("seed", True, "seed is True, not a whole number of at least 0"),
    ("seed", None, "seed is None, not a whole number of at least 0"),
    ("lora", {"rank": 0}, "lora.rank is 0, not a whole number of at least 1"),
    ("parallelism", {"replicate": 0}, "parallelism.replicate is 0, not a whole number of at least 1"),
    ("evaluation", {"every_tokens": 0}, "evaluation.every_tokens is 0, not a whole number of at least 1"),
    ("evaluation", {"tokens_per_source": -5}, "evaluation.tokens_per_source is -5, not a whole number of at least 1"),
    ("checkpoints", {"every_steps": 0}, "checkpoints.every_steps is 0, not a whole number of at least 1"),
    ("checkpoints", {"keep_last": 0}, "checkpoints.keep_last is 0, not a whole number of at least 1"),
    ("checkpoints", {"keep_every_steps": 0}, "checkpoints.keep_every_steps is 0, not a whole number of at least 1"),
    # Choices, texts, lists
    ("schedule.decay", "exponential", "schedule.decay is 'exponential', not one of linear, cosine, constant"),
    ("schedule.decay", None, "schedule.decay is None, not one of linear, cosine, constant"),
    ("precision", {"dtype": "float16"}, "precision.dtype is 'float16', not one of bfloat16, float32"),
    ("parallelism", {"gather_dtype": 16}, "parallelism.gather_dtype is 16, not one of bfloat16, float32"),
    ("precision", {"compile": "always"}, "precision.compile is 'always', not true or false"),
    ("precision", {"activation_checkpointing": 1}, "precision.activation_checkpointing is 1, not true or false"),
    ("data", {"mask_documents": None}, "data.mask_documents is None, not true or false"),
    ("data", None, "data is None, not a mapping"),
    ("watching", {"wandb_project": 7}, "watching.wandb_project is 7, not a text"),
    ("start", {"model": 7}, "start.model is 7, not a text"),
    ("start", {}, "start.model is missing"),
    ("start", "folder", "start is 'folder', not a mapping"),
    ("lora", {"target_modules": "c_attn"}, "lora.target_modules is 'c_attn', not a list of texts"),
    ("lora", {"target_modules": []}, "lora.target_modules is [], not a list of texts"),
    ("lora", {"target_modules": ["c_attn", 1]}, "lora.target_modules is ['c_attn', 1], not a list of texts"),
    ("stages", None, "stages is None, not a list of stages"),
    ("stages", [], "stages is [], not a list of stages"),
    ("stages", {"tokens": 1}, "stages is {'tokens': 1}, not a list of stages"),
    ("stages.0", "long", "stages[0] is 'long', not a mapping"),
    # Settings that contradict each other
    ("stages.0.tokens", 63, "stages[0].batch_tokens (64) is more than its tokens (63)"),
    ("stages.1.batch_tokens", 144, "stages[1].batch_tokens (144) is no multiple of sequence_length (32)"),
    ("micro_batch_tokens", 96, "stages[1].batch_tokens (128) is no multiple of micro_batch_tokens (96)"),
    ("micro_batch_tokens", 16, "micro_batch_tokens (16) is no multiple of stages[1].sequence_length (32)"),
    ("micro_batch_tokens", 48, "micro_batch_tokens (48) is no multiple of stages[1].sequence_length (32)"),
    ("schedule.warmup_tokens", 1281, "schedule.warmup_tokens (1281) is beyond the end of the run at 1280 tokens"),
    (
        "optimizer.clip_norm",
        0,
        "optimizer.clip_norm is 0, which leaves nothing of a gradient: give 1.0e+9 to clip none",
    ),
    ("lora", {}, "lora is given without a model to adapt: name one in start.model"),
]


def test_fp32_products_take_fp32_weights(tmp_path: Path) -> None:
    raw = RAW | {"precision": {"dtype": "float32"}, "parallelism": {"gather_dtype": "bfloat16"}}
    (problem,) = problems(tmp_path, raw)
    assert problem.startswith("precision.dtype is float32, but parallelism.gather_dtype is bfloat16: ")


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
    raw = changed("stages.0", {"sequence_length": 24, "batch_tokens": 96, "tokens": 960}) | {"micro_batch_tokens": 96}
    raw["stages"][1]["batch_tokens"] = 96
    assert problems(tmp_path, raw) == ["stages[0].sequence_length (24) does not divide the longest (32)"]


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, 96, 128, 1024])
def test_a_batch_is_whole_micro_batches_or_less_than_one(tmp_path: Path, micro_batch_tokens: int) -> None:
    raw = changed("stages", [{"sequence_length": 32, "batch_tokens": 64, "tokens": 640}])
    assert load_recipe(write(tmp_path, raw | {"micro_batch_tokens": micro_batch_tokens})).total_steps == 10


def test_rows_have_to_fit_learned_positions(tmp_path: Path) -> None:
    learned = MODEL | {"position_embedding_type": "learned"}
    assert load_recipe(write(tmp_path, RAW | {"model": learned})).config.n_positions == 32
    too_long = "stages[1].sequence_length (32) is more than the model's learned positions (n_positions is 31)"
    assert problems(tmp_path, RAW | {"model": learned | {"n_positions": 31}}) == [too_long]
    load_recipe(write(tmp_path, RAW | {"model": MODEL | {"n_positions": 31}}))  # ALiBi takes any length


def test_warm_up_may_end_with_the_run(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, changed("schedule.warmup_tokens", 1280))).lr_factor(1280) == 1.0
    # Earlier tokens count, so the warm-up of a resumed schedule is over.
    load_recipe(write(tmp_path, changed("schedule", {"warmup_tokens": 1281, "start_tokens": 1})))


@pytest.mark.parametrize("path", ["optimizer", "schedule", "stages"])
def test_a_missing_key_is_named(tmp_path: Path, path: str) -> None:
    assert problems(tmp_path, {key: value for key, value in RAW.items() if key != path}) == [f"{path} is missing"]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    raw = {key: value for key, value in RAW.items() if key != "model"}
    assert problems(tmp_path, raw) == ["model is missing: give its shape, or name a model to go on from in start.model"]


MUP_PROBLEMS: list[tuple[dict[str, Any], int | None, str]] = [
    # changes of the model, with ... for a key that is left out; the base width; the problem
    (
        {"mup_output_alpha": ..., "mup_embeddings_scale": ...},
        None,
        (
            "the model has mup_width_scale, mup_scale_qk_dot_by_d, but not mup_embeddings_scale, mup_output_alpha: "
            "give all of muP, or none"
        ),
    ),
    (
        {"mup_width_scale": ..., "mup_output_alpha": ...},
        16,
        (
            "the model has mup_base_width, mup_embeddings_scale, mup_scale_qk_dot_by_d, but not mup_output_alpha: "
            "give all of muP, or none"
        ),
    ),
    ({}, 8, "model.mup_width_scale is 0.5, but mup_base_width / n_embd is 0.25: give one of the two"),
    (
        {"mup_width_scale": 0.501},
        16,
        "model.mup_width_scale is 0.501, but mup_base_width / n_embd is 0.5: give one of the two",
    ),
    (
        {"mup_scale_qk_dot_by_d": False},
        None,
        f"model.mup_scale_qk_dot_by_d is false, but mup_width_scale is 0.5: {BY_DIMENSION}",
    ),
    (
        {"mup_scale_qk_dot_by_d": False, "mup_width_scale": ...},
        8,
        f"model.mup_scale_qk_dot_by_d is false, but mup_width_scale is 0.25: {BY_DIMENSION}",
    ),
    ({"n_embd": "32"}, 16, "Invalid BTLM configuration: n_embd is '32', not a positive whole number"),
    ({"mup_width_scale": "0.5"}, 16, "Invalid BTLM configuration: mup_width_scale is '0.5', not a positive number"),
]


@pytest.mark.parametrize(("model", "base", "problem"), MUP_PROBLEMS, ids=lambda part: str(part)[:40])
def test_mup_values_have_to_go_together(tmp_path: Path, model: dict[str, Any], base: int | None, problem: str) -> None:
    given = {key: value for key, value in (MODEL | model).items() if value is not ...}
    raw = RAW | {"model": given} | ({} if base is None else {"mup_base_width": base})
    assert problems(tmp_path, raw) == [problem]


def test_a_base_width_needs_a_width(tmp_path: Path) -> None:
    raw = RAW | {"model": {k: v for k, v in NO_SCALE.items() if k != "n_embd"}, "mup_base_width": 16}
    assert problems(tmp_path, raw) == ["mup_base_width needs model.n_embd, which is missing"]


def test_no_mup_at_all_and_mup_at_its_base_width(tmp_path: Path) -> None:
    plain = {key: value for key, value in MODEL.items() if not key.startswith("mup_")}
    assert load_recipe(write(tmp_path, RAW | {"model": plain})).config.mup_width_scale == 1.0
    base = MODEL | {"mup_width_scale": 1.0, "mup_scale_qk_dot_by_d": False}
    assert load_recipe(write(tmp_path, RAW | {"model": base})).config.mup_scale_qk_dot_by_d is False


def test_a_start_has_its_weights_and_its_mup(tmp_path: Path) -> None:
    raw = RAW | {
        "start": {"model": "x"},
        "model": {"n_embd": 64, "n_positions": 64, "n_layer": 1},
        "mup_base_width": 16,
    }
    changeable = "n_positions, alibi_scaling, resid_pdrop, embd_pdrop, attn_pdrop"
    assert problems(tmp_path, raw) == [
        f"model.n_embd, model.n_layer: part of the weights of start.model (only {changeable} can be changed)",
        "mup_base_width is 16, but start.model has its own muP values: leave it out",
    ]


def test_an_unreadable_start_is_one_problem(tmp_path: Path) -> None:
    raw = {key: value for key, value in RAW.items() if key != "model"} | {"start": "folder", "lora": {}}
    assert problems(tmp_path, raw) == ["start is 'folder', not a mapping"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    raw = {
        "colour": "red",
        "model": MODEL | {"n_head": 5, "vocab_size": 0, "shape": "round"},
        "mup_base_width": 8,
        "lora": {"rank": 0},
        "optimizer": {"lr": -1.0, "momentum": 0.9},
        "schedule": {"decay": "steep"},
        "stages": [
            {"sequence_length": 24, "batch_tokens": 100, "tokens": 1000},
            {"sequence_length": 32, "batch_tokens": 128},
            "the end",
            {"sequence_length": 64, "batch_tokens": 128, "tokens": 64, "lr": 1},
            {"sequence_length": 64, "batch_tokens": 128, "tokens": 64},
        ],
        "micro_batch_tokens": 48,
        "seed": "one",
        "precision": {"dtype": "float64"},
    }
    found = [problem.split(" (")[0] if "is not a key" in problem else problem for problem in problems(tmp_path, raw)]
    assert sorted(found) == sorted(
        [
            "colour is not a key of a recipe",
            "model.shape is not a key of BTLM's configuration",
            "model.mup_width_scale is 0.5, but mup_base_width / n_embd is 0.25: give one of the two",
            "Invalid BTLM configuration: vocab_size is 0, not a positive whole number",
            "n_head is 5, which does not divide n_embd (32)",
            "lora.rank is 0, not a whole number of at least 1",
            "optimizer.momentum is not a key of a recipe",
            "optimizer.lr is -1.0, not a number of at least 0",
            "schedule.warmup_tokens is missing",
            "schedule.decay is 'steep', not one of linear, cosine, constant",
            "stages[0].batch_tokens (100) is no multiple of sequence_length (24)",
            "stages[0].batch_tokens (100) is no multiple of micro_batch_tokens (48)",
            "stages[0].sequence_length (24) does not divide the longest (64)",
            "stages[1].tokens is missing",
            "stages[2] is 'the end', not a mapping",
            "stages[3].lr is not a key of a recipe",
            "stages[4].batch_tokens (128) is no multiple of micro_batch_tokens (48)",
            "stages[4].batch_tokens (128) is more than its tokens (64)",
            "micro_batch_tokens (48) is no multiple of stages[4].sequence_length (64)",
            f"seed is 'one', not a whole number of at least 0 {WRITTEN_OUT}",
            "precision.dtype is 'float64', not one of bfloat16, float32",
        ]
    )


@pytest.mark.parametrize("raw", [None, [], "recipe", 3])
def test_a_file_without_keys_is_an_error(tmp_path: Path, raw: object) -> None:
    assert problems(tmp_path, raw) == [f"the content is {raw!r}, not a mapping"]
    assert problems(tmp_path, raw, {"seed": 1, "optimizer.lr": 1.0}) == [f"the content is {raw!r}, not a mapping"]


@pytest.mark.parametrize("content", [b"model: {", b"a: b: c", b"\xff\xfe", b"model: !!python/object:x.y {}"])
def test_a_file_that_is_no_yaml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is not a readable recipe: [^\n]+\.$") as caught:
        load_recipe(path)
    assert type(caught.value) is ValueError


def test_a_recipe_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml is not a readable recipe: .*there is no such file"):
        load_recipe(tmp_path / "nothing.yaml")
