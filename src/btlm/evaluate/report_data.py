"""What a report is made of: rows of result files by model, and the records of training runs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btlm.errors import ResultsError

from .harness_results import read_harness_file
from .results import FORMAT, Result, read_json, rows_in


@dataclass(frozen=True)
class Model:
    """The results of one model.

    Args:
        label: Its name, which tells it from the others.
        sha256: Digest of its configuration and weights; empty if it is not known, and
            :data:`btlm.evaluate.results.RANDOM_WEIGHTS` for a shape.
        rows: Its results, the newest first.
    """

    label: str
    sha256: str
    rows: list[Result] = field(default_factory=list)

    def find(self, name: str, metric: str) -> list[Result]:
        """All results of a measurement: whole ones before partial ones, then the newest first."""
        return sorted(
            (row for row in self.rows if (row.name, row.metric) == (name, metric)), key=lambda row: row.partial
        )

    def named(self, prefix: str) -> list[Result]:
        """All results whose name begins with a word."""
        return [row for row in self.rows if row.name.partition(" ")[0] == prefix]


@dataclass(frozen=True)
class Training:
    """The records of a training run.

    Args:
        label: Name of its folder.
        records: One per step; see :mod:`btlm.train.metrics`.
    """

    label: str
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """All that was given.

    Args:
        models: In the order in which they were first met.
        trainings: Training runs.
    """

    models: list[Model]
    trainings: list[Training]

    @property
    def rows(self) -> list[Result]:
        """The results of all models."""
        return [row for model in self.models for row in model.rows]


def read_evidence(paths: Sequence[Path | str]) -> Evidence:
    """Read files of results, ours and those of lm-evaluation-harness, and folders of training runs.

    Args:
        paths: Files; a folder is a training run if it has a ``metrics.jsonl``, otherwise its ``results.json`` is read.

    Raises:
        ResultsError: A file cannot be used, or two files have different values for the same measurement of a model.
    """
    rows: list[tuple[Path, Result]] = []
    trainings = []
    for given in paths:
        path = Path(given)
        if path.name == "metrics.jsonl":
            path = path.parent
        if path.is_dir():
            if (path / "metrics.jsonl").is_file():
                trainings.append(_training(path))
                continue
            path = path / "results.json"
            if not path.is_file():
                raise ResultsError(f"{given} has neither a results.json nor a metrics.jsonl; give a file of results.")
        rows += ((path, row) for row in _read(path))
    return Evidence(_by_model(rows), trainings)


def _read(path: Path) -> list[Result]:
    content = read_json(path)
    if isinstance(content, dict) and "format" not in content and "results" in content:
        return read_harness_file(path, content)
    if isinstance(content, dict) and "format" not in content:
        raise ResultsError(
            f"{path} holds no results; it needs the keys format ({FORMAT}) and rows, or those of lm-evaluation-harness."
        )
    return rows_in(path, content)


def _training(folder: Path) -> Training:
    from btlm.train.metrics import read_metrics  # imports torch

    records = read_metrics(folder)
    if not records:
        raise ResultsError(f"{folder / 'metrics.jsonl'} has no records; train a model first.")
    return Training(folder.name, records)


def _by_model(rows: Iterable[tuple[Path, Result]]) -> list[Model]:
    """Results by model: by the digest, and where there is none, by the name."""
    models: dict[tuple[str, str], dict[str, tuple[Path, Result]]] = {}
    for path, row in rows:
        # Random weights have no digest, and the harness does not know that of a local folder.
        hashed = len(row.model_sha256) == 64
        key = (row.model_sha256, "") if hashed else (row.model_sha256, row.model)
        known = models.setdefault(key, {})
        same = json.dumps([row.name, row.metric, row.shots, row.partial, row.settings], sort_keys=True)
        if same in known and known[same][1].value != row.value:
            first, other = known[same]
            raise ResultsError(
                f"{row.metric} of {row.name} by {row.model} is {other.value:g} in {first} and {row.value:g} in {path}, "
                "measured in the same way; leave one of them out."
            )
        known.setdefault(same, (path, row))
    return [Model(name, key[0], of) for (key, of), name in _named(models)]


def _named(
    models: dict[tuple[str, str], dict[str, tuple[Path, Result]]],
) -> Iterable[tuple[tuple[tuple[str, str], list[Result]], str]]:
    """The models with their rows, newest first, and names that differ."""
    listed = [
        (key, sorted((row for _, row in known.values()), key=lambda row: row.time, reverse=True))
        for key, known in models.items()
    ]
    short = [_short(rows[0].model) for _, rows in listed]
    for number, (one, name) in enumerate(zip(listed, short, strict=True)):
        if short.count(name) > 1:
            digest = one[0][0]
            name = f"{name} ({digest[:6] if len(digest) == 64 else number + 1})"
        yield one, name


def _short(name: str) -> str:
    """The last part of a path, and the whole of an id on the Hub."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..", "model")]
    return name if name.count("/") == 1 and not name.startswith((".", "/")) else (parts or [name])[-1]
