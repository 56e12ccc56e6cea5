"""`btlm coord-check`: how sizes of activations, and what training changes in them, grow with the width.

Under muP (arXiv 2203.03466, appendix D.1) both go with a known power of the width, which ``PREDICTIONS`` lists. The
check trains models that differ in width alone for a few steps on one batch, and fits these powers: slopes of log size
against log width. A row of the table of :mod:`btlm.model.mup` that is missing changes the slopes it is there for
(``ABLATIONS``, each of which ``docs/mup.md`` shows with the slopes measured).

The number of heads is the same at every width, so that the head dimension grows with it. One head, few tokens and
small steps are nearest to the limit of infinite width: the part of a change that all tokens share goes with the
predicted power, and what is random in it, with half a power less, fades as heads widen and token types get fewer.
"""

from pathlib import Path
from typing import Any

from btlm.console import progress_bars
from btlm.data.shards import TokenShards
from btlm.model import BTLMConfig
from btlm.train.recipe import Optimizer
from btlm.train.recipe_file import load_recipe

from .coord_models import CoordCheck, is_mup
from .coord_report import coord_table, write_report
from .coord_slopes import draw_batches, fit_slopes, measure

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
    with progress_bars(console=console) as progress:
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
