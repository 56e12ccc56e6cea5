"""Recipes as YAML files: read, checked as a whole, and written."""

import dataclasses
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from btlm.model import BTLMConfig
from btlm.model.config_keys_btlm import MUP_KEYS

from .recipe import OVERRIDES, Recipe, Stage, length_problems


def load_recipe(path: Path | str, changes: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        changes: Values to set on top of the file, by dotted key (``{"optimizer.lr": 0.01}``).

    Raises:
        ValueError: Names every problem at once.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable recipe: {' '.join(str(error).split())}.") from error
    problems: list[str] = []
    for key, value in (changes or {}).items():
        _set(raw, key, value, problems)
    recipe = _build(Recipe, raw, "", problems)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    assert isinstance(recipe, Recipe)
    return recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, every key spelled out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    result: dict[str, Any] = plain(dataclasses.asdict(recipe))
    return result


def dump_recipe(recipe: Recipe) -> str:
    """YAML that :func:`load_recipe` reads as the same recipe."""
    text: str = yaml.safe_dump(as_dict(recipe), sort_keys=False)
    return text


def changes_of_result(there: dict[str, Any], here: Recipe) -> list[str]:
    """Where two recipes compute something else, by dotted key; how a run is executed, watched and kept may differ.

    Args:
        there: What :func:`as_dict` gave of the one that a run began with.
        here: The other.
    """
    before, now = dict(there), as_dict(here)
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


# Reading


def _set(raw: Any, key: str, value: Any, problems: list[str]) -> None:
    *sections, last = key.split(".")
    for i, section in enumerate(sections):
        if isinstance(raw, dict):
            if raw.get(section) is None:
                raw[section] = {}
            raw = raw[section]
            if not isinstance(raw, dict):
                whole = ".".join(sections[: i + 1])
                problems.append(f"{key} cannot be set, since {whole} has no keys: set {whole} as a whole")
    if isinstance(raw, dict):
        raw[last] = value


def _build(kind: Any, raw: object, where: str, problems: list[str]) -> Any:
    """One of the dataclasses above from what YAML holds; adds to ``problems``, and is ``None`` where it did."""
    if not isinstance(raw, dict):
        problems.append(f"{where or 'the content'} is {raw!r}, not a mapping")
        return None
    prefix = f"{where}." if where else ""
    before = len(problems)
    hints = typing.get_type_hints(kind, include_extras=True)
    keys = f"{where or 'a recipe'} has {', '.join(hints)}"
    problems += [f"{prefix}{key} is not a key of a recipe ({keys})" for key in raw if key not in hints]
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in raw:
            problems.append(f"{prefix}{item.name} is missing")
    values = {name: _value(hint, raw[name], prefix + name, problems) for name, hint in hints.items() if name in raw}
    if kind is Recipe:
        problems += _recipe_problems(values, started=raw.get("start") is not None)
    return kind(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A value in the type of its key; adds to ``problems``, and is ``None`` where it did."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _value(arguments[0], value, where, problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, problems)
    if origin is list and isinstance(value, list) and value:
        return [_value(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and value:
        kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value) and all(not _wanted(kind, item) for kind, item in zip(kinds, value, strict=True)):
            return tuple(value)
    if wanted := _wanted(hint, value):
        problems.append(f"{where} is {value!r}, not {wanted}")
        return None
    return value


def _wanted(hint: Any, value: Any) -> str:
    """What the value of a key should be; empty where it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if origin is Annotated:
        kind, least, *greatest = arguments
        if kind is int:
            digits = " (written out, as in 1_000_000)" if isinstance(value, (str, float)) else ""
            return "" if type(value) is int and value >= least else f"a whole number of at least {least}{digits}"
        text = " (YAML takes 1e-3 for text: write 1.0e-3)" if isinstance(value, str) else ""
        limits = f"from {least:g} to {greatest[0]:g}" if greatest else f"of at least {least:g}"
        return "" if number and least <= value <= max(greatest, default=math.inf) else f"a number {limits}{text}"
    if origin is Literal:
        return "" if value in arguments else f"one of {', '.join(arguments)}"
    if hint == tuple[float, float]:
        return "two numbers in [0, 1)"
    if hint is float:
        return "" if number and 0 <= value < 1 else "a number in [0, 1)"
    names = {
        bool: "true or false",
        str: "a text",
        dict: "a mapping",
        list: "a list of stages",
        tuple: "a list of texts",
    }
    kind = origin or hint
    return "" if isinstance(value, kind) and kind not in (list, tuple) else names[kind]


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
            f"model.{key} is not a key of BTLM's configuration (see btlm.BTLMConfig)"
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
