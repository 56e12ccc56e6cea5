"""`btlm coord-check`: how sizes of activations, and what training changes in them, grow with the width.

Under muP (arXiv 2203.03466, appendix D.1) both go with a known power of the width, which ``PREDICTIONS`` lists. The
check trains models that differ in width alone for a few steps on one batch, and fits these powers: slopes of log size
against log width. A row of the table of :mod:`btlm.model.mup` that is missing changes the slopes it is there for
(``ABLATIONS``, each of which ``docs/mup.md`` shows with the slopes measured).

The number of heads is the same at every width, so that the head dimension grows with it. One head, few tokens and
small steps are nearest to the limit of infinite width: the part of a change that all tokens share goes with the
predicted power, and what is random in it, with half a power less, fades as heads widen and token types get fewer.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btlm.data.shards import TokenShards
from btlm.model import BTLMConfig
from btlm.train.distributed import join_ranks
from btlm.train.recipe import Optimizer
from btlm.train.recipe_file import load_recipe

from .coord_models import CoordCheck, build_model, build_optimizer, is_mup, observe

# A slope passes within this much of its prediction: half of 1/2, by which the nearest mistake moves one.
TOLERANCE = 0.25
# Tokens that a batch is drawn from where there are no shards: few, so that what each has learned is shared by many.
TOKEN_TYPES = 32


class Prediction(NamedTuple):
    """Lowest and highest slope of a quantity at initialization and of its change in training."""

    initial: tuple[float, float]
    change: tuple[float, float]


_CONSTANT = (0.0, 0.0)
# A root mean square over a constant part, which is all that is left at great widths, and one that falls by 1/2.
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
    # Of a tied table, the logit of the token itself is constant from the start.
    "logits": Prediction(_MIXED, _MIXED),
    # Parameters.
    "embedding weights": Prediction(_CONSTANT, _CONSTANT),
    "c_attn, c_fc, c_fc2": Prediction((-0.5, -0.5), (-1.0, -1.0)),
    "c_proj": Prediction((-0.5, -0.5), (-1.0, -1.0)),
    "biases and norms": Prediction(_CONSTANT, _CONSTANT),
}

# A model of BTLM's parametrization, where no recipe is given (recipes/btlm-3b.yaml).
_BTLM: dict[str, Any] = {
    "n_embd": 256,
    "n_head": 4,
    "n_inner": 683,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "initializer_range": 0.073,
    "mup_width_scale": 1.0,
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True,
}


class Coordinates(NamedTuple):
    """Root mean squares by quantity: at initialization ``[widths, seeds]``, of changes ``[widths, seeds, steps]``."""

    initial: dict[str, NDArray[np.float64]]
    change: dict[str, NDArray[np.float64]]


class Slope(NamedTuple):
    """The power of the width that a quantity goes with; ``error`` is its standard error over seeds (nan for one)."""

    quantity: str
    moment: str
    value: float
    error: float
    predicted: tuple[float, float]

    @property
    def passes(self) -> bool:
        """Within ``TOLERANCE`` of the prediction; not where a run was not finite."""
        low, high = self.predicted
        return low - TOLERANCE <= self.value <= high + TOLERANCE


def run_coord_check(
    recipe_path: Path | str | None = None,
    check: CoordCheck | None = None,
    data: Path | str | None = None,
    output: Path | str | None = None,
    device: str = "auto",
) -> bool:
    """Check, show the slopes as a table, and say whether all of them are as muP predicts.

    Args:
        recipe_path: YAML file whose model and optimizer are checked; BTLM's values without one.
        check: Sizes; the defaults of :class:`CoordCheck` without it.
        data: Folder of token shards to take the batch from; random tokens without it.
        output: Receives ``coord-check.png`` and ``coord-check.json``.
        device: Of torch, or ``auto``.

    Raises:
        ValueError: The recipe goes on from a model, is of standard parametrization and should be ablated, or has a
            learning rate of 0; or the shards or the device cannot be used.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .coord_report import coord_table, write_report

    check = check or CoordCheck()
    config, optimizer = BTLMConfig(**_BTLM), Optimizer(lr=0.012)
    if recipe_path is not None:
        recipe = load_recipe(recipe_path)
        if recipe.start is not None:
            raise ValueError(f"{recipe_path} goes on from start.model; the check needs the shape of a new model.")
        config, optimizer = recipe.config, recipe.optimizer
    if optimizer.lr == 0:
        raise ValueError("optimizer.lr is 0, with which nothing would change; give a learning rate to check.")
    if check.ablations and not is_mup(config):
        raise ValueError(f"The recipe is of standard parametrization; there is no {check.ablate} to leave out.")
    batches = draw_batches(check, None if data is None else TokenShards(data))

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("coordinates", total=sum(check.widths) * check.seeds)
        coordinates = measure(
            check, config, optimizer, batches, device, lambda width: progress.update(task, advance=width)
        )
    slopes = fit_slopes(check, coordinates)
    console.print(coord_table(slopes))
    passed = all(slope.passes for slope in slopes)
    if output is not None:
        write_report(Path(output), check, coordinates, slopes)
        console.print(f"Wrote {Path(output) / 'coord-check.png'}")
    console.print("All slopes are as muP predicts." if passed else "Some slopes are not as muP predicts.")
    return passed


def draw_batches(check: CoordCheck, shards: TokenShards | None = None) -> list[NDArray[np.int64]]:
    """One batch ``[rows, row_length]`` a seed, int64, of token ids that count from 0.

    From shards, consecutive rows at a random place, their tokens numbered anew, so that the model's vocabulary holds
    these alone. Without shards, ``TOKEN_TYPES`` tokens with the frequencies of Zipf's law.

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
    """Train every width once for each batch, in fp32, with ``LR_FACTOR`` of the optimizer's learning rate.

    Args:
        check: Sizes and ablation.
        config: Parametrization, shares of the feed-forward layer and activation of the models.
        optimizer: AdamW.
        batches: Of :func:`draw_batches`; the seed of the weights is the number of the batch.
        device: Of torch, or ``auto``.
        progress: Called with each width that is done.

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
