"""A report of what the stages did to each source, like SlimPajama's table: as text, JSON and a picture."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from btlm.files import write_json, write_text
from btlm.plots import pyplot, save_figure

from .stage import Run, load_stage

TEXT, JSON, PICTURE = "report.txt", "report.json", "report.png"
# Width of report.txt, longest source name that is shown, both in characters, and largest number of bars in the picture.
_WIDTH, _NAME, _BARS = 120, 30, 30


def write_report(stage: Path, folder: Path, run: Run) -> None:
    """Write ``report.txt``, ``report.json`` and ``report.png`` on a stage and those before it, and print the table."""
    rows = report_rows(load_stage(stage))
    write_json(folder / JSON, rows)
    _print(Console(file=(text := io.StringIO()), width=_WIDTH), rows)
    write_text(folder / TEXT, text.getvalue())
    plot_report(rows, folder / PICTURE)
    _print(run.console, rows)
    run.say(f"Wrote {folder / TEXT}, {folder / JSON} and {folder / PICTURE}")


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    for number, table in enumerate(report_tables(rows, console.width)):
        console.print(*([""] if number else []), table, sep="\n")


def report_rows(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """Counts per source and for ``all`` together; stages that did not run have no counts.

    ``documents`` and ``bytes`` count the input as it was read; ``tokens`` counts all splits, including one end-of-text
    per document.
    """
    history = stage["history"]
    sources = sorted({source for entry in history.values() for source in entry["sources"]})
    rows = []
    for source in sources:
        counts: dict[str, int] = {}
        for entry in history.values():
            counts |= entry["sources"].get(source, {})
        row: dict[str, Any] = {
            "source": source,
            "documents": counts.get("documents", 0),
            "bytes": counts.get("bytes", 0),
        }
        if "clean" in history:
            row |= _pair(counts, "short")
        if "dedup" in history:
            row |= _pair(counts, "duplicate") | _pair(counts, "kept")
        if "mix" in history:
            if history["mix"]["settings"]["decontaminate"]:
                row |= _pair(counts, "contaminated")
            row |= _pair(counts, "train") | _pair(counts, "validation") | _pair(counts, "test")
        if "manifest" in stage:
            splits = stage["manifest"]["splits"].values()
            row["tokens"] = sum(split["sources"].get(source, {}).get("tokens", 0) for split in splits)
        rows.append(row)
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key != "source"}
    rows.append({"source": "all", **total})
    for row in rows:
        if "tokens" in row:
            row["share_of_tokens"] = row["tokens"] / total["tokens"]
    return rows


def _pair(counts: dict[str, int], name: str) -> dict[str, int]:
    return {f"{name}_{unit}": counts.get(f"{name}_{unit}", 0) for unit in ("documents", "bytes")}


def report_tables(rows: list[dict[str, Any]], width: int) -> list[Table]:
    """The rows as tables below each other, each with as many columns as fit a width in characters.

    Percentages are relative to the input of each stage.
    """
    columns: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
        ("documents", "documents", lambda row: f"{row['documents']:,}"),
        ("MB", "bytes", lambda row: f"{row['bytes'] / 1e6:,.1f}"),
        ("too short\n% docs", "short_documents", lambda row: _percent(row["short_documents"], row["documents"])),
        ("duplicate\n% docs", "duplicate_documents", lambda row: _percent(*_of_kept(row, "documents"))),
        ("duplicate\n% bytes", "duplicate_bytes", lambda row: _percent(*_of_kept(row, "bytes"))),
        ("kept\ndocs", "kept_documents", lambda row: f"{row['kept_documents']:,}"),
        ("kept\nMB", "kept_bytes", lambda row: f"{row['kept_bytes'] / 1e6:,.1f}"),
        ("in eval\nsets", "contaminated_documents", lambda row: f"{row['contaminated_documents']:,}"),
        ("train\ndocs", "train_documents", lambda row: f"{row['train_documents']:,}"),
        ("valid.\ndocs", "validation_documents", lambda row: f"{row['validation_documents']:,}"),
        ("test\ndocs", "test_documents", lambda row: f"{row['test_documents']:,}"),
        ("tokens", "tokens", lambda row: f"{row['tokens']:,}"),
        ("tokens\n%", "share_of_tokens", lambda row: f"{100 * row['share_of_tokens']:.1f}"),
    ]
    names = _short_names(rows)
    groups: list[list[tuple[str, list[str]]]] = []
    left = 0
    for title, cells in ((title, [value(row) for row in rows]) for title, key, value in columns if key in rows[0]):
        size = 3 + max(map(cell_len, [*title.split("\n"), *cells]))
        if size > left:
            groups.append([])
            left = width - max(map(cell_len, ["source", *names]))
        groups[-1].append((title, cells))
        left -= size
    return [_table(names, group) for group in groups]


def _table(names: list[str], columns: list[tuple[str, list[str]]]) -> Table:
    table = Table("source", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row, name in enumerate(names):
        if row == len(names) - 1:
            table.add_section()
        table.add_row(escape(name), *(cells[row] for _, cells in columns))
    return table


def _short_names(rows: list[dict[str, Any]]) -> list[str]:
    """Source names to show: printable, and cut if they are long."""
    names = [row["source"] for row in rows]
    names = ["".join(character if character.isprintable() else "\ufffd" for character in name) for name in names]
    return [name if len(name) <= _NAME else f"{name[:_NAME]}..." for name in names]


def _of_kept(row: dict[str, Any], unit: str) -> tuple[int, int]:
    return row[f"duplicate_{unit}"], row[f"duplicate_{unit}"] + row[f"kept_{unit}"]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "-"


def plot_report(rows: list[dict[str, Any]], picture: Path) -> None:
    """Plot the shares of each source that were kept and removed, as a PNG; of many sources, the largest are shown."""
    plt = pyplot()
    if len(rows) > _BARS:
        largest = sorted(rows[:-1], key=lambda row: -row["bytes"])[: _BARS - 1]
        rows = [*(row for row in rows if any(row is one for one in largest)), rows[-1]]
    names, places = _short_names(rows), range(len(rows))
    fates = [
        ("short", "too short", "C1"),
        ("duplicate", "duplicate", "C3"),
        ("contaminated", "in an evaluation set", "C4"),
    ]
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 0.9 + 0.42 * len(rows)), layout="constrained", sharey=True, squeeze=False
    )
    for axis, unit in zip(axes[0], ("documents", "bytes"), strict=True):
        left = [0.0] * len(rows)
        for key, label, color in fates:
            if f"{key}_{unit}" not in rows[0]:
                continue
            widths = [100 * row[f"{key}_{unit}"] / max(1, row[unit]) for row in rows]
            axis.barh(places, widths, left=left, color=color, label=label, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.barh(places, [100 - start for start in left], left=left, color="0.85", label="kept", height=0.7)
        for y, row in enumerate(rows):
            amount = f"{row[unit]:,}" if unit == "documents" else f"{row[unit] / 1e6:,.1f} MB"
            axis.text(99, y, amount, ha="right", va="center", fontsize=8, color="0.25")
        axis.set(xlabel=f"% of the {unit} read", xlim=(0, 100))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    axes[0, 0].set_yticks(places, names, parse_math=False)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        save_figure(figure, picture)
