"""Sizes of activations and of their changes in training, their slopes against the width, and muP's predictions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btlm.data.shards import TokenShards
from btlm.model import BTLMConfig
from btlm.train.distributed import join_ranks
from btlm.train.recipe import Optimizer

from .coord_models import build_model, build_optimizer, observe
from .options import HIDDEN_MATRICES, RESIDUAL_MATRICES, CoordCheck

# A slope passes within this distance of its prediction. The smallest shift by a mistake is 1/2; this is half of it.
TOLERANCE = 0.25
# Number of token types in a batch without shards: few, so that each occurs often.
TOKEN_TYPES = 32


class Prediction(NamedTuple):
    """Lowest and highest predicted slope of a quantity at initialization, and of its change in training."""

    initial: tuple[float, float]
    change: tuple[float, float]


_CONSTANT = (0.0, 0.0)
# A sum of a constant part, which dominates at great widths, and a part with the exponent -1/2.
_MIXED = (-0.5, 0.0)

PREDICTIONS = {
    "embeddings": Prediction(_CONSTANT, _CONSTANT),
    "queries, keys, values": Prediction(_CONSTANT, _CONSTANT),
    # Independent queries and keys: a sum over head_dim terms of random sign, divided by head_dim.
    "scores": Prediction((-0.5, -0.5), _MIXED),
    "attention output": Prediction(_CONSTANT, _CONSTANT),
    "MLP inner": Prediction(_CONSTANT, _CONSTANT),
    "MLP output": Prediction(_CONSTANT, _CONSTANT),
    "residual stream": Prediction(_CONSTANT, _CONSTANT),
    # With a tied table, the logit of the input token itself is constant from the start.
    "logits": Prediction(_MIXED, _MIXED),
    # Parameters.
    "embedding weights": Prediction(_CONSTANT, _CONSTANT),
    HIDDEN_MATRICES: Prediction((-0.5, -0.5), (-1.0, -1.0)),
    RESIDUAL_MATRICES: Prediction((-0.5, -0.5), (-1.0, -1.0)),
    "biases and norms": Prediction(_CONSTANT, _CONSTANT),
}


class Coordinates(NamedTuple):
    """Root mean squares by quantity: at initialization ``[widths, seeds]``, of changes ``[widths, seeds, steps]``."""

    initial: dict[str, NDArray[np.float64]]
    change: dict[str, NDArray[np.float64]]


class Slope(NamedTuple):
    """Exponent with which a quantity scales with width; ``error`` is its standard error over seeds (nan for one)."""

    quantity: str
    moment: str
    value: float
    error: float
    predicted: tuple[float, float]

    @property
    def passes(self) -> bool:
        """Whether the slope is within ``TOLERANCE`` of the prediction; false if a run was not finite."""
        low, high = self.predicted
        return low - TOLERANCE <= self.value <= high + TOLERANCE


def draw_batches(check: CoordCheck, shards: TokenShards | None = None) -> list[NDArray[np.int64]]:
    """One batch per seed: token ids int64 ``[rows, row_length]``, numbered from 0 without gaps.

    With shards, a batch is consecutive rows from a random position, with tokens renumbered so that the model's
    vocabulary has no others. Without shards, it is drawn from ``TOKEN_TYPES`` tokens with the frequencies of Zipf's
    law.

    Raises:
        ValueError: The shards hold too few tokens.
    """
    size, batches = check.rows * check.row_length, []
    for seed in range(check.seeds):
        rng = np.random.default_rng(seed)
        flat: NDArray[Any]
        if shards is None:
            frequencies = 1 / np.arange(1, TOKEN_TYPES + 1)
            flat = rng.choice(TOKEN_TYPES, size, p=frequencies / frequencies.sum())
        else:
            available = shards.num_tokens("train")
            if available < size:
                raise ValueError(f"The shards hold {available:,} training tokens, fewer than a batch of {size}.")
            flat = shards.tokens("train", int(rng.integers(available - size + 1)), size)
        _, numbers = np.unique(flat, return_inverse=True)
        batches.append(numbers.reshape(check.rows, check.row_length).astype(np.int64))
    return batches


def measure(
    check: CoordCheck,
    config: BTLMConfig,
    optimizer: Optimizer,
    batches: list[NDArray[np.int64]],
    device: str = "auto",
    progress: Callable[[int], object] = lambda width: None,
) -> Coordinates:
    """Train each width once per batch, in fp32, with ``LR_FACTOR`` times the optimizer's learning rate.

    Args:
        check: Sizes and ablation.
        config: Parametrization, activation function and relative inner width of the models.
        optimizer: Settings of AdamW.
        batches: Batches from :func:`draw_batches`; the number of a batch is the seed of the weights.
        device: Torch device, or ``auto``.
        progress: Called with the width after each training.

    Raises:
        ValueError: The device cannot be used.
    """
    chosen = join_ranks(device).device
    shape = len(check.widths), len(batches)
    initial = {name: np.zeros(shape) for name in PREDICTIONS}
    change = {name: np.zeros((*shape, check.steps)) for name in PREDICTIONS}
    for i, width in enumerate(check.widths):
        for seed, batch in enumerate(batches):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build_model(check, config, width, int(batch.max()) + 1).to(chosen)  # type: ignore[arg-type]
            input_ids = torch.from_numpy(batch).to(chosen)
            adamw = build_optimizer(check, model, optimizer)
            before = observe(model, input_ids)
            for name, value in before.items():
                initial[name][i, seed] = _rms(value)
            for step in range(check.steps):
                model(input_ids, labels=input_ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
                adamw.step()
                adamw.zero_grad()
                for name, value in observe(model, input_ids).items():
                    change[name][i, seed, step] = _rms([x - y for x, y in zip(value, before[name], strict=True)])
            progress(width)
    return Coordinates(initial, change)


def fit_slopes(check: CoordCheck, coordinates: Coordinates) -> list[Slope]:
    """Least-squares slopes of log root mean square against log width; those of changes are the mean over all steps."""
    x = np.log(check.widths) - np.log(check.widths).mean()
    slopes = []
    for quantity, prediction in PREDICTIONS.items():
        for moment, sizes, predicted in (
            ("initial", coordinates.initial[quantity][:, :, None], prediction.initial),
            ("change", coordinates.change[quantity], prediction.change),
        ):
            with np.errstate(divide="ignore", invalid="ignore"):
                by_seed = np.tensordot(x, np.log(sizes).mean(axis=2), axes=1) / np.square(x).sum()
                error = float(by_seed.std(ddof=1) / math.sqrt(len(by_seed))) if len(by_seed) > 1 else math.nan
            slopes.append(Slope(quantity, moment, float(by_seed.mean()), error, predicted))
    return slopes


def _rms(tensors: list[Tensor]) -> float:
    """Root mean square over all elements of all tensors."""
    return math.sqrt(sum(float(x.square().sum()) for x in tensors) / sum(x.numel() for x in tensors))
