"""The command `btlm perplexity`: reads texts, prints a table, writes `results.json`."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.console import plural, progress_bars

from .options import Perplexity
from .perplexity import Scored, in_tokens, read_texts, score, texts_digest
from .results import Result, write_results


def run_perplexity(
    model: Checkpoint | Path | str,
    texts: Sequence[Path | str],
    options: Perplexity | None = None,
    *,
    base: Path | str | None = None,
) -> list[Result]:
    """Measure how well a model predicts texts, and print a table to standard output.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        texts: Text files, of which each is a document, JSON lines, Parquet, and folders of such files.
        options: How to read them.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Returns:
        Rows for `results.json`, of the model and of each copy.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or Perplexity()
    checkpoint = open_checkpoint(model, base)
    copies = [Checkpoint.open(copy) for copy in options.compare]
    found = in_tokens(read_texts(texts, options.text_field), checkpoint.tokenizer)
    if options.limit is None:
        measured, partial = list(found), False
    else:
        measured = list(islice(found, options.limit))
        partial = next(found, None) is not None
    stride = options.stride or options.context
    with progress_bars() as progress:
        task = progress.add_task("predict", total=sum(len(text.ids) for text in measured))
        scored = score(
            checkpoint,
            copies,
            measured,
            context=options.context,
            stride=stride,
            on_tokens=lambda number: progress.advance(task, number),
            cache_dtype=options.cache_dtype,
            kernels=options.kernels,
            threads=options.threads,
        )
    settings = {
        "texts": [str(text) for text in texts],
        "text_sha256": texts_digest(measured),
        "context": options.context,
        "stride": stride,
        "cache_dtype": options.cache_dtype,
    }
    rows = [
        row for one in scored for row in one.results(settings, None if one is scored[0] else scored[0], partial=partial)
    ]
    Console().print(perplexity_table(scored, rows))
    if options.output is not None:
        write_results(Path(options.output), rows)
    return rows


# Metrics of the table, by the titles of its columns.
_COLUMNS = {
    "nats\nper token": "nats_per_token",
    "perplexity": "perplexity",
    "change": "perplexity_change",
    "bits\nper byte": "bits_per_byte",
    "word\nperplexity": "word_perplexity",
    "KL, nats\nper token": "kl_per_token",
    "same first\ntoken": "same_first_token",
}


def perplexity_table(scored: Sequence[Scored], rows: Sequence[Result]) -> Table:
    """Results as a table, one row per model; ± is the standard error over documents."""
    first = scored[0]
    caption = (
        f"{plural(len(first.sums), 'document')}, {first.total('tokens'):,} tokens, {first.total('bytes'):,} bytes, "
        f"{first.total('tokens') / first.total('bytes'):.3f} tokens per byte; ± is the standard error over documents"
    )
    if rows[0].partial:
        caption = f"partial: {caption}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    shown = {title: metric for title, metric in _COLUMNS.items() if any(row.metric == metric for row in rows)}
    for title in shown:
        table.add_column(title, justify="right")
    for one, figures in zip(scored, _by_model(rows), strict=True):
        table.add_row(Text(one.title), *(_cell(figures.get(metric)) for metric in shown.values()))
    return table


def _by_model(rows: Sequence[Result]) -> list[dict[str, Result]]:
    """The rows of each model by metric; those of a model begin with the same metric."""
    models: list[dict[str, Result]] = []
    for row in rows:
        if row.metric == rows[0].metric:
            models.append({})
        models[-1][row.metric] = row
    return models


def _cell(row: Result | None) -> str:
    if row is None:
        return ""
    if row.metric == "perplexity_change":
        return f"{row.value:+.2%}"
    if row.metric == "same_first_token":
        return f"{row.value:.2%}"
    error = "" if row.standard_error is None else f" ± {row.standard_error:.2g}"
    return f"{row.value:,.4f}{error}" if row.value < 1000 else f"{row.value:,.0f}{error}"
