"""Shows a search: its progress, a table of the best trials, and a plot of the loss against each value."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, TaskID
from rich.table import Table

from btlm.console import progress_bars
from btlm.plots import pyplot, save_figure

from .transfer_trials import Event

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

NAMES = {
    "lr": "learning rate",
    "initializer_range": "initial std",
    "mup_embeddings_scale": "embedding scale",
    "mup_output_alpha": "output alpha",
}
# Number of lines in the table.
BEST = 10


@contextmanager
def watch(console: Console, finished: int, trials: int, steps: int) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows an event: one bar for all trials, one per running trial, a line when one ends.

    Args:
        console: Console on standard error.
        finished: Number of trials that earlier calls finished.
        trials: Number of trials to reach.
        steps: Steps of a trial.
    """
    with progress_bars(MofNCompleteColumn(), console=console) as progress:
        every_trial = progress.add_task("trials", total=max(trials, finished), completed=finished)
        running: dict[int, TaskID] = {}

        def show(event: Event) -> None:
            number = event.number
            if event.kind == "step":
                if number not in running:
                    running[number] = progress.add_task(f"trial {number}", total=steps)
                progress.update(running[number], completed=event.value)
                return
            if number in running:
                progress.remove_task(running.pop(number))
            text = f"{event.value:.4f} bits per byte" if event.kind == "loss" else f"{event.kind}: {event.value}"
            console.print(f"trial {number}: {text}", markup=False)
            progress.advance(every_trial, int(event.kind in ("loss", "diverged")))

        yield show


def trials_table(trials: Mapping[int, "FrozenTrial"]) -> Table:
    """Table of the best trials, the best first, with the number of trials that diverged."""
    losses = {number: trial.value for number, trial in trials.items() if trial.value is not None}
    diverged = len(trials) - len(losses)
    table = Table(title=f"{len(trials)} trials, {diverged} diverged", caption="loss: held out, in bits per byte")
    for column in ("trial", "loss", *NAMES.values()):
        table.add_column(column, justify="right")
    for number, loss in sorted(losses.items(), key=lambda item: item[1])[:BEST]:
        values = (f"{trials[number].params[name]:.4g}" for name in NAMES)
        table.add_row(str(number), f"{loss:.4f}", *values)
    return table


def plot_trials(trials: Mapping[int, "FrozenTrial"], ranges: Mapping[str, tuple[float, float]], picture: Path) -> None:
    """Plot the loss against each value and trial number, and the best loss so far; diverged trials are at the top."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    numbers = np.array(list(trials))
    losses = np.array([np.nan if trial.value is None else trial.value for trial in trials.values()])
    ended = np.isfinite(losses)
    best = int(np.nanargmin(losses))
    figure, axes = plt.subplots(1, 5, figsize=(13, 3.2), layout="constrained", sharey=True)
    places = {name: np.array([trial.params[name] for trial in trials.values()]) for name in NAMES}
    # Very high losses would flatten the differences between the others, so they are drawn at the top, too.
    low, high = losses[best], float(np.nanquantile(losses, 0.9))
    top = high + 0.1 * (high - low) if high > low else low + 1
    marks = (
        ("o", "C0", losses <= top, "trial"),
        ("^", "C0", losses > top, "trial with a higher loss than the axis shows"),
        ("x", "crimson", ~ended, "trial that diverged"),
    )
    for axis, (name, x) in zip(axes, [*places.items(), ("trial", numbers)], strict=True):
        for marker, color, chosen, label in marks:
            if not chosen.any():  # Matplotlib's layout fails on empty plots without clipping.
                continue
            heights = np.where(losses[chosen] <= top, losses[chosen], top)
            axis.plot(x[chosen], heights, marker, color=color, alpha=0.6, markersize=4, clip_on=False, label=label)
        axis.plot(x[best], losses[best], "o", color="black", markersize=9, markerfacecolor="none", label="best trial")
        axis.set_xlabel(NAMES.get(name, name))
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
        if name in ranges:
            axis.set_xscale("log")
            axis.set_xlim(ranges[name][0] / 1.1, ranges[name][1] * 1.1)
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.tick_params("x", labelrotation=45)
    so_far = np.fmin.accumulate(losses)
    axes[-1].step(numbers, so_far, where="post", color="black", linewidth=1, label="best trial so far")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylim(low - 0.05 * (top - low), top)
    axes[0].set_ylabel("held-out loss (bits per byte)")
    figure.align_xlabels()
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    save_figure(figure, picture)
