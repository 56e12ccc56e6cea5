"""Stages: a folder each, complete when ``stage.json`` is there.

A stage begins by writing what it depends on, its *key*. The same key goes on where the last attempt ended; another one
is refused.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from btlm.errors import OptionError
from btlm.files import file_sha256, locked, remove_partial_files, write_json

from .recipe import Execution

# Differences that an error names.
_DIFFERENCES = 3

BEGUN, COMPLETE, LOG, DOCUMENTS = "begun.json", "stage.json", "log.txt", "documents"


@dataclass(frozen=True)
class Run:
    """One command: how its tasks are executed, and where it tells what it does."""

    execution: Execution
    console: Console
    log: Path

    @property
    def workers(self) -> int:
        """Tasks at a time."""
        return self.execution.workers or os.cpu_count() or 1

    def say(self, line: str) -> None:
        """Print a line, and append it to the log with the time."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


@contextmanager
def open_run(output: Path | str, execution: Execution) -> Iterator[Run]:
    """Everything that a command needs to run stages into ``output``, which no other command works in meanwhile.

    Raises:
        ValueError: Another command works in ``output``, or it holds files that no stage wrote.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder.")
    if pattern := sorted(set(str(output.resolve())) & set("*?[]{}")):
        raise ValueError(
            f"The path of {output} holds {' '.join(pattern)}, which DuckDB takes for a pattern; give another."
        )
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()) and not (output / LOG).exists():
        raise ValueError(f"{output} holds files that are not of a data stage; give a new or empty folder.")
    with locked(output / LOG, f"Another command works in {output}; wait for it, or give another folder."):
        yield Run(execution, Console(stderr=True), output / LOG)


def begin(folder: Path, name: str, key: Mapping[str, Any], run: Run) -> bool:
    """Start or continue a stage.

    Args:
        folder: Of the stage.
        name: Of the stage.
        key: Everything that its output depends on, as plain values.
        run: ``run.execution.force`` starts over where the key is another.

    Returns:
        Whether the stage is complete already.

    Raises:
        ValueError: The folder holds a stage of another key; names what differs.
    """
    key = json.loads(json.dumps({"stage": name, **key}))
    if (folder / BEGUN).exists():
        before = json.loads((folder / BEGUN).read_text())
        if before != key:
            if not run.execution.force:
                raise OptionError(
                    "{} holds a stage of other settings or input ({}); give another folder, or {force} to start this "
                    "stage over.",
                    *(folder, _list(_differences(before, key))),
                )
            _start_over(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / BEGUN).exists():
        write_json(folder / BEGUN, key)
    if (folder / COMPLETE).exists():
        run.say(f"{name}: complete already in {folder}")
        return True
    remove_partial_files(folder)
    return False


def _start_over(folder: Path) -> None:
    """Remove what a stage has written. Killed in between, the stage has its old key and is not complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not (path / BEGUN).exists():  # a stage inside has its own key
            shutil.rmtree(path)
        elif path.is_file() and path.name not in (LOG, BEGUN):
            path.unlink()
    (folder / BEGUN).unlink()


def finish(folder: Path, result: Mapping[str, Any], before: Path | None = None) -> dict[str, Any]:
    """Mark a stage as complete, with what it tells those after it.

    Args:
        folder: Of the stage.
        result: Plain values; ``sources`` are its counts.
        before: Folder of the stage that it continues.

    Returns:
        The stage: the result with ``before``, the path to the folder of that stage from this one, and ``history``, the
        settings and counts of all stages so far by their names. Nothing in the history depends on when or where it ran.
    """
    remove_partial_files(folder)
    key = json.loads((folder / BEGUN).read_text())
    name = key.pop("stage")
    settings = {part: value for part, value in key.items() if part != "input"}
    history = load_stage(before)["history"] if before else {}
    history[name] = {"settings": settings, "sources": result.get("sources", {})}
    linked = {"before": os.path.relpath(before, folder)} if before else {}
    write_json(folder / COMPLETE, {"stage": name, "key": key, "history": history, **linked, **result})
    return load_stage(folder)


def load_stage(folder: Path) -> dict[str, Any]:
    """What a complete stage tells: its ``key`` and its result.

    Raises:
        ValueError: The stage is not complete.
    """
    if not (folder / COMPLETE).exists():
        raise ValueError(f"{folder} is not a complete stage; run the command that writes it again.")
    stage: dict[str, Any] = json.loads((folder / COMPLETE).read_text())
    return stage


def key_digest(folder: Path) -> str:
    """A short name for the key of the stage that was begun in a folder; ``none`` if there is none."""
    begun = folder / BEGUN
    return file_sha256(begun)[:12] if begun.exists() else "none"


def stage_digest(folder: Path) -> str:
    """What the key of a stage says of the stage before it."""
    return file_sha256(folder / COMPLETE)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        values = [json.dumps(value) for value in (before, now)]
        if max(map(len, values)) < 60 and name.split(".")[0] != "input":
            yield f"{name} was {values[0]}, is {values[1]}"
        else:
            yield f"{name} {'is new' if before is None else 'is gone' if now is None else 'has changed'}"


def _list(differences: Iterator[str]) -> str:
    first = list(islice(differences, _DIFFERENCES))
    return "; ".join([*first, *(["and more"] if next(differences, None) else [])])
