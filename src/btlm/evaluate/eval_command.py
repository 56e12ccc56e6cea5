"""The command `btlm eval`: asks a model the questions of tasks, prints a table, writes `results.json`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.console import one_line, progress_bars, warn
from btlm.errors import NotSupported, OptionError
from btlm.files import locked
from btlm.settings import did_you_mean

from .contamination import WORDS, Contamination, contamination
from .harness_results import harness_rows
from .journal import Journal
from .options import Eval
from .reference import REFERENCES, SOURCE
from .results import Origin, Result, write_results
from .sandbox import need_sandbox
from .suites import TASKS, shown_scale

_BOOTSTRAP = 1000  # samples, for the standard errors that have no formula
_ENGINE_OPTIONS = ("cache_dtype", "kernels", "threads")
_KINDS = {"score": "score answers", "write": "write answers"}


def run_eval(
    model: Checkpoint | Path | str, options: Eval | None = None, *, base: Path | str | None = None
) -> list[Result]:
    """Ask a model the questions of tasks, and print a table to standard output.

    With an output, every answer is kept beside it until the results are written, so that the same command goes on where
    a killed one stopped.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        options: What to ask.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Returns:
        Rows for `results.json`, one per task and metric.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    options = options or Eval()
    for name in options.reference:
        if name not in REFERENCES:
            near = did_you_mean(name, REFERENCES) or f"; the models are {', '.join(REFERENCES)}."
            raise OptionError("{reference} has {}, for which no scores are known{}", name, near)
    checkpoint = open_checkpoint(model, base)
    checkpoint.architecture  # noqa: B018  # a folder that is no model is told at once

    from .harness_tasks import load_tasks, offline, quiet_harness  # imports lm_eval

    output = None if options.output is None else Path(options.output)
    path = None if output is None else output.with_name(f"{output.name}.journal")
    with ExitStack() as stack:
        stack.enter_context(quiet_harness())
        if options.data is not None:
            stack.enter_context(offline())
        if output is not None:
            stack.enter_context(locked(output))
        loaded = stack.enter_context(
            load_tasks(
                options.suite,
                data=_path(options.data),
                include=_path(options.include),
                shots=options.shots,
                samples=options.samples,
            )
        )
        _check_code(loaded.tasks["tasks"], allowed=options.run_code)
        origin, overlaps = Origin.of(checkpoint), {}
        if options.shards is not None:
            overlaps = _look_for(loaded, options.shards, checkpoint.tokenizer)
        journal = stack.enter_context(Journal(path))
        lm = _open(checkpoint, options, journal, stack.enter_context(_progress()))
        found = _evaluate(lm, loaded.tasks, options.limit)
        rows = list(harness_rows(found, origin, lm.settings(), loaded.data_sha256))
        Console().print(eval_table(rows, loaded.leaves, options.reference))
        if overlaps:
            rows += contamination_rows(overlaps, origin, str(options.shards))
            Console().print(contamination_table(overlaps))
        if output is not None:
            write_results(output, rows)
            journal.close()
            if path is not None:
                path.unlink()
    return rows


def _open(checkpoint: Checkpoint, options: Eval, journal: Journal, tell: Any) -> Any:
    """The model that answers: on the engine, or on Transformers if the engine does not run it."""
    from .harness_model import EngineLM

    try:
        return EngineLM(
            checkpoint,
            max_length=options.context,
            cache_dtype=options.cache_dtype,
            kernels=options.kernels,
            threads=options.threads,
            journal=journal,
            on_tokens=tell,
        )
    except NotSupported as error:
        reason = error
    given = [f"{{{name}}}" for name in _ENGINE_OPTIONS if getattr(options, name) != getattr(Eval(), name)]
    if given:
        raise OptionError(
            f"{' and '.join(given)} only matter to the engine, and this model is asked on Transformers ({{}}); leave "
            "them out.",
            one_line(reason),
        )
    warn(f"{reason} Transformers answers instead, one request at a time.")
    from .transformers_model import TransformersLM

    return TransformersLM(checkpoint, max_length=options.context, journal=journal, on_requests=tell)


def _check_code(tasks: Mapping[str, Any], *, allowed: bool) -> None:
    """Refuse tasks that run what the model writes, unless the user wants it and the system can keep it apart."""
    for name in (name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)):
        if not allowed:
            raise OptionError("{suite} has {}, which runs what the model writes; allow it by {run_code}.", name)
        if name != "humaneval":
            raise OptionError("{suite} has {}, whose programs would not be kept apart; take humaneval.", name)
        need_sandbox()


