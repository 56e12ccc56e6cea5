"""The command `btlm coord-check`: how activations, and their changes in training, scale with the width.

Under muP (arXiv 2203.03466, appendix D.1) both scale with known powers of the width, which ``PREDICTIONS`` lists. The
check trains models that differ only in width for a few steps on one batch, and fits the exponents as slopes of log size
against log width. Leaving out a row of the table in :mod:`btlm.model.mup` changes the slopes that the row controls
(``ABLATIONS``; ``docs/mup.md`` shows the measured slopes of each).

The number of heads is the same at every width, so that the head dimension grows with the width. One head, few token
types and small steps come closest to the limit of infinite width. A change consists of a part that all tokens share,
which scales with the predicted exponent, and a random part, whose exponent is lower by 1/2. The random part fades with
wider heads and fewer token types.
"""

from pathlib import Path
from typing import Any

from btlm.console import progress_bars
from btlm.data.shards import TokenShards
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import BTLM_3B
from btlm.plots import need_matplotlib
from btlm.train.recipe import Optimizer
from btlm.train.recipe_file import load_recipe

from .coord_models import is_mup
from .coord_report import coord_table, write_report
from .coord_slopes import draw_batches, fit_slopes, measure
from .options import CoordCheck

# BTLM's parametrization at base width, which is checked if no recipe is given.
_BTLM: dict[str, Any] = {
    **{key: value for key, value in vars(BTLM_3B).items() if key != "quantization"},
    "n_embd": 256,
    "n_head": 4,
    "n_inner": 683,
    "mup_width_scale": 1.0,
}


def run_coord_check(
    recipe_path: Path | str | None = None,
    check: CoordCheck | None = None,
    data: Path | str | None = None,
    output: Path | str | None = None,
    device: str = "auto",
) -> bool:
    """Run the check and print a table of the slopes; returns whether all of them are as muP predicts.

    Args:
        recipe_path: YAML file whose model and optimizer are checked; by default BTLM's values.
        check: Sizes and ablation; by default those of :class:`CoordCheck`.
        data: Folder of token shards to take the batches from; by default they are random tokens.
        output: Folder that receives ``coord-check.png`` and ``coord-check.json``.
        device: Torch device, or ``auto``.

    Raises:
        ValueError: The recipe continues from a model, has a learning rate of 0, or has standard parametrization, which
            cannot be ablated; or the shards or the device cannot be used.
    """
    from rich.console import Console

    check = check or CoordCheck()
    if output is not None:
        need_matplotlib()
    config, optimizer = BTLMConfig(**_BTLM), Optimizer(lr=0.012)
    if recipe_path is not None:
        recipe = load_recipe(recipe_path)
        if recipe.start is not None:
            raise ValueError(f"{recipe_path} continues from start.model; the check needs the shape of a new model.")
        config, optimizer = recipe.config, recipe.optimizer
    if optimizer.lr == 0:
        raise ValueError("optimizer.lr is 0, so that nothing would change; give a learning rate to check.")
    if check.ablations and not is_mup(config):
        raise ValueError(f"The recipe has standard parametrization; there is no {check.ablate} to leave out.")
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
