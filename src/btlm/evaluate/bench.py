"""The command `btlm bench`: resident memory and speed of models by dtype and context, as a table and two plots."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import resident_bytes
from btlm.console import gigabytes, progress_bars, three_digits
from btlm.engine.cache import cache_bytes, cache_dtype_of
from btlm.engine.memory import available_memory
from btlm.engine.network import weight_dtype
from btlm.engine.supported import supported
from btlm.errors import DoesNotFit, OptionError
from btlm.files import require_space
from btlm.model.architecture_btlm import Architecture

from .options import Bench
from .random_checkpoint import SHAPES, random_weight_bytes, shape_config, write_random_model
from .results import RANDOM_WEIGHTS, Origin, Result, write_results

_PROGRAM = 150_000_000  # bytes beside weights and cache: Python, numpy, activations
_SPARE = 100_000_000  # bytes of the disk to leave free


def run_bench(
    models: Sequence[str],
    *,
    dtypes: Sequence[str] | None = Bench.dtypes,
    contexts: Sequence[int] = Bench.contexts,
    new_tokens: int = Bench.new_tokens,
    cache_dtype: str = Bench.cache_dtype,
    threads: int | None = None,
    output: Path | str | None = None,
    base: Path | str | None = None,
) -> list[dict[str, Any]]:
    """Measure models, each dtype and context in a process of its own, and print a table to standard output.

    Args:
        models: Folders of checkpoints or adapters, measured as they are stored, and names of :data:`SHAPES`, measured
            with random weights in each of the dtypes. Those are written to a temporary folder (of ``TMPDIR``), one at a
            time.
        dtypes, contexts, new_tokens, cache_dtype, threads: See :class:`btlm.evaluate.options.Bench`.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.
        output: Folder that receives ``results.json`` after every measurement, ``figure-1.png`` and ``figure-2.png``.

    Returns:
        A dictionary per measurement: the keys of :func:`btlm.evaluate.bench_child.measure` with ``model``, ``dtype``,
        ``context``, ``read_bytes_per_s`` and ``share_of_read_rate``.

    Raises:
        ValueError: Something cannot be measured. If this is known beforehand, nothing is measured.
    """
    Bench(dtypes=dtypes, contexts=contexts, new_tokens=new_tokens, threads=threads)  # type: ignore[arg-type]  # checks
    if dtypes is not None and not SHAPES.keys() & set(models):
        raise OptionError(
            "{dtypes} are for shapes with random weights, and checkpoints are measured as they are stored; leave them "
            "out, or measure a copy of the checkpoint that `btlm quantize` wrote."
        )
    formats, lengths = list(dict.fromkeys(dtypes or ("4bit",))), sorted(set(contexts))
    if lengths[0] <= new_tokens:
        raise OptionError("{contexts} are {}; each must exceed the {} of {new_tokens}.", list(contexts), new_tokens)
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise OptionError("{output} draws with matplotlib: pip install matplotlib, or leave it out.")
    subjects = [subject for model in dict.fromkeys(models) for subject in _subjects(model, formats, base)]
    if not subjects:
        raise ValueError(f"There is no model; give a folder, or one of the shapes {', '.join(SHAPES)}.")
    for subject in subjects:
        subject.check(max(lengths), cache_dtype)
    _tell_apart(subjects)
    if output is not None:
        _make_folder(Path(output))
    rows: list[dict[str, Any]] = []
    results: list[Result] = []
    with progress_bars() as progress:
        for number, subject in enumerate(subjects):
            with subject.folder(progress) as folder:
                for i, context in enumerate(lengths):
                    place = f"{number * len(lengths) + i + 1}/{len(subjects) * len(lengths)}"
                    title = f"{place} {escape(subject.name)} {subject.dtype} {context:,}"
                    rate = _child({"threads": threads}, progress, f"{title}: memory", 1)
                    task = {"folder": str(folder), "context": context, "new_tokens": new_tokens, "threads": threads}
                    task["cache_dtype"] = cache_dtype
                    row: dict[str, Any] = {"model": subject.name, "dtype": subject.dtype, "context": context}
                    row |= _child(task, progress, title, context)
                    row["read_bytes_per_s"] = rate["bytes_per_s"]
                    read = row["weight_bytes_read"] + row["cache_bytes_read"]
                    row["share_of_read_rate"] = read * row["decode_tokens_per_s"] / rate["bytes_per_s"]
                    rows.append(row)
                    settings = {"new_tokens": new_tokens, "kernels": rate["kernels"], "threads": rate["threads"]}
                    results += _results(row, subject.origin(), settings)
                    if output is not None:
                        write_results(Path(output) / "results.json", results)
    Console().print(bench_table(rows))
    if output is not None:
        from .bench_plot import plot_memory, plot_speed

        for name, plot in (("figure-1.png", plot_memory), ("figure-2.png", plot_speed)):
            plot(rows, Path(output) / name)
    return rows


def bench_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Measurements as a table; memory in powers of 1,000."""
    caption = (
        "peak: resident memory of the whole process; share: rate at which a decoding step reads weights and cache, "
        "relative to the rate at which memory could be read in the same minute"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    table.add_column("model", min_width=8, overflow="fold")
    table.add_column("dtype", no_wrap=True)
    titles = "context", "weights\nGB", "cache\nGB", "peak\nGB", "open\ns", "prefill\ntok/s", "decode\ntok/s"
    for title in (*titles, "memory\nGB/s", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    before = None
    for row in rows:
        if before not in (None, (row["model"], row["dtype"])):
            table.add_section()
        before = row["model"], row["dtype"]
        table.add_row(
            escape(row["model"]),
            row["dtype"],
            f"{row['context']:,}",
            *(three_digits(row[key] / 1e9, decimals=2) for key in ("weight_bytes", "cache_bytes", "peak_bytes")),
            f"{row['open_s']:.2f}",
            *(three_digits(row[key], decimals=2) for key in ("prefill_tokens_per_s", "decode_tokens_per_s")),
            three_digits(row["read_bytes_per_s"] / 1e9, decimals=2),
            f"{100 * row['share_of_read_rate']:.0f}%",
        )
    return table


# Models to measure


@dataclass
class _Subject:
    """A checkpoint as it is stored, or a shape with random weights.

    Args:
        name: Name in the table.
        given: What the user calls it: the path of a folder, or one of :data:`SHAPES`.
        dtype: Dtype of the weights.
        architecture: The network.
        weight_bytes: Memory of the weights, and for a shape their size on the disk.
        checkpoint: The checkpoint; None for a shape.
    """

    name: str
    given: str
    dtype: str
    architecture: Architecture
    weight_bytes: int
    checkpoint: Checkpoint | None = None

    def origin(self) -> Origin:
        """Model and machine for `results.json`; random weights have no digest."""
        return Origin.of(self.checkpoint) if self.checkpoint is not None else Origin.here(self.name, RANDOM_WEIGHTS)

    def check(self, context: int, cache_dtype: str) -> None:
        """Refuse what does not fit the memory or, for a shape, the disk."""
        cache = cache_bytes(self.architecture, cache_dtype_of(cache_dtype, self.dtype), context)
        needed, available = self.weight_bytes + cache + _PROGRAM, available_memory()
        if available is not None and needed > available:
            raise DoesNotFit(
                f"{self.name} in {self.dtype} takes {gigabytes(needed)} at {context:,} tokens (weights "
                f"{gigabytes(self.weight_bytes)}, cache {gigabytes(cache)}) and {gigabytes(available)} of memory are "
                "available; choose another dtype or shorter contexts."
            )
        if self.checkpoint is None:
            self._check_disk()

    def _check_disk(self) -> None:
        place = Path(tempfile.gettempdir(), f"btlm-bench-{self.name}-{self.dtype}")
        require_space(place, self.weight_bytes + _SPARE, "set TMPDIR to a larger place, or choose another dtype")

    @contextmanager
    def folder(self, progress: Progress) -> Iterator[Path]:
        """The folder to measure; that of a shape is written, and removed afterwards."""
        if self.checkpoint is not None:
            yield self.checkpoint.folder
            return
        self._check_disk()
        with tempfile.TemporaryDirectory(prefix="btlm-bench-") as name:
            description = f"writing {self.name} {self.dtype}, {gigabytes(self.weight_bytes)}"
            task = progress.add_task(description, total=self.weight_bytes)
            write_random_model(
                Path(name), SHAPES[self.given], self.dtype, on_bytes=lambda done: progress.update(task, completed=done)
            )
            progress.remove_task(task)
            yield Path(name)


def _subjects(model: str, dtypes: Sequence[str], base: Path | str | None) -> list[_Subject]:
    if sizes := SHAPES.get(model):
        return [
            _Subject(
                model,
                model,
                dtype,
                Architecture.from_config(shape_config(sizes, dtype)),
                random_weight_bytes(sizes, dtype),
            )
            for dtype in dtypes
        ]
    if not Path(model).is_dir():
        raise ValueError(f"{model!r} is no folder, and the shapes are {', '.join(SHAPES)}; give one of them.")
    checkpoint = open_checkpoint(model, base)
    architecture, tensors = supported(checkpoint.architecture), checkpoint.tensors
    weight_bytes = sum(map(resident_bytes, tensors.values()))
    return [
        _Subject(checkpoint.title, model, weight_dtype(architecture, tensors), architecture, weight_bytes, checkpoint)
    ]


def _tell_apart(subjects: Sequence[_Subject]) -> None:
    """Give folders of the same name the paths that the user gave as names."""
    names = Counter((subject.name, subject.dtype) for subject in subjects)
    for subject in subjects:
        if names[subject.name, subject.dtype] > 1:
            subject.name = subject.given


# Processes


def _child(task: dict[str, Any], progress: Progress, title: str, total: int) -> dict[str, Any]:
    """Run :mod:`btlm.evaluate.bench_child` in a process, which ends if this one is interrupted; returns its result."""
    command = [sys.executable, "-m", "btlm.evaluate.bench_child", json.dumps(task)]
    shown = progress.add_task(title, total=total)
    told: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                if "tokens" in told:
                    progress.update(shown, completed=told["tokens"])
        finally:
            if process.poll() is None and "result" not in told:
                process.terminate()
    progress.remove_task(shown)
    if "error" in told:
        raise ValueError(told["error"])
    if "result" not in told:
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise ValueError(f"The measurement {title} ended early ({ended}); the memory may not suffice for it.")
    result: dict[str, Any] = told["result"]
    return result


# Arguments and results


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be made a folder ({error.strerror}); give another one.") from error


_UNITS = {"_per_s": "per s", "_bytes": "bytes", "_read": "bytes", "_s": "s", "_rate": ""}  # by the end of a key


def _results(row: dict[str, Any], origin: Origin, settings: dict[str, Any]) -> list[Result]:
    """The rows of `results.json` for one measurement."""
    settings = {**settings, **{key: row[key] for key in ("dtype", "context", "cache_dtype")}}
    name = f"bench {row['dtype']}, {row['context']} tokens"
    results = []
    for key, value in row.items():
        if units := [unit for end, unit in _UNITS.items() if key.endswith(end)]:
            results.append(origin.result(name, key, float(value), units[0], 1, settings=settings))
    return results
