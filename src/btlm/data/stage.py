"""Stages of the data pipeline: each has a folder, and is complete when the folder holds ``stage.json``.

A stage first writes its *key*: everything that its output depends on. An attempt with the same key continues where the
last one ended; an attempt with another key is refused.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from btlm.console import first_of
from btlm.errors import OptionError
from btlm.files import LOCK, file_sha256, is_empty, locked, remove_partial_files, write_json

from .recipe import Execution

BEGUN, COMPLETE, LOG, DOCUMENTS = "begun.json", "stage.json", "log.txt", "documents"


@dataclass(frozen=True)
class Run:
    """How one command executes its tasks, and where it reports what it does."""

    execution: Execution
    console: Console
    log: Path

    @property
    def workers(self) -> int:
        """Number of tasks that run at the same time."""
        return self.execution.workers or os.cpu_count() or 1

    def say(self, line: str) -> None:
        """Print a line, and append it to the log with the time."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


@contextmanager
def open_run(output: Path | str, execution: Execution) -> Iterator[Run]:
    """Lock ``output`` for one command, and yield what its stages need to run.

    Raises:
        ValueError: Another command works in ``output``, or it holds files that no stage wrote.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder.")
    if pattern := sorted(set(str(output.resolve())) & set("*?[]{}")):
        raise ValueError(
            f"The path of {output} contains {' '.join(pattern)}, which DuckDB takes for a pattern; give another."
        )
    output.mkdir(parents=True, exist_ok=True)
    if not is_empty(output) and not (output / LOG).exists():
        raise ValueError(f"{output} holds files that no data stage wrote; give a new or empty folder.")
    with locked(output):
        (output / LOG).touch()  # by which a folder is known as one of data stages
        yield Run(execution, Console(stderr=True), output / LOG)


def begin(folder: Path, name: str, key: Mapping[str, Any], run: Run) -> bool:
    """Start or continue a stage.

    Args:
        folder: Folder of the stage.
        name: Name of the stage.
        key: Everything that its output depends on, as plain values.
        run: The command; with ``run.execution.force``, a stage with another key starts over.

    Returns:
        Whether the stage is complete already.

    Raises:
        ValueError: The folder holds a stage with another key; the message lists the differences.
    """
    key = json.loads(json.dumps({"stage": name, **key}))
    if (folder / BEGUN).exists():
        before = json.loads((folder / BEGUN).read_text())
        if before != key:
            if not run.execution.force:
                raise OptionError(
                    "{} holds a stage with other settings or input ({}); give another folder, or {force} to start this "
                    "stage over.",
                    *(folder, first_of(differences_of(before, key))),
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
    """Remove what a stage has written. If this is interrupted, the stage keeps its old key and is not complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not (path / BEGUN).exists():  # a stage inside has its own key
            shutil.rmtree(path)
        elif path.is_file() and path.name not in (LOG, BEGUN, LOCK):
            path.unlink()
    (folder / BEGUN).unlink()


def finish(
    folder: Path, result: Mapping[str, Any], before: Path | None = None, scratch: Sequence[str] = ()
) -> dict[str, Any]:
    """Mark a stage as complete, and record its result for later stages.

    Args:
        folder: Folder of the stage.
        result: The result as plain values; ``sources`` holds the counts per source.
        before: Folder of the previous stage.
        scratch: Files and folders in ``folder`` that later stages do not need, which are removed.

    Returns:
        The result, with ``before`` (relative path of the previous stage's folder) and ``history`` (settings and counts
        of all stages so far, by name). The history does not depend on when or where the stages ran.
    """
    remove_partial_files(folder)
    key = json.loads((folder / BEGUN).read_text())
    name = key.pop("stage")
    settings = {part: value for part, value in key.items() if part != "input"}
    history = load_stage(before)["history"] if before else {}
    history[name] = {"settings": settings, "sources": result.get("sources", {})}
    linked = {"before": os.path.relpath(before, folder)} if before else {}
    write_json(folder / COMPLETE, {"stage": name, "key": key, "history": history, **linked, **result})
    for path in (folder / name for name in scratch):
        if path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    return load_stage(folder)


class Documents:
    """The documents of a complete stage; the next stage works on each part in a task.

    Args:
        folder: Folder of the stage.

    Raises:
        ValueError: The stage is not complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts: list[tuple[str, int, int]] = load_stage(folder)["parts"]
        self.names = [name for name, _, _ in parts]
        self.sizes = [size for _, _, size in parts]
        self.num_documents = sum(number for _, number, _ in parts)

    @property
    def stage(self) -> dict[str, Any]:
        """The record of the stage. It is not kept, as it would be passed to the processes of all tasks."""
        return load_stage(self.folder)

    def path(self, task: int) -> Path:
        """File of a part."""
        return self.folder / DOCUMENTS / self.names[task]

    def paths(self) -> list[Path]:
        """Files of all parts."""
        return list(map(self.path, range(len(self.names))))


def load_stage(folder: Path) -> dict[str, Any]:
    """The record of a complete stage: its ``key`` and its result.

    Raises:
        ValueError: The stage is not complete.
    """
    if not (folder / COMPLETE).exists():
        raise ValueError(f"{folder} is not a complete stage; rerun the command that writes it.")
    stage: dict[str, Any] = json.loads((folder / COMPLETE).read_text())
    return stage


def key_digest(folder: Path) -> str:
    """Short digest of the key of the stage in ``folder``; ``none`` if no stage has begun there."""
    begun = folder / BEGUN
    return file_sha256(begun)[:12] if begun.exists() else "none"


def stage_digest(folder: Path) -> str:
    """Digest of a complete stage, which goes into the key of the next one."""
    return file_sha256(folder / COMPLETE)


def differences_of(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What has changed between two mappings of plain values, by dotted key, as parts of a sentence."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences_of(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        values = [json.dumps(value) for value in (before, now)]
        if max(map(len, values)) < 60 and name.split(".")[0] != "input":
            yield f"{name} was {values[0]}, is {values[1]}"
        else:
            yield f"{name} {'is new' if before is None else 'is gone' if now is None else 'has changed'}"
