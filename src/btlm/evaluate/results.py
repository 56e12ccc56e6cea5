"""`results.json`: figures of measurements, one row per number, with everything that is needed to believe it.

docs/evaluate.md describes the format.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from btlm.checkpoint.open import Checkpoint
from btlm.console import one_line
from btlm.errors import ResultsError
from btlm.files import file_sha256, write_json

FORMAT = 1
RANDOM_WEIGHTS = "random weights"  # instead of a digest

_PACKAGES = ("btlm", "torch", "transformers", "lm_eval")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number.

    Args:
        name: What was measured, such as ``perplexity book.txt``.
        metric: How it was measured, such as ``bits_per_byte``.
        value: The number; infinity and NaN are not results.
        unit: Unit of the number; empty for a ratio.
        n: Number of what it is a mean of: questions, documents, tokens, turns.
        standard_error: Its standard error, in the same unit; ``None`` if it is not known.
        shots: Number of examples before a question; ``None`` where there are no questions.
        partial: Whether only a part of what the name promises was measured.
        model: Name of the model, as the user gave it.
        model_sha256: Digest of its configuration and weights; see :func:`model_digest`.
        settings: What else the number depends on, as plain values.
        versions: Version by package.
        command: The command line.
        machine: Processor and system.
        time: End of the measurement in UTC, ISO 8601.
    """

    name: str
    metric: str
    value: float
    unit: str
    n: int
    standard_error: float | None = None
    shots: int | None = None
    partial: bool = False
    model: str
    model_sha256: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str]
    command: str
    machine: str
    time: str


@dataclass(frozen=True)
class Origin:
    """What all rows of one run on one model have in common; the arguments are those of :class:`Result`."""

    model: str
    model_sha256: str
    versions: dict[str, str]
    command: str
    machine: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Origin":
        """That of this process and a checkpoint."""
        return cls.here(checkpoint.name, model_digest(checkpoint))

    @classmethod
    def here(cls, model: str, model_sha256: str) -> "Origin":
        """That of this process and a model."""
        return cls(model, model_sha256, _versions(), shlex.join(["btlm", *sys.argv[1:]]), machine_name())

    def result(self, name: str, metric: str, value: float, unit: str, n: int, **more: Any) -> Result:
        """A row that was measured now; the arguments are those of :class:`Result`."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Result(name=name, metric=metric, value=value, unit=unit, n=n, time=now, **vars(self), **more)


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint: of the digests of ``config.json`` and of the files of its weights, in their order."""
    digest = hashlib.sha256()
    for file in (checkpoint.folder / "config.json", *checkpoint.weight_files):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def machine_name() -> str:
    """Processor, number of processors, and system."""
    return f"{processor_name()}, {os.cpu_count()} processors, {platform.system()}"


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write rows, whole or not at all.

    Raises:
        ValueError: A number is infinite or NaN.
    """
    rows = [asdict(result) for result in results]
    for row in rows:
        if not math.isfinite(row["value"]):
            raise ValueError(f"{row['name']}, {row['metric']}, is {row['value']}, which is no result.")
    write_json(path, {"format": FORMAT, "rows": rows})


def read_results(path: Path) -> list[Result]:
    """Read rows and check each of them.

    Raises:
        ResultsError: The file is not one of results, of another format, or a row is damaged; the message says which.
    """
    return rows_in(path, read_json(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ResultsError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path} cannot be read as JSON ({one_line(error)}).") from error


def rows_in(path: Path, content: Any) -> list[Result]:
    """The rows of a file, each of them checked.

    Args:
        path: The file, for messages.
        content: Its content.

    Raises:
        ResultsError: See :func:`read_results`.
    """
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ResultsError(f"{path} holds no results; it needs the keys format and rows.")
    if content.get("format") != FORMAT:
        raise ResultsError(
            f"{path} has the format {content.get('format')!r}, and this version of btlm reads {FORMAT}; measure again."
        )
    return [_row(path, number, row) for number, row in enumerate(content["rows"], 1)]


_TYPES: dict[str, tuple[type, ...]] = {
    "value": (int, float),
    "n": (int,),
    "standard_error": (int, float, type(None)),
    "shots": (int, type(None)),
    "partial": (bool,),
    "settings": (dict,),
    "versions": (dict,),
}


def _row(path: Path, number: int, row: Any) -> Result:
    place = f"{path}, row {number}"
    if not isinstance(row, dict):
        raise ResultsError(f"{place} is {row!r}, not an object.")
    names = [one.name for one in fields(Result)]
    if wrong := [*(f"{name} is missing" for name in names if name not in row), *sorted(row.keys() - set(names))]:
        raise ResultsError(f"{place}: {wrong[0]}{'' if 'missing' in wrong[0] else ' is unknown'}.")
    for name in names:
        value, types = row[name], _TYPES.get(name, (str,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ResultsError(f"{place}: {name} is {value!r}, not {' or '.join(one.__name__ for one in types)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ResultsError(f"{place}: {name} is {value!r}, which is no result.")
    return Result(**row)


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that are imported."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found


def processor_name() -> str:
    """Model of the processor."""
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
