"""The stages `read` and `clean`: read any input, normalize the documents, and drop the short ones."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from btlm.files import write_text
from btlm.settings import plain

from .documents import Problem, Unit, list_units, read_unit
from .minhash import normalized_length_reaches
from .parts import PartWriter, sum_counts
from .recipe import Clean, Read
from .shards import MAX_SOURCES
from .stage import DOCUMENTS, Run, begin, finish, load_stage
from .tasks import Advance, run_tasks

UNITS, PROBLEMS, REMOVED = "units.jsonl", "problems", "removed"

# Number of bad inputs that an error or the log quotes.
_EXAMPLES = 3


def clean_documents(
    inputs: Sequence[Path | str], folder: Path, read: Read, clean: Clean, run: Run, name: str = "clean"
) -> dict[str, Any]:
    """Read, normalize and filter documents.

    ``folder`` receives the documents, the short ones that were dropped (``removed/``), and a list of the bad input
    (``problems/``, JSON lines with file, line and reason).

    Returns:
        The stage's result: ``parts``, and ``sources`` with the counts per source.

    Raises:
        ValueError: An input cannot be used, or more than ``read.max_bad_documents`` documents are bad.
    """
    units, others, hidden = list_units(inputs, read)
    for files, kind in ((others, "of unknown kinds"), (hidden, "that are hidden")):
        if files:
            run.say(f"  Files {kind} were skipped: {len(files):,}, such as {files[0]}")
    settings = {key: value for key, value in plain(read).items() if key != "max_bad_documents"}
    given: dict[str, list[Any]] = {}
    for unit in units:  # files of several folders may have the same name
        given.setdefault(unit.names[0], []).append([unit.names, unit.bytes, unit.version, unit.shard])
    if begin(folder, name, {"read": settings, "clean": plain(clean), "input": given}, run):
        return load_stage(folder)
    write_text(folder / UNITS, "".join(json.dumps(unit) + "\n" for unit in units))
    task = partial(_clean_unit, folder, read, clean)
    results = run_tasks(folder, name, task, [unit.bytes for unit in units], run)

    limit = read.max_bad_documents
    sources = sum_counts(result["sources"] for result in results)
    problems = [problem for result in results for problem in result["problems"]]
    number = sum(result["num_problems"] for result in results)
    if number:
        run.say(f"  {number:,} bad documents or files left out (limit {limit:,}), listed in {folder / PROBLEMS}")
        for problem in problems[:_EXAMPLES]:
            run.say(f"    {_place(problem)}: {problem[2]}")
    if number > limit:
        raise ValueError(_too_many(number, read, problems))
    if len(sources) > MAX_SOURCES:
        raise ValueError(
            f"The documents have {len(sources):,} sources, more than the {MAX_SOURCES:,} that shards can tell apart; "
            "name the field of the source with read.source_fields, or set one source for all with read.source."
        )
    parts = [part for result in results for part in result["parts"]]
    if not parts:
        raise ValueError("No document is left; check the settings of `read` and `clean`.")
    return finish(folder, {"parts": parts, "sources": sources})


def _clean_unit(folder: Path, read: Read, clean: Clean, task: int, advance: Advance) -> dict[str, Any]:
    with (folder / UNITS).open() as lines:
        unit = Unit(*json.loads(next(islice(lines, task, None))))
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    problems: list[Problem] = []
    kept = PartWriter(folder / DOCUMENTS, task, read.part_bytes)
    short = PartWriter(folder / REMOVED, task, read.part_bytes)
    for document in read_unit(unit, read, advance):
        if isinstance(document, Problem):
            problems.append(document)
            if len(problems) > read.max_bad_documents:
                break  # the limit is that of the whole stage, which has failed already
            continue
        counts = {"documents": 1, "bytes": len(document.text.encode())}
        if clean.normalization != "none":
            document = document._replace(text=unicodedata.normalize(clean.normalization, document.text))
        is_short = clean.min_characters and not normalized_length_reaches(document.text, clean.min_characters)
        writer, result = (short, "short") if is_short else (kept, "clean")
        encoded = document.text.encode()
        writer.add(document, len(encoded), hashlib.sha256(encoded).hexdigest())
        sources[document.source].update(counts | {f"{result}_documents": 1, f"{result}_bytes": len(encoded)})
    if problems:
        (folder / PROBLEMS).mkdir(exist_ok=True)
        listed = "".join(json.dumps(problem._asdict()) + "\n" for problem in problems)
        write_text(folder / PROBLEMS / f"{task:06d}.jsonl", listed)
    if len(problems) > read.max_bad_documents:
        raise ValueError(_too_many(len(problems), read, problems))
    kept.flush()
    short.flush()
    first = problems[:_EXAMPLES]
    return {"parts": kept.parts, "sources": sources, "num_problems": len(problems), "problems": first}


def _too_many(number: int, read: Read, problems: Sequence[Sequence[Any]]) -> str:
    return (
        f"{number:,} bad documents, more than read.max_bad_documents ({read.max_bad_documents:,}); the first: "
        f"{_place(problems[0])}: {problems[0][2]}. Fix the input, or raise the limit."
    )


def _place(problem: Sequence[Any]) -> str:
    return f"{problem[0]}, line {problem[1]}" if problem[1] else str(problem[0])
