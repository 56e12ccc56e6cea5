"""Recipes as YAML files: read, checked as a whole, and written."""

import inspect
import math
from pathlib import Path
from typing import Any

from btlm.model import BTLMConfig
from btlm.model.config_keys_btlm import MUP_KEYS
from btlm.settings import apply_changes, did_you_mean, plain, read_fields, read_yaml

from .recipe import OVERRIDES, Recipe, Stage, length_problems


def load_recipe(path: Path | str, changes: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        changes: Values to set on top of the file, by dotted key (``{"optimizer.lr": 0.01}``).

    Raises:
        ValueError: Names every problem at once.
    """
    raw, problems = read_yaml(path), list[str]()
    apply_changes(raw, changes or {}, problems)
    values = read_fields(Recipe, raw, problems)
    if isinstance(raw, dict):
        problems += _recipe_problems(values, started=raw.get("start") is not None)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return Recipe(**values)


def changes_of_result(there: dict[str, Any], here: Recipe) -> list[str]:
    """Where two recipes compute something else, by dotted key; how a run is executed, watched and kept may differ.

    Args:
        there: What :func:`btlm.settings.plain` gave of the one that a run began with.
        here: The other.
    """
    before, now = dict(there), plain(here)
    for recipe in (before, now):
        for section in ("micro_batch_tokens", "parallelism", "evaluation", "checkpoints", "watching"):
            recipe.pop(section, None)
        recipe["precision"] = {"dtype": recipe["precision"]["dtype"]}
    return _differences(before, now)


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in there | here:
        before, now = there.get(key), here.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} is {before!r} there, {now!r} here")
    return found


# What does not go together


def _recipe_problems(values: dict[str, Any], started: bool) -> list[str]:
    """Problems between the values of a recipe, as far as they could be read.

    Args:
        values: By key; ``None`` where one could not be read.
        started: Whether there is a model to start from, be it a readable one or not.
    """
    given = values.get("stages") or []
    stages = [stage for stage in given if stage is not None]
    problems = _stage_problems(given, values.get("micro_batch_tokens", Recipe.micro_batch_tokens))
    model, base_width = values.get("model", {}), values.get("mup_base_width")
    if model is not None:
        known = inspect.get_annotations(BTLMConfig)
        problems += [
            f"model.{key} is not a key of BTLM's configuration{did_you_mean(key, known) or ' (see btlm.BTLMConfig)'}"
            for key in model
            if key not in known
        ]
        check = _start_problems if started else _scratch_problems
        problems += check({key: value for key, value in model.items() if key in known}, base_width, stages)
    schedule = values.get("schedule")
    if schedule is not None and stages and len(stages) == len(given):
        end = schedule.start_tokens + sum(stage.steps * stage.batch_tokens for stage in stages)
        if schedule.warmup_tokens > end:
            problems.append(
                f"schedule.warmup_tokens ({schedule.warmup_tokens}) is beyond the end of the run at {end} tokens"
            )
    optimizer = values.get("optimizer")
    if optimizer is not None and optimizer.clip_norm == 0:
        problems.append("optimizer.clip_norm is 0, which leaves nothing of a gradient: give 1.0e+9 to clip none")
    precision, parallelism = values.get("precision"), values.get("parallelism")
    if precision and parallelism and precision.dtype == "float32" and parallelism.gather_dtype == "bfloat16":
        problems.append(
            "precision.dtype is float32, but parallelism.gather_dtype is bfloat16: weights that are rounded on the way "
            "do not give fp32 products, so set both alike"
        )
    if values.get("lora") is not None and not started:
        problems.append("lora is given without a model to adapt: name one in start.model")
    return problems


def _start_problems(model: dict[str, Any], base_width: int | None, _: list[Stage]) -> list[str]:
    problems = []
    if weights := ", ".join(f"model.{key}" for key in model if key not in OVERRIDES):
        problems.append(f"{weights}: part of the weights of start.model (only {', '.join(OVERRIDES)} can be changed)")
    if base_width is not None:
        problems.append(f"mup_base_width is {base_width}, but start.model has its own muP values: leave it out")
    return problems


def _scratch_problems(model: dict[str, Any], base_width: int | None, stages: list[Stage]) -> list[str]:
    if not model:
        return ["model is missing: give its shape, or name a model to go on from in start.model"]
    problems = []
    given = [key for key in MUP_KEYS if key in model or (key == "mup_width_scale" and base_width is not None)]
    if missing := ", ".join(key for key in MUP_KEYS if given and key not in given):
        names = ["mup_base_width" if key not in model else key for key in given]
        problems.append(f"the model has {', '.join(names)}, but not {missing}: give all of muP, or none")
    if base_width is not None:
        problems += _adopt_base_width(model, base_width)
    scale = model.get("mup_width_scale", 1.0)
    if scale != 1 and model.get("mup_scale_qk_dot_by_d") is False:
        problems.append(
            f"model.mup_scale_qk_dot_by_d is false, but mup_width_scale is {scale!r}: muP divides scores by the head "
            "dimension, so set it to true"
        )
    try:
        problems += length_problems(BTLMConfig(**model), stages)
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    return problems


def _adopt_base_width(model: dict[str, Any], base_width: int) -> list[str]:
    """Set ``mup_width_scale``, or tell why it cannot be."""
    if "n_embd" not in model:
        return ["mup_base_width needs model.n_embd, which is missing"]
    width = model["n_embd"]
    if not isinstance(width, int) or width < 1:
        return []  # The configuration complains.
    scale = base_width / width
    stated = model.setdefault("mup_width_scale", scale)
    if isinstance(stated, (int, float)) and not math.isclose(stated, scale, rel_tol=1e-6):
        return [f"model.mup_width_scale is {stated}, but mup_base_width / n_embd is {scale:g}: give one of the two"]
    return []


def _stage_problems(stages: list[Stage | None], micro_batch_tokens: int | None) -> list[str]:
    problems = []
    longest = max((stage.sequence_length for stage in stages if stage), default=0)
    for i, stage in enumerate(stages):
        if stage is None:
            continue
        batch = f"stages[{i}].batch_tokens ({stage.batch_tokens})"
        if stage.batch_tokens % stage.sequence_length:
            problems.append(f"{batch} is no multiple of sequence_length ({stage.sequence_length})")
        # A batch of less than a micro-batch is one pass.
        if micro_batch_tokens and stage.batch_tokens > micro_batch_tokens and stage.batch_tokens % micro_batch_tokens:
            problems.append(f"{batch} is no multiple of micro_batch_tokens ({micro_batch_tokens})")
        if micro_batch_tokens and micro_batch_tokens % stage.sequence_length:
            problems.append(
                f"micro_batch_tokens ({micro_batch_tokens}) is no multiple of stages[{i}].sequence_length "
                f"({stage.sequence_length})"
            )
        if stage.tokens < stage.batch_tokens:
            problems.append(f"{batch} is more than its tokens ({stage.tokens})")
        if longest % stage.sequence_length:
            problems.append(
                f"stages[{i}].sequence_length ({stage.sequence_length}) does not divide the longest ({longest})"
            )
    return problems
