"""Options of coordinate checks and of searches."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Annotated, Any

from btlm.errors import OptionError
from btlm.model.architecture_btlm import HIDDEN, MUP_TABLE, RESIDUAL
from btlm.settings import Count, Range, Whole, check

# What the rows of the muP table are called.
HIDDEN_MATRICES, RESIDUAL_MATRICES = (
    ", ".join(layer for layer, row in MUP_TABLE.items() if row is kind) for kind in (HIDDEN, RESIDUAL)
)

ABLATIONS = {
    "hidden-init": f"{HIDDEN_MATRICES} start with the standard deviation of base width",
    "residual-init": "the residual projections c_proj start with the standard deviation of base width",
    "matrix-lr": "matrices get the learning rate of the embeddings",
    "scores": "scores are divided by the square root of head_dim",
    "logits": "logits are not multiplied by the width scale",
    "embedding-init": "the initial embeddings are scaled by the square root of the width scale, as matrices are",
    "embedding-multiplier": "the embedding multiplier is scaled by the square root of the width scale",
    "embedding-lr": "embeddings get the learning rate of matrices",
    "bias-lr": "biases and norms get the learning rate of matrices",
}
# The rows that turn standard parametrization into muP; the other ablations scale what must stay constant.
STANDARD = ("hidden-init", "residual-init", "matrix-lr", "scores", "logits")


@dataclass(frozen=True)
class CoordCheck:
    """Models to train: one per width and seed, each on a batch of ``rows`` x ``row_length`` tokens.

    Args:
        widths: Widths of the models, two or more.
        steps: Steps of the optimizer.
        seeds: Models per width.
        layers: Layers per model.
        heads: Attention heads, the same number at every width.
        rows: Rows of the batch.
        row_length: Tokens per row.
        ablate: Row of muP's table to leave out: hidden-init, residual-init, matrix-lr, scores, logits, embedding-init,
            embedding-multiplier, embedding-lr, bias-lr, or all, which is standard parametrization.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    steps: Count = 4
    seeds: Count = 2
    layers: Count = 2
    heads: Count = 1
    rows: Count = 4
    # A row of one token has nothing to predict.
    row_length: Annotated[int, Range(2)] = 32
    ablate: Annotated[str, "ROW"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
        problems = []
        if len(set(self.widths)) < 2 or len(set(self.widths)) != len(self.widths):
            problems.append(f"{{widths}} are {list(self.widths)}; give two or more different ones")
        if any(width < 1 or width % self.heads for width in self.widths):
            problems.append(f"{{widths}} are {list(self.widths)}, not multiples of the number of heads ({self.heads})")
        if self.ablate not in (None, "all", *ABLATIONS):
            problems.append(f"{{ablate}} is {{!r}}; choose one of {', '.join([*ABLATIONS, 'all'])}")
        if problems:
            raise OptionError(f"{'; '.join(problems)}.", self.ablate)

    @property
    def ablations(self) -> frozenset[str]:
        """Rows of the muP table that are left out."""
        return frozenset(STANDARD if self.ablate == "all" else [self.ablate] if self.ablate else [])


@dataclass(frozen=True)
class Search:
    """How `btlm transfer` searches.

    Args:
        trials: Finished trials in all.
        workers: Trials at a time.
        target: Recipe that gets the values (default: that of the proxy).
        seed: Seed of the values.
    """

    trials: Count
    workers: Count = 1
    target: Annotated[str, "RECIPE"] | None = None
    seed: Whole = 1

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)


Limits = tuple[Annotated[float, "LOW"], Annotated[float, "HIGH"]]


@dataclass(frozen=True)
class SearchSpace:
    """Lowest and highest value of each searched hyperparameter; values are drawn log-uniformly.

    The defaults span more than a factor of ten around BTLM's values: 0.012, 0.073, 14.6 and 2.22.

    Args:
        lr: Peak of the learning rate, at base width.
        initializer_range: Standard deviation of the initial weights.
        mup_embeddings_scale: Multiplier of embeddings.
        mup_output_alpha: Multiplier of logits.
    """

    lr: Limits = (1e-3, 1e-1)
    initializer_range: Limits = (0.02, 0.3)
    mup_embeddings_scale: Limits = (3.0, 60.0)
    mup_output_alpha: Limits = (0.5, 10.0)

    def __post_init__(self) -> None:
        """Check the values."""
        problems = [
            f"{{{name}}} is searched from {' to '.join(map(str, limits))}; give a lower and a higher positive number"
            for name, limits in self.ranges.items()
            if len(limits) != 2 or not 0 < limits[0] < limits[1] < float("inf")
        ]
        if problems:
            raise OptionError(f"{'; '.join(problems)}.")

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest values, by name."""
        return dataclasses.asdict(self)

    def draw(self, seed: int, number: int) -> dict[str, float]:
        """Draw the values of a trial, by name, rounded to four significant digits."""
        import optuna

        optuna.logging.set_verbosity(logging.WARNING)
        return rounded(optuna.create_study(sampler=sampler(seed, number)).ask(self.distributions).params)

    @property
    def distributions(self) -> dict[str, Any]:
        """The ranges as Optuna's distributions, by name."""
        from optuna.distributions import FloatDistribution

        return {name: FloatDistribution(low, high, log=True) for name, (low, high) in self.ranges.items()}


def sampler(seed: int, number: int) -> Any:
    """Optuna's sampler of the values of a trial."""
    import numpy as np
    from optuna.samplers import RandomSampler

    return RandomSampler(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Values of a trial, rounded to four significant digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}
