"""The tables of a report: every number with what it depends on and the run that measured it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from btlm.checkpoint.open import Checkpoint
from btlm.console import three_digits
from btlm.engine.network import weight_dtype
from btlm.model.architecture_btlm import Architecture

from .random_checkpoint import SHAPES, shape_config
from .reference import REFERENCES
from .report_data import Evidence, Model
from .results import RANDOM_WEIGHTS, Result, model_digest
from .suites import TASKS, shown_scale


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Args:
        text: As it is shown.
        sort: As it is sorted by.
        note: What has to be said beside it, such as that it is partial.
        facts: What it depends on, by name.
        run: Number of the run that measured it; ``None`` for published numbers.
    """

    text: str
    sort: float
    note: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption: What it shows.
        columns: Titles; the first ones are of names.
        names: Number of columns of names.
        rows: Names and cells of each row.
    """

    caption: str
    columns: list[str]
    names: int
    rows: list[list[str | Cell | None]]


class Runs:
    """The commands that measured, each once, in the order in which the page needs them."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}

    def of(self, row: Result) -> int:
        """Number of the run of a result, from 1."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(row.versions.items()))
        key = (row.command, row.machine, versions, row.model_sha256)
        facts = {"command": row.command, "machine": row.machine, "versions": versions, "model": row.model}
        facts |= {"SHA-256 of the model": row.model_sha256 or "not known", "finished": row.time}
        return self.found.setdefault(key, (len(self.found) + 1, facts))[0]


def model_table(evidence: Evidence) -> Table:
    """What the models are; their shapes where they are still there to be read."""
    rows: list[list[str | Cell | None]] = []
    for model in evidence.models:
        machines = ", ".join(sorted({row.machine for row in model.rows}))
        facts = [model.label, model.rows[0].model, *_shape(model), model.sha256[:16] or "not known", machines]
        rows.append([*facts, f"{len(model.rows):,}"])
    shape = ["parameters", "layers x width x heads", "context", "weights"]
    return Table("Models", ["model", "given as", *shape, "SHA-256", "measured on", "results"], 9, rows)


def _shape(model: Model) -> list[str]:
    """Parameters, layers, context and dtype of a model, if its folder is there and is still the same."""
    given = model.rows[0].model
    try:
        if model.sha256 == RANDOM_WEIGHTS:
            dtypes = dict.fromkeys(str(row.settings["dtype"]) for row in model.rows)
            architecture, weights = Architecture.from_config(shape_config(SHAPES[given], "bfloat16")), ", ".join(dtypes)
        else:
            checkpoint = Checkpoint.open(Path(given)) if Path(given).is_dir() else None
            if checkpoint is None or model_digest(checkpoint) != model.sha256:
                return [""] * 4
            architecture, weights = checkpoint.architecture, ""
            if few := architecture.quantization:
                weights = f"{few.bits} bits in groups of {few.group_size}, tables in {few.table_bits}"
            else:
                weights = weight_dtype(architecture, checkpoint.tensors)
    except (ValueError, KeyError):
        return [""] * 4
    sizes = f"{architecture.n_layer} x {architecture.n_embd} x {architecture.n_head}"
    return [f"{architecture.num_parameters():,}", sizes, f"{architecture.n_positions:,}", weights]


# Benchmarks


def cell(rows: Sequence[Result], runs: Runs, form: Callable[[Result, float], str]) -> Cell | None:
    """The first of several results as a number of a table; the others are named beside it."""
    if not rows:
        return None
    row = rows[0]
    error = "" if row.standard_error is None else f" ± {form(row, row.standard_error)}"
    facts = {"metric": row.metric, "n": f"{row.n:,}"}
    facts |= {"shots": str(row.shots)} if row.shots is not None else {}
    facts |= {name: _plain(value) for name, value in row.settings.items() if value is not None}
    for other in rows[1:]:
        differs = {key: value for key, value in other.settings.items() if row.settings.get(key) != value}
        told = [*(f"{key} {_plain(value)}" for key, value in differs.items()), *["partial"] * other.partial]
        facts[f"also measured ({', '.join(told) or other.time})"] = form(other, other.value)
    return Cell(f"{form(row, row.value)}{error}", row.value, "partial" if row.partial else "", facts, runs.of(row))


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value)
    text = str(value)
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text


def percent(row: Result, value: float) -> str:
    """A score as it is shown, without its unit."""
    return f"{value * shown_scale(row.metric):,.2f}"


def benchmark_table(
    evidence: Evidence, runs: Runs, title: str, references: Sequence[str], names: Sequence[str]
) -> Table | None:
    """Scores of models beside published ones, with the difference to the first of these; nothing without scores."""
    models = [model for model in evidence.models if any(model.find(name, TASKS[name].metric) for name in names)]
    if not models:
        return None
    rows: list[list[str | Cell | None]] = []
    for name in names:
        task = TASKS[name]
        published = [REFERENCES[one].get((name, task.metric)) for one in references]
        found = [model.find(name, task.metric) for model in models]
        if not any(found) and not any(published):
            continue
        shots = {row.shots for of in found for row in of[:1]} or {task.shots}
        asked = " or ".join("" if number is None else f", {number} shots" for number in sorted(shots, key=str))
        cells: list[str | Cell | None] = [name, f"{task.metric}{asked}"]
        for of in found:
            cells.append(cell(of, runs, percent))
            cells.append(_difference(of, published[0]))
        cells += [None if value is None else Cell(f"{value:g}", value) for value in published]
        rows.append(cells)
    columns = ["task", "metric"]
    for model in models:
        columns += [model.label, f"less {references[0]}"]
    return Table(title, [*columns, *references], 2, rows)


def _difference(rows: Sequence[Result], published: float | None) -> Cell | None:
    if not rows or published is None:
        return None
    row = rows[0]
    difference = row.value * shown_scale(row.metric) - published
    beyond = row.standard_error is not None and abs(difference) > row.standard_error * shown_scale(row.metric)
    return Cell(f"{difference:+.1f}", difference, "beyond the standard error" if beyond else "")


def further_table(evidence: Evidence, runs: Runs, known: set[str]) -> Table | None:
    """All scores of tasks that are in none of the paper's tables."""
    words = {"perplexity", "positions", "needle", "bench"}
    keys = dict.fromkeys(
        (row.name, row.metric)
        for row in evidence.rows
        if row.name.partition(" ")[0] not in words and row.name not in known
    )
    if not keys:
        return None
    rows: list[list[str | Cell | None]] = [
        [name, metric, *(cell(model.find(name, metric), runs, percent) for model in evidence.models)]
        for name, metric in keys
    ]
    return Table("Further tasks", ["task", "metric", *(model.label for model in evidence.models)], 2, rows)


