"""A training run as data: one YAML file over these dataclasses."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from btlm.model import BTLMConfig


@dataclass(frozen=True)
class Stage:
    """A stretch of the run at one sequence length; the schedule is global and does not restart."""

    sequence_length: int
    batch_tokens: int
    tokens: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class Optimizer:
    """AdamW on the muP groups; linear warm-up, then linear decay to ``final_lr_ratio`` of the peak."""

    lr: float
    warmup_tokens: int
    final_lr_ratio: float = 0.0085
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        model: Keys of :class:`btlm.BTLMConfig`.
        optimizer: Learning rate, schedule and decay.
        stages: In order.
        micro_batch_tokens: Tokens that a forward pass holds at once; bounds memory.
        seed: Of initialization and data order.
        eval_every_tokens: Held-out loss at this interval, and at the end.
        eval_tokens_per_source: Held-out tokens of each source that are evaluated.
        checkpoint_every_steps: Interval of resumable checkpoints.
    """

    model: dict[str, Any]
    optimizer: Optimizer
    stages: list[Stage]
    micro_batch_tokens: int = 8192
    seed: int = 1
    eval_every_tokens: int = 1_000_000
    eval_tokens_per_source: int = 16_384
    checkpoint_every_steps: int = 50

    @property
    def config(self) -> BTLMConfig:
        """The model's configuration."""
        return BTLMConfig(**self.model)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def total_tokens(self) -> int:
        """Tokens of all stages, whole steps only."""
        return sum(stage.steps * stage.batch_tokens for stage in self.stages)

    def lr_factor(self, tokens: int) -> float:
        """Learning rate over its peak for the step that ends at ``tokens`` tokens of the run."""
        warmup = self.optimizer.warmup_tokens
        if tokens < warmup:
            return tokens / warmup
        progress = (tokens - warmup) / max(1, self.total_tokens - warmup)
        return 1.0 - (1.0 - self.optimizer.final_lr_ratio) * progress


def load_recipe(path: Path | str) -> Recipe:
    """Read and check a recipe.

    Raises:
        ValueError: Names every problem at once.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable recipe: {' '.join(str(error).split())}.") from error
    problems: list[str] = []
    recipe = _build(Recipe, raw, "", problems)
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    assert isinstance(recipe, Recipe)
    return recipe


# Least value of the whole numbers; the other numbers are at least 0. A row of one token has nothing to predict.
_WHOLE_NUMBERS = {
    "sequence_length": 2,
    "batch_tokens": 1,
    "tokens": 1,
    "warmup_tokens": 0,
    "micro_batch_tokens": 1,
    "seed": 0,
    "eval_every_tokens": 1,
    "eval_tokens_per_source": 1,
    "checkpoint_every_steps": 1,
}


def _build(kind: Any, raw: object, prefix: str, problems: list[str]) -> Any:
    """One of the dataclasses above from what YAML holds; adds to ``problems``, and is ``None`` where it did."""
    if not isinstance(raw, dict):
        problems.append(f"{prefix.rstrip('.') or 'the content'} is {raw!r}, not a mapping")
        return None
    before = len(problems)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    problems += [f"{prefix}{key} is not a key of a recipe" for key in raw if key not in fields]
    for name, part in fields.items():
        if part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING and name not in raw:
            problems.append(f"{prefix}{name} is missing")
    values = {name: _value(name, raw[name], prefix + name, problems) for name in fields if name in raw}
    if kind is Recipe:
        stages = values.get("stages") or []
        problems += _stage_problems(stages, values.get("micro_batch_tokens", Recipe.micro_batch_tokens))
    return kind(**values) if len(problems) == before else None


def _value(name: str, value: Any, where: str, problems: list[str]) -> Any:
    """The value of a key in its type; adds to ``problems``, and is ``None`` where it did."""
    if name == "optimizer":
        return _build(Optimizer, value, f"{where}.", problems)
    if name == "stages" and isinstance(value, list) and value:
        return [_build(Stage, stage, f"{where}[{i}].", problems) for i, stage in enumerate(value)]
    if name == "model" and isinstance(value, dict):
        known = {f.name for f in dataclasses.fields(BTLMConfig)}
        problems += [f"{where}.{key} is not a key of BTLM's configuration" for key in value if key not in known]
        try:
            BTLMConfig(**{key: item for key, item in value.items() if key in known})
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        return value
    if wanted := _not_as_wanted(name, value):
        problems.append(f"{where} is {value!r}, not {wanted}")
        return None
    return tuple(value) if name == "betas" else value


def _not_as_wanted(name: str, value: Any) -> str:
    """What the value of a key should be; empty where it is."""
    if name == "model":
        return "a mapping"
    if name == "stages":
        return "a list of stages"
    if name == "betas":
        right = isinstance(value, list) and len(value) == 2 and all(_is_number(beta) and beta < 1 for beta in value)
        return "" if right else "two numbers in [0, 1)"
    if name in _WHOLE_NUMBERS:
        right = type(value) is int and value >= _WHOLE_NUMBERS[name]
        return "" if right else f"a whole number of at least {_WHOLE_NUMBERS[name]}"
    text = " (YAML takes 1e-3 for text: write 1.0e-3)" if isinstance(value, str) else ""
    return "" if _is_number(value) else f"a number of at least 0{text}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _stage_problems(stages: list[Stage | None], micro_batch_tokens: int | None) -> list[str]:
    problems = []
    longest = max((stage.sequence_length for stage in stages if stage), default=0)
    for i, stage in enumerate(stages):
        if stage is None:
            continue
        batch = f"stages[{i}].batch_tokens ({stage.batch_tokens})"
        for name, part in (("sequence_length", stage.sequence_length), ("micro_batch_tokens", micro_batch_tokens)):
            if part and stage.batch_tokens % part:
                problems.append(f"{batch} is no multiple of {name} ({part})")
        if stage.tokens < stage.batch_tokens:
            problems.append(f"{batch} is more than its tokens ({stage.tokens})")
        if longest % stage.sequence_length:
            problems.append(f"stages[{i}].sequence_length ({stage.sequence_length}) does not divide {longest}")
    return problems
