"""Prints examples of what each stage did: bad input, short documents, clusters of duplicates, tokens."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from .clean import PROBLEMS, REMOVED
from .dedup import CLUSTERS
from .minhash import document_hashes
from .mix import CONTAMINATED, HELD_OUT
from .parts import first_in, part_of, read_rows, read_table, rows_of
from .recipe import Dedup, Inspection
from .stage import COMPLETE, DOCUMENTS, load_stage

# Number of characters at the beginning of a text of which as many are shown as fit the terminal.
_LENGTH = 1000


def run_inspect(folder: Path | str, options: Inspection | None = None) -> None:
    """Print examples of what the stages in ``folder`` removed and found.

    Args:
        folder: Output of one stage, or of all stages.
        options: What to show; the defaults of :class:`btlm.data.recipe.Inspection` without it.

    Raises:
        ValueError: The folder holds no such stage.
    """
    folder, options = Path(folder), options or Inspection()
    stage = options.stage
    paths = [path for path in (folder, *sorted(folder.glob("*"))) if (path / COMPLETE).exists()]
    stages = {load_stage(path)["stage"]: path for path in paths}
    if not stages:
        raise ValueError(f"{folder} holds no complete stage; give the output of a btlm data command.")
    if stage and stage not in stages:
        raise ValueError(f"{folder} holds no complete stage {stage!r}; it has {', '.join(stages)}.")
    console = Console(highlight=False)
    shown: dict[str, Callable[[Path, int, np.random.Generator], Iterator[str | Text]]] = {
        "read": _inspect_clean,
        "clean": _inspect_clean,
        "dedup": _inspect_dedup,
        "mix": _inspect_mix,
        "tokenize": _inspect_tokens,
    }
    for name, inspect in shown.items():
        if name in stages and stage in (None, name):
            console.rule(Text(f"{name}: {stages[name]}"), align="left")
            for line in inspect(stages[name], options.examples, np.random.default_rng(options.seed)):
                # What can be copied is not cut off.
                cut = {"no_wrap": True, "overflow": "ellipsis"} if isinstance(line, Text) else {"soft_wrap": True}
                console.print(line, **cut)


def _inspect_clean(folder: Path, examples: int, rng: np.random.Generator) -> Iterator[str | Text]:
    import pyarrow.parquet as pq

    files = sorted((folder / PROBLEMS).glob("*.jsonl"))
    problems = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    yield f"[bold]{len(problems):,} bad documents or files[/bold]"
    for reason, number in Counter(_kind(problem["reason"]) for problem in problems).most_common():
        example = next(problem for problem in problems if _kind(problem["reason"]) == reason)
        yield escape(f"  {number:6,}  {example['reason']}   e.g. {example['file']}, line {example['line']}")
    parts = sorted((folder / REMOVED).glob("*.parquet"))
    short = [first_in(part.name) + row for part in parts for row in range(pq.read_metadata(part).num_rows)]
    yield from _examples(folder / REMOVED, short, "short documents", examples, rng)


def _kind(reason: str) -> str:
    """A reason without its numbers and details."""
    return "".join(character for character in reason.split(" (")[0] if not character.isdigit() and character != ",")


def _inspect_dedup(folder: Path, examples: int, rng: np.random.Generator) -> Iterator[str | Text]:
    stage = load_stage(folder)
    source = folder / stage["before"] / DOCUMENTS
    options = Dedup(**{**stage["history"]["dedup"]["settings"]["dedup"], "threshold": None})
    clusters: dict[int, list[int]] = {}
    table = read_table(folder / CLUSTERS)
    for document, kept in rows_of(table, "document", "kept"):
        if kept >= 0:
            clusters.setdefault(kept, []).append(document)
    if stage.get("against"):
        rows = rows_of(table, "document", "earlier_run", "earlier_source", "earlier_id")
        known = [row for row in rows if row[1] is not None]
        yield f"[bold]{len(known):,} near-duplicates of documents of earlier runs[/bold]"
        for document, run, other_source, other_id in _some(known, examples, rng):
            found = _look_up(source, document)
            yield from _document(found["source"], found["id"], found["text"])
            place = os.path.normpath(folder / stage["against"][run][0])
            yield escape(f"    matches  {_printable(other_source)}  {_printable(other_id)}  in {place}")
    sizes = Counter(len(members) for members in clusters.values())
    yield f"[bold]{len(clusters):,} clusters of near-duplicates[/bold]; the longest document of each is kept"
    yield "  documents per cluster: number of clusters   " + ", ".join(
        f"{size}: {number:,}" for size, number in sorted(sizes.items())
    )
    largest = sorted(clusters, key=lambda kept: (-len(clusters[kept]), kept))[:1]
    for kept in [*largest, *_some(sorted(set(clusters) - set(largest)), examples - 1, rng)]:
        others = sorted(set(clusters[kept]) - {kept})
        text = _look_up(source, kept)
        yield f"[bold]cluster of {len(others) + 1}[/bold]"
        yield from _document(text["source"], text["id"], text["text"], "kept    ")
        for other in _some(others, examples, rng):
            copy = _look_up(source, other)
            similarity = _jaccard(text["text"], copy["text"], options)
            yield from _document(copy["source"], copy["id"], copy["text"], f"J = {similarity:.2f}")


def _jaccard(first: str, second: str, options: Dedup) -> float:
    """Jaccard similarity of the shingles of two texts."""
    sets = []
    for text in (first, second):
        hashes = list(document_hashes(text, options))
        sets.append(np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64))
    common = len(np.intersect1d(sets[0], sets[1], assume_unique=True))
    return common / max(1, len(sets[0]) + len(sets[1]) - common)


def _inspect_mix(folder: Path, examples: int, rng: np.random.Generator) -> Iterator[str | Text]:
    source = folder / load_stage(folder)["before"] / DOCUMENTS
    plan = sorted(rows_of(read_table(folder / HELD_OUT), "split", "document"))
    titles = {
        "contaminated": "documents that share an n-gram with an evaluation set",
        "copy of held out": "training documents equal to a held-out one",
        "validation": "validation documents",
        "test": "test documents",
    }
    for split, title in titles.items():
        documents = [document for name, document in plan if name == split]
        if split == "contaminated" and not (folder / CONTAMINATED).exists():
            continue
        yield from _examples(source, documents, title, examples, rng)


def _inspect_tokens(folder: Path, examples: int, rng: np.random.Generator) -> Iterator[str | Text]:
    from .shards import TokenShards
    from .tokenize import decode

    shards = TokenShards(folder)
    for split, counts in shards.manifest["splits"].items():
        yield f"[bold]{split}: {counts['tokens']:,} tokens in {counts['documents']:,} documents[/bold]"
        starts = rng.integers(0, max(1, counts["tokens"] - 64), examples if counts["tokens"] else 0)
        for start in sorted(map(int, starts)):
            text = decode(shards.tokens(split, start, min(64, counts["tokens"] - start)))
            yield from _document("token", f"{start:,}", text)


def _examples(
    folder: Path, documents: list[int], title: str, examples: int, rng: np.random.Generator
) -> Iterator[str | Text]:
    yield f"[bold]{len(documents):,} {title}[/bold]"
    for document in _some(documents, examples, rng):
        found = _look_up(folder, document)
        yield from _document(found["source"], found["id"], found["text"])


def _look_up(folder: Path, document: int) -> dict[str, Any]:
    """A document by its number; only its row group is read."""
    found: dict[str, Any] = read_rows(folder / part_of(document), document).to_pylist()[0]
    return found


def _some(items: list[Any], number: int, rng: np.random.Generator) -> list[Any]:
    chosen = rng.permutation(len(items))[: max(0, number)]
    return [items[index] for index in sorted(chosen)]


def _document(source: str, id_: str, text: str, label: str = "") -> Iterator[str | Text]:
    yield escape(f"  {label}  {_printable(source)}  {_printable(id_)}  ({len(text):,} characters)")
    start = _printable(" ".join(text[:_LENGTH].split()))
    yield Text(f"    {start}", "dim")


def _printable(text: str) -> str:
    """A text in which control characters, which could move the cursor or change colours, are U+FFFD."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
