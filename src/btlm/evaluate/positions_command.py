"""The command `btlm eval-positions`: reads texts, prints a table, draws figure 5, writes `results.json`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.console import note, plural, progress_bars
from btlm.engine.memory import peak_memory
from btlm.errors import OptionError
from btlm.plots import need_matplotlib, pyplot, save_figure

from .options import Positions
from .perplexity import begin_of_text, in_tokens, ratio_of_totals, read_texts, texts_digest
from .positions import Curve, Windows, cut_windows, measure, rows_of, scalings_of
from .results import Origin, Result, write_results

_BINS = 16  # where their width is not given
_CONFIDENCE = 1.96  # standard errors: 95% of a normal distribution


def run_positions(
    model: Checkpoint | Path | str,
    texts: Sequence[Path | str],
    options: Positions | None = None,
    *,
    base: Path | str | None = None,
) -> list[Result]:
    """Measure a model's loss by position, and print a table to standard output.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        texts: Text files, of which each is a document, JSON lines, Parquet, and folders of such files.
        options: What to measure.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Returns:
        Rows for `results.json`, per interpolation, bin and metric.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or Positions()
    if options.plot is not None:
        need_matplotlib()
    checkpoint = open_checkpoint(model, base)
    architecture = checkpoint.architecture
    trained = options.train_length or architecture.n_positions
    length = options.length or 4 * trained
    scalings = scalings_of(options.scalings, length, trained)
    if architecture.position_embedding_type == "learned" and (
        length > architecture.n_positions or any(s.factor > 1 for s in scalings)
    ):
        raise OptionError(
            "{} has {} learned positions and no interpolation; give a {length} of at most that, and {scalings} none.",
            checkpoint.name,
            architecture.n_positions,
        )
    found = list(in_tokens(read_texts(texts, options.text_field), checkpoint.tokenizer))
    windows = cut_windows(
        found,
        checkpoint.tokenizer,
        before=begin_of_text(checkpoint),
        length=length,
        number=options.windows,
        bin_tokens=options.bin or -(-length // _BINS),
    )
    with progress_bars() as progress:
        task = progress.add_task("predict", total=len({s.factor for s in scalings}) * len(windows.ids) * length)
        curves = list(
            measure(
                checkpoint,
                windows,
                scalings,
                on_tokens=lambda number: progress.advance(task, number),
                cache_dtype=options.cache_dtype,
                kernels=options.kernels,
                threads=options.threads,
            )
        )
    settings = {
        "texts": [str(text) for text in texts],
        "text_sha256": texts_digest(found),
        "length": length,
        "train_length": trained,
        "cache_dtype": options.cache_dtype,
    }
    rows = rows_of(curves, windows, Origin.of(checkpoint), settings)
    Console().print(positions_table(curves, windows))
    note(f"peak memory {peak_memory() / 1e9:.2f} GB")
    if options.plot is not None:
        plot_positions(curves, windows, trained, checkpoint.title, Path(options.plot))
    if options.output is not None:
        write_results(Path(options.output), rows)
    return rows


def positions_table(curves: Sequence[Curve], windows: Windows) -> Table:
    """The loss by position: of the first interpolation, and what the others add."""
    number, documents = plural(len(windows.ids), "window"), plural(windows.documents, "document")
    caption = (
        f"mean of {number} (of {windows.of:,}) from {documents}; ± is the standard error over windows, of differences "
        "window by window"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    table.add_column("positions", justify="right", no_wrap=True)
    columns = []
    for curve in curves:
        below = "nats per token" if curve is curves[0] else f"less {curves[0].scaling}"
        table.add_column(f"{curve.scaling}\n{below}", justify="right", no_wrap=True)
        if curve is curves[0]:
            columns.append(_cells(*ratio_of_totals(curve.nats, windows.tokens), ".4f"))
        else:
            columns.append(_cells(*ratio_of_totals(curve.nats - curves[0].nats, windows.tokens), "+.4f"))
    for i, (first, last) in enumerate(windows.bins):
        table.add_row(f"{first:,} to {last:,}", *(column[i] for column in columns))
    return table


def _cells(values: Iterable[float], errors: Iterable[float], form: str) -> list[str]:
    return [
        f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:.4f}")
        for value, error in zip(values, errors, strict=True)
    ]


def plot_positions(curves: Sequence[Curve], windows: Windows, trained: int, title: str, picture: Path) -> None:
    """Draw the loss against the position: a line with its 95% band per interpolation.

    Args:
        curves, windows: What was measured.
        trained: Training length, which is marked.
        title: Name of the model.
        picture: PNG file to write.
    """
    from matplotlib.ticker import FuncFormatter

    figure, axis = pyplot().subplots(figsize=(7.5, 4.2), layout="constrained")
    middles = [(first + last + 1) / 2 for first, last in windows.bins]
    for number, curve in enumerate(curves):
        values, errors = ratio_of_totals(curve.nats, windows.tokens)
        width = _CONFIDENCE * errors
        style = ("-", "--", ":", "-.")[number % 4]
        axis.plot(middles, values, style, marker=".", color=f"C{number}", label=str(curve.scaling))
        axis.fill_between(middles, values - width, values + width, color=f"C{number}", alpha=0.2, linewidth=0)
    if trained < windows.edges[-1]:
        axis.axvline(trained, color="0.6", linewidth=1)
        at = axis.get_xaxis_transform()
        axis.annotate("training length", (trained, 1), (3, -3), at, "offset points", va="top", size=8, color="0.35")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set(xlabel="position (tokens)", ylabel="nats per token", xlim=(0, windows.edges[-1]), title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, title="position interpolation", alignment="left")
    save_figure(figure, picture, dpi=130)
