"""The result of a coordinate check: a table, a picture, and the numbers as JSON."""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from btlm.files import write_json
from btlm.plots import pyplot, save_figure

from .coord_slopes import TOLERANCE, Coordinates, Slope
from .options import CoordCheck

# Quantities in the picture; the table also has the parameters.
_PANELS = (
    "embeddings",
    "queries, keys, values",
    "scores",
    "attention output",
    "MLP inner",
    "MLP output",
    "residual stream",
    "logits",
)


def coord_table(slopes: list[Slope]) -> Table:
    """Table with one line per quantity: its slopes with standard errors, and muP's predictions."""
    table = Table(title=f"Exponent of the width; ✗: not within {TOLERANCE} of muP's")
    table.add_column("", no_wrap=True)
    for moment in ("initial", "change"):
        table.add_column(moment, justify="right")
        table.add_column("muP", justify="right")
    by_quantity: dict[str, list[str]] = {}
    for slope in slopes:
        # A sign besides the color, which not everybody sees and not every terminal has.
        color, sign = ("green", "") if slope.passes else ("bold red", " ✗")
        error = f" ± {slope.error:.2f}" if slope.error == slope.error else ""
        cells = by_quantity.setdefault(slope.quantity, [])
        cells += [f"[{color}]{_signed(slope.value)}{error}{sign}[/]", _range(slope.predicted)]
    for quantity, cells in by_quantity.items():
        table.add_row(quantity, *cells)
    return table


def write_report(output: Path, check: CoordCheck, coordinates: Coordinates, slopes: list[Slope]) -> None:
    """Write ``coord-check.json`` and ``coord-check.png`` to a folder, each whole or not at all.

    The root mean squares in the JSON are ``[widths, seeds]`` at initialization and ``[widths, seeds, steps]`` for
    changes.
    """
    content = {
        "check": dataclasses.asdict(check),
        "slopes": [{**slope._asdict(), "passes": slope.passes} for slope in slopes],
        "initial": {name: sizes.tolist() for name, sizes in coordinates.initial.items()},
        "change": {name: sizes.tolist() for name, sizes in coordinates.change.items()},
    }
    write_json(output / "coord-check.json", content)
    plot_coordinates(check, coordinates, slopes, output / "coord-check.png")


def plot_coordinates(check: CoordCheck, coordinates: Coordinates, slopes: list[Slope], picture: Path) -> None:
    """Plot a panel per activation: its size at initialization and its change after each step, against the width."""
    plt = pyplot()
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    found = {(slope.quantity, slope.moment): slope for slope in slopes}
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.2), layout="constrained", sharex=True)
    for axis, quantity in zip(axes.flat, _PANELS, strict=True):
        initial, change = coordinates.initial[quantity], coordinates.change[quantity]
        axis.loglog(check.widths, _mean(initial), "o--", color="0.45", markersize=3, label="at initialization")
        for step in range(check.steps):
            color = plt.get_cmap("viridis")(0.85 - 0.85 * step / max(1, check.steps - 1))
            label = f"change after {step + 1} step{'s' if step else ''}"
            axis.loglog(check.widths, _mean(change[:, :, step]), "o-", color=color, markersize=3, label=label)
        # All panels have the same scale, so that slopes can be compared by eye.
        low, high = axis.get_ylim()
        middle, half = np.sqrt(low * high), max(np.sqrt(high / low), 30.0)
        axis.set_ylim(middle / half, middle * half)
        axis.xaxis.set_major_locator(FixedLocator(check.widths))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(quantity, fontsize=10, pad=16)
        for place, moment in ((0.0, "initial"), (1.0, "change")):
            slope = found[quantity, moment]
            style = {"color": "0.35"} if slope.passes else {"color": "crimson", "weight": "bold"}
            text = f"{moment} {_signed(slope.value)}{'' if slope.passes else ' ✗'}"
            side = "right" if place else "left"
            axis.text(place, 1.03, text, transform=axis.transAxes, ha=side, size=8, **style)
    for axis in axes[-1]:
        axis.set_xlabel("width")
    figure.supylabel("root mean square", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    save_figure(figure, picture, dpi=100)


def _mean(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Geometric mean over the seeds of ``[widths, seeds]``, as for the slopes."""
    mean: NDArray[np.float64] = np.exp(np.log(sizes).mean(axis=1))
    return mean


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # Adding 0 turns -0 into 0.


def _range(predicted: tuple[float, float]) -> str:
    low, high = predicted
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