# Memory and speed


def bench_of(model: Model) -> dict[tuple[str, int], dict[str, Result]]:
    """The measurements of `btlm bench` by dtype and context, each by metric; the newest ones."""
    found: dict[tuple[str, int], dict[str, Result]] = {}
    for row in model.named("bench"):
        found.setdefault((row.settings["dtype"], row.settings["context"]), {}).setdefault(row.metric, row)
    return dict(sorted(found.items(), key=lambda item: item[0]))


def bench_table(evidence: Evidence, runs: Runs) -> Table:
    """All measurements of memory and speed."""
    shown = {
        "peak_bytes": ("peak GB", 1e9),
        "weight_bytes": ("weights GB", 1e9),
        "cache_bytes": ("cache GB", 1e9),
        "prefill_tokens_per_s": ("prefill tokens/s", 1),
        "decode_tokens_per_s": ("decode tokens/s", 1),
        "share_of_read_rate": ("share of the memory's rate", 1),
    }
    rows: list[list[str | Cell | None]] = []
    for model in evidence.models:
        for (dtype, context), metrics in bench_of(model).items():
            cells: list[str | Cell | None] = [model.label, dtype, f"{context:,}"]
            for metric, (_, unit) in shown.items():
                of = [metrics[metric]] if metric in metrics else []
                cells.append(cell(of, runs, _divided(unit)))
            rows.append(cells)
    return Table("Memory and speed", ["model", "dtype", "tokens", *(name for name, _ in shown.values())], 3, rows)


def _divided(unit: float) -> Callable[[Result, float], str]:
    return lambda _, value: three_digits(value / unit)


# Text


def perplexity_table(evidence: Evidence, runs: Runs) -> Table | None:
    """How well models predict texts: a row per model and reading."""
    metrics = ("nats_per_token", "perplexity", "bits_per_byte", "perplexity_change", "kl_per_token", "same_first_token")
    rows: list[list[str | Cell | None]] = []
    for model in evidence.models:
        found: dict[str, dict[str, list[Result]]] = {}
        for row in model.named("perplexity"):
            settings = row.settings
            key = ", ".join(map(str, settings.get("texts", ()))) + f"; context {settings.get('context')}"
            key += f", stride {settings.get('stride')}, cache {settings.get('cache_dtype')}"
            found.setdefault(key, {}).setdefault(row.metric, []).append(row)
        for key, of in found.items():
            rows.append([model.label, key, *(cell(of.get(metric, ()), runs, _form(metric)) for metric in metrics)])
    if not rows:
        return None
    titles = ["nats per token", "perplexity", "bits per byte", "change", "KL, nats per token", "same first token"]
    return Table("Perplexity of texts", ["model", "texts", *titles], 2, rows)


def _form(metric: str) -> Callable[[Result, float], str]:
    if metric in ("perplexity_change", "same_first_token"):
        return lambda _, value: f"{value:.2%}"
    return lambda _, value: f"{value:,.4g}"
