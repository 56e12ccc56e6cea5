"""A training run as data: one YAML file over these dataclasses."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from btlm.checkpoint.open import Checkpoint
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import MATRIX_NAMES
from btlm.settings import NOT_EMPTY, Count, Number, Range, Whole

# A row of one token has nothing to predict.
RowLength = Annotated[int, Range(2)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, below=1)]

# What a model that is started from may be given anew; all else is part of its weights.
OVERRIDES = ("n_positions", "alibi_scaling", "resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Start:
    """A model to go on from."""

    model: str
    """Folder of a checkpoint, or id on the Hugging Face Hub."""


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) by PEFT; all other weights stay as they are."""

    rank: Count = 16
    alpha: Number = 32.0
    dropout: ShareBelowOne = 0.0
    target_modules: Annotated[tuple[str, ...], NOT_EMPTY] = MATRIX_NAMES


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) on the muP groups; ``lr`` is the peak at base width."""

    lr: Number
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    eps: Number = 1e-8
    weight_decay: Number = 0.1
    clip_norm: Number = 1.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate over its peak against tokens: linear warm-up from 0, then decay to ``final_lr_ratio``.

    ``start_tokens`` is where the run stands on its schedule when it begins: 0 restarts the schedule, the tokens that a
    model has seen resume it. The schedule ends with the last stage.
    """

    warmup_tokens: Whole
    final_lr_ratio: Share = 0.0085
    decay: Literal["linear", "cosine", "constant"] = "linear"
    start_tokens: Whole = 0


@dataclass(frozen=True)
class Stage:
    """A stretch of the run at one sequence length; the schedule is global and does not restart."""

    sequence_length: RowLength
    batch_tokens: Count
    tokens: Count

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class Data:
    """How rows are used; the shards themselves are an argument of the command.

    ``mask_documents`` keeps attention and loss within the documents of a row. It costs a mask of
    ``sequence_length**2`` bytes per row; BTLM was trained without.
    """

    mask_documents: bool = False


@dataclass(frozen=True)
class Precision:
    """Weights, sums and optimizer are fp32 in any case; ``dtype`` is that of products."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Parallelism:
    """How the ranks of ``torchrun`` share the work.

    Each of ``replicate`` groups holds the whole state, cut over its ranks (FSDP2; hybrid sharding from two groups on).
    ``gather_dtype`` is that of the weights when they are gathered for use; fp32 gives the numbers of a single process.
    """

    replicate: Count = 1
    gather_dtype: Literal["bfloat16", "float32"] = "float32"


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss at this interval and at the end, on the first tokens of the held-out documents of each source."""

    every_tokens: Count = 1_000_000
    tokens_per_source: Count = 16_384


@dataclass(frozen=True)
class Checkpoints:
    """At this interval and at the end; the last ``keep_last`` stay, and those at multiples of ``keep_every_steps``."""

    every_steps: Count = 50
    keep_last: Count = 2
    keep_every_steps: Count | None = None


@dataclass(frozen=True)
class Watching:
    """TensorBoard files in the output folder, a W&B project, and when a loss is reported as a spike.

    A spike is a loss more than ``spike_deviations`` standard deviations above the mean of the 128 steps before it.
    """

    tensorboard: bool = True
    wandb_project: str | None = None
    spike_deviations: Number = 6.0


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        optimizer: AdamW.
        schedule: Of the learning rate.
        stages: In order.
        model: Keys of :class:`btlm.BTLMConfig`; with ``start`` those that are to be changed (``OVERRIDES``).
        mup_base_width: Width at which ``optimizer.lr`` and the multipliers were tuned; gives ``mup_width_scale``.
        start: A model to go on from; from random weights without it.
        lora: Train adapters instead of the weights.
        micro_batch_tokens: Tokens that a forward pass of one rank holds at once; bounds memory.
        seed: Of initialization, data order and dropout.
        data: Documents within rows.
        precision: Dtype of products, activation checkpointing, compilation.
        parallelism: Over ranks.
        evaluation: Held-out loss.
        checkpoints: What to resume from.
        watching: TensorBoard, W&B, spikes.
    """

    optimizer: Optimizer
    schedule: Schedule
    stages: Annotated[list[Stage], NOT_EMPTY]
    model: dict[str, Any] = field(default_factory=dict)
    mup_base_width: Count | None = None
    start: Start | None = None
    lora: Lora | None = None
    micro_batch_tokens: Count = 8192
    seed: Whole = 1
    data: Data = Data()
    precision: Precision = Precision()
    parallelism: Parallelism = Parallelism()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    watching: Watching = Watching()

    @property
    def config(self) -> BTLMConfig:
        """The model's configuration; that of ``start.model``, with ``model`` on top, where a run goes on.

        Raises:
            ValueError: ``start.model`` cannot be read, or the values do not go together.
        """
        if self.start is None:
            width_scale = {} if self.mup_base_width is None else {"mup_width_scale": self._width_scale}
            return BTLMConfig(**self.model | width_scale)
        try:
            config = self.started_from.config()
        except ValueError as error:
            raise ValueError(f"start.model is {self.start.model!r}, which cannot be used: {error}") from error
        for key, value in self.model.items():
            setattr(config, key, value)
        config.raise_problems()
        config.raise_problems(length_problems(config, self.stages))
        return config

    @cached_property
    def started_from(self) -> Checkpoint:
        """The checkpoint of ``start.model``, found once; its weights are downloaded when they are needed.

        Raises:
            ValueError: There is no such checkpoint.
        """
        assert self.start is not None
        return Checkpoint.open(self.start.model, weights=False)

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
        schedule, tokens = self.schedule, self.schedule.start_tokens + tokens
        warmup, total = schedule.warmup_tokens, schedule.start_tokens + self.total_tokens
        if tokens < warmup:
            return tokens / warmup
        if schedule.decay == "constant":
            return 1.0
        progress = (tokens - warmup) / max(1, total - warmup)
        if schedule.decay == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2
        return 1.0 - (1.0 - schedule.final_lr_ratio) * progress

    @property
    def _width_scale(self) -> float:
        assert self.mup_base_width is not None
        return self.mup_base_width / int(self.model["n_embd"])


# Parts


def length_problems(config: BTLMConfig, stages: list[Stage]) -> list[str]:
    """Stages whose rows are longer than learned positions."""
    if config.position_embedding_type != "learned":
        return []
    return [
        f"stages[{i}].sequence_length ({stage.sequence_length}) is more than the model's learned positions "
        f"(n_positions is {config.n_positions})"
        for i, stage in enumerate(stages)
        if stage.sequence_length > config.n_positions
    ]