def _look_for(loaded: Any, shards: str, tokenizer: Tokenizer) -> dict[str, Contamination]:
    """How many questions of each task or group occur in training text."""
    questions = {
        name: [dict(row) for leaf in leaves for row in loaded.tasks["tasks"][leaf].eval_docs]
        for name, leaves in loaded.leaves.items()
    }
    with progress_bars() as progress:
        task = progress.add_task("read training text", total=None)

        def tell(done: int, total: int) -> None:
            progress.update(task, total=total, advance=done)

        return contamination(questions, shards, tokenizer, on_tokens=tell)


def contamination_rows(found: Mapping[str, Contamination], origin: Origin, shards: str) -> list[Result]:
    """Rows for `results.json`: the share of the questions of each task that occur in training text."""
    return [
        origin.result(
            name,
            "contaminated",
            one.found / one.checked,
            "",
            one.checked,
            settings={"shards": shards, "words": WORDS, "questions": one.questions},
        )
        for name, one in found.items()
        if one.checked
    ]


def contamination_table(found: Mapping[str, Contamination]) -> Table:
    """How many questions of each task occur in training text."""
    caption = f"questions that share {WORDS} words in a row with the training text; shorter ones cannot be looked for"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    table.add_column("task", overflow="fold")
    for title in ("questions", "long enough", "in training text", "share"):
        table.add_column(title, justify="right")
    for name, one in found.items():
        share = f"{one.found / one.checked:.1%}" if one.checked else ""
        table.add_row(Text(name), f"{one.questions:,}", f"{one.checked:,}", f"{one.found:,}", share)
    return table


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _evaluate(lm: Any, tasks: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process, which has threads
    try:
        with redirect_stdout(StringIO()):
            found: dict[str, Any] = evaluate(
                lm=lm,
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
                confirm_run_unsafe_code=True,  # was checked when they were loaded
            )
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
    return found


@contextmanager
def _progress() -> Iterator[Any]:
    with progress_bars() as progress:
        bars: dict[str, Any] = {}
        prepare = progress.add_task("prepare questions", total=None)

        def tell(kind: str, tokens: int, total: int) -> None:
            if kind not in bars:
                progress.update(prepare, visible=False)
                bars[kind] = progress.add_task(_KINDS[kind], total=total)
            progress.advance(bars[kind], tokens)

        yield tell


# The table


def eval_table(rows: Sequence[Result], leaves: Mapping[str, Sequence[str]], references: Sequence[str] = ()) -> Table:
    """Rows as a table for people: per task the metric of the paper, beside published scores.

    Args:
        rows: The results.
        leaves: What was asked for, with the tasks that each stands for.
        references: Models of :data:`btlm.evaluate.reference.REFERENCES`.
    """
    shown = [row for name, below in leaves.items() for row in _of(rows, name, below)]
    known = [name for name in references if any((row.name, row.metric) in REFERENCES[name] for row in shown)]
    caption = "scores in percent, perplexity excepted; ± is the standard error"
    if known:
        caption += f"; * differs by more than that\n{SOURCE}"
    if any(row.partial for row in rows):
        caption = f"partial: only the first questions of a task were asked; {caption}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    for title in ("task", "metric"):
        table.add_column(title, overflow="fold")
    for title in ("shots", "n", "score", *known):
        table.add_column(title, justify="right")
    for row in shown:
        score = _shown(row, row.value)
        error = "" if row.standard_error is None else f" ± {_shown(row, row.standard_error)}"
        shots, mark = "" if row.shots is None else str(row.shots), " partial" if row.partial else ""
        beside = [_beside(row, REFERENCES[name].get((row.name, row.metric))) for name in known]
        table.add_row(Text(row.name), Text(row.metric), shots, f"{row.n:,}{mark}", f"{score}{error}", *beside)
    return table


def _of(rows: Sequence[Result], name: str, below: Sequence[str]) -> list[Result]:
    """What is shown of a task or group: the paper's metric, or the first one; of a tag, that of its tasks."""
    of = [row for row in rows if row.name == name] or [row for row in rows if row.name in below]
    metric = TASKS[name].metric if name in TASKS else ""
    found = [row for row in of if row.metric == metric]
    return found or [row for i, row in enumerate(of) if i == 0 or of[i - 1].name != row.name]


def _shown(row: Result, value: float) -> str:
    return f"{value * shown_scale(row.metric):,.2f}"


def _beside(row: Result, published: float | None) -> str:
    """A published score and the difference to it, with a star where it is beyond the standard error."""
    if published is None:
        return ""
    difference = row.value * shown_scale(row.metric) - published
    beyond = row.standard_error is not None and abs(difference) > row.standard_error * shown_scale(row.metric)
    return f"{published:g} ({difference:+.1f}{'*' if beyond else ''})"
