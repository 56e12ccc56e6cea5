"""A training run as data: one YAML file over these dataclasses."""

import dataclasses
from dataclasses import dataclass, field
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
        source_weights: Share of tokens for each source of the shards; equal shares of each token where empty.
        micro_batch_tokens: Tokens that a forward pass holds at once; bounds memory.
        seed: Of initialization and data order.
        eval_every_tokens: Held-out loss at this interval, and at the end.
        eval_tokens_per_source: Held-out tokens of each source that are evaluated.
        checkpoint_every_steps: Interval of resumable checkpoints.
    """

    model: dict[str, Any]
    optimizer: Optimizer
    stages: list[Stage]
    source_weights: dict[str, float] = field(default_factory=dict)
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
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a readable recipe: {' '.join(str(error).split())}.") from error
    problems: list[str] = []
    raw = raw if isinstance(raw, dict) else {}
    values = _known(Recipe, raw, "", problems)
    if isinstance(raw.get("optimizer"), dict):
        values["optimizer"] = _build(Optimizer, raw["optimizer"], "optimizer.", problems)
    if isinstance(raw.get("stages"), list):
        built = [_build(Stage, stage, f"stages[{i}].", problems) for i, stage in enumerate(raw["stages"])]
        values["stages"] = built
        if not built:
            problems.append("stages is empty")
        for i, stage in enumerate(s for s in built if s is not None):
            for name, part in (
                ("sequence_length", stage.sequence_length),
                ("micro_batch_tokens", raw.get("micro_batch_tokens", Recipe.micro_batch_tokens)),
            ):
                if not part or stage.batch_tokens % part:
                    problems.append(f"stages[{i}].batch_tokens ({stage.batch_tokens}) is no multiple of {name} ({part})")
    if isinstance(raw.get("model"), dict):
        known = {f.name for f in dataclasses.fields(BTLMConfig)}
        problems += [f"model.{key} is not a key of BTLM's configuration" for key in raw["model"] if key not in known]
        try:
            BTLMConfig(**raw["model"])
        except ValueError as error:
            problems.append(str(error).rstrip("."))
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}.")
    return Recipe(**values)


def _known(kind: Any, raw: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    problems += [f"{prefix}{key} is not a key of a recipe" for key in raw if key not in fields]
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in raw
    ]
    problems += [f"{prefix}{name} is missing" for name in required]
    return {key: value for key, value in raw.items() if key in fields}


def _build(kind: Any, raw: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(raw, dict):
        problems.append(f"{prefix.rstrip('.')} is {raw!r}, not a mapping")
        return None
    before = len(problems)
    values = _known(kind, raw, prefix, problems)
    for key, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and n >= 0 for n in numbers):
            problems.append(f"{prefix}{key} is {value!r}, not a number of at least 0")
    return kind(**values) if len(problems) == before else None
