"""The command `btlm eval-needle`: asks for hidden facts, prints a table, draws a heat map, writes `results.json`."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.console import progress_bars
from btlm.errors import OptionError
from btlm.plots import need_matplotlib, pyplot, save_figure

from .needle import FILLER, KINDS, Cell, ask, rows_of
from .options import Needle
from .perplexity import read_texts
from .results import Origin, Result, write_results

_TITLES = {
    "text": "a fact in text",
    "random": "two random tokens in random tokens",
    "absent": "control: the fact is not there",
}


def run_needle(
    model: Checkpoint | Path | str, options: Needle | None = None, *, base: Path | str | None = None
) -> list[Result]:
    """Measure whether a model finds facts in its context, and print a table to standard output.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        options: What to ask.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Returns:
        Rows for `results.json`, per kind, length and depth.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or Needle()
    if options.plot is not None:
        need_matplotlib()
    checkpoint = open_checkpoint(model, base)
    positions = checkpoint.architecture.n_positions
    lengths = sorted(set(options.lengths or (max(32, positions // part) for part in (8, 4, 2, 1))))
    haystack = FILLER if not options.text else "\n".join(one.text for one in read_texts(options.text, "text"))
    if not haystack.strip():
        raise OptionError("{text} is {}, which holds no text.", ", ".join(options.text))
    depths = sorted({percent / 100 for percent in options.depths})
    total = sum(len(lengths) * (1 if kind == "absent" else len(depths)) for kind in KINDS) * options.trials
    with progress_bars() as progress:
        task = progress.add_task("ask", total=total)
        cells = list(
            ask(
                checkpoint,
                haystack=haystack,
                lengths=lengths,
                depths=depths,
                kinds=KINDS,
                number=options.trials,
                answers=options.answers,
                seed=options.seed,
                on_trials=lambda number: progress.advance(task, number),
                cache_dtype=options.cache_dtype,
                kernels=options.kernels,
                threads=options.threads,
            )
        )
    settings = {
        "haystack": list(options.text) or "passkey",
        "answers": options.answers,
        "chance": 1 / options.answers,
        "seed": options.seed,
        "cache_dtype": options.cache_dtype,
    }
    rows = rows_of(cells, Origin.of(checkpoint), settings)
    Console().print(needle_table(cells, options.answers))
    if options.plot is not None:
        plot_needle(cells, options.answers, checkpoint.title, Path(options.plot))
    if options.output is not None:
        write_results(Path(options.output), rows)
    return rows


def needle_table(cells: Sequence[Cell], answers: int) -> Table:
    """Percent of right answers: a row per kind and length, a column per depth."""
    caption = (
        f"right answers in percent, {cells[0].number} questions each; chance is {1 / answers:.0%}, with one of "
        f"{answers} answers; the largest standard error is {max(cell.error for cell in cells):.0%}"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    depths = _depths(cells)
    table.add_column("")
    table.add_column("tokens", justify="right")
    for depth in depths:
        table.add_column(f"depth\n{depth:.0%}", justify="right")
    last = ""
    for kind, length in dict.fromkeys((cell.kind, cell.length) for cell in cells):
        found = {cell.depth: cell for cell in cells if (cell.kind, cell.length) == (kind, length)}
        shown = [found.get(depth) for depth in depths] if kind != "absent" else [found[None]]
        title, last = (_TITLES[kind] if kind != last else ""), kind
        table.add_row(title, f"{length:,}", *("" if cell is None else f"{100 * cell.share:.0f}" for cell in shown))
    return table


def plot_needle(cells: Sequence[Cell], answers: int, title: str, picture: Path) -> None:
    """Draw heat maps of right answers by depth and length, with the numbers in their cells.

    Args:
        cells: What was measured.
        answers: Number of answers to choose from.
        title: Name of the model.
        picture: PNG file to write.
    """
    lengths, depths = sorted({cell.length for cell in cells}), _depths(cells)
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    widths = [1 if kind == "absent" else len(depths) for kind in kinds]
    figure, axes = pyplot().subplots(
        1,
        len(kinds),
        figsize=(3.5 + 0.6 * sum(widths), 1.9 + 0.42 * len(lengths)),
        layout="constrained",
        squeeze=False,
        sharey=True,
        width_ratios=[width + 0.6 for width in widths],
    )
    for axis, kind, width in zip(axes[0], kinds, widths, strict=True):
        found = {(cell.length, cell.depth): cell.share for cell in cells if cell.kind == kind}
        columns = [None] if kind == "absent" else depths
        shares = [[found[length, depth] for depth in columns] for length in lengths]
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                color = "white" if share > 0.6 else "black"
                axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=color, size=9)
        axis.set_xticks(range(width), [""] if kind == "absent" else [f"{depth:.0%}" for depth in depths])
        axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.tick_params(length=0)
        axis.set_title(_TITLES[kind].replace(" in ", "\nin ").replace(": ", ":\n").replace("is not", "is\nnot"), size=9)
        axis.set_xlabel("" if kind == "absent" else "depth of the fact")
    axes[0, 0].set_ylabel("tokens")
    figure.suptitle(f"{title}: right answers in percent; chance is {1 / answers:.0%}", size=10)
    save_figure(figure, picture, dpi=130)


def _depths(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.depth for cell in cells if cell.depth is not None})
