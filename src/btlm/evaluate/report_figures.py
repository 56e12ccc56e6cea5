"""The figures of a report: drawings with legends, captions, and the numbers that they draw."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from btlm.console import three_digits

from .reference import REFERENCES
from .report_data import Evidence, Model
from .report_svg import Bar, Series, bars, dots, heat, legend, lines
from .report_tables import Cell, Runs, Table, bench_of, bench_table, cell, percent
from .results import Result
from .suites import SUITES, TASKS

_PHONE = (3.0, "3 GB")  # of memory, which figure 1 of the card marks
_KINDS = {"text": "a fact in text", "random": "random tokens", "absent": "control: the fact is not there"}


@dataclass(frozen=True)
class Figure:
    """A figure.

    Args:
        title: Its number and name.
        drawing: SVG; empty if nothing was measured.
        keys: Drawings and labels of its legend.
        caption: What it shows.
        table: The numbers that it draws.
        command: What measures it, where nothing was measured.
    """

    title: str
    drawing: str = ""
    keys: list[tuple[str, str]] = field(default_factory=list)
    caption: str = ""
    table: Table | None = None
    command: str = ""


def score_figure(evidence: Evidence, title: str, references: Sequence[str]) -> Figure:
    """The scores of table 1 or 2 as marks."""
    names = [
        name for name in SUITES["table1"] if any(model.find(name, TASKS[name].metric) for model in evidence.models)
    ]
    if not names:
        return Figure(title, command="eval MODEL")
    series = []
    for model in evidence.models:
        found = {i: of[0] for i, name in enumerate(names) if (of := model.find(name, TASKS[name].metric))}
        if found:
            values = [100 * row.value for row in found.values()]
            errors = [196 * (row.standard_error or 0.0) for row in found.values()]
            low = [value - error for value, error in zip(values, errors, strict=True)]
            high = [value + error for value, error in zip(values, errors, strict=True)]
            series.append(Series(model.label, values, list(found), low, high))
    for reference in references:
        scores = {i: REFERENCES[reference].get((name, TASKS[name].metric)) for i, name in enumerate(names)}
        there = {i: score for i, score in scores.items() if score is not None}
        series.append(Series(reference, list(there.values()), list(there)))
    drawing = dots(names, series, title=title, x="score (percent)")
    caption = "Bars are 95% intervals, 1.96 standard errors; published scores have none. The numbers are in the tables."
    return Figure(title, drawing, list(legend([one.label for one in series])), caption)


# Memory and speed


def _bench_bars(evidence: Evidence, make: Callable[[str, Mapping[str, Result]], Bar]) -> list[Bar]:
    return [
        make(f"{model.label}, {dtype}, {context:,}", metrics)
        for model in evidence.models
        for (dtype, context), metrics in bench_of(model).items()
    ]


def memory_figure(evidence: Evidence, runs: Runs) -> Figure:
    """Figure 1: memory by dtype and context."""
    title = "Figure 1. Memory by dtype and tokens of context"

    def bar(label: str, metrics: Mapping[str, Result]) -> Bar:
        peak, weights, cache = (metrics[key].value / 1e9 for key in ("peak_bytes", "weight_bytes", "cache_bytes"))
        # A token table that is not also the head is hardly read.
        weights = min(weights, peak)
        cache = min(cache, peak - weights)
        return Bar(label, {"weights": weights, "cache": cache, "all else": peak - weights - cache}, f"{peak:.2f}")

    rows = _bench_bars(evidence, bar)
    if not rows:
        return Figure(title, command="bench MODEL")
    mark = _PHONE if max(sum(row.parts.values()) for row in rows) > 1 else None
    drawing = bars(rows, title=title, x="peak resident memory (GB)", mark=mark)
    table = bench_table(evidence, runs)
    keys = list(legend(["weights", "cache", "all else"], of_bars=True))
    return Figure(title, drawing, keys, "Resident memory of the whole process, at its peak.", table)


def speed_figure(evidence: Evidence, runs: Runs) -> Figure:
    """Figure 2: quality beside memory and speed."""
    title = "Figure 2. Quality, memory and speed"
    rows = _bench_bars(
        evidence,
        lambda label, metrics: Bar(
            label,
            {"tokens per second": metrics["decode_tokens_per_s"].value},
            three_digits(metrics["decode_tokens_per_s"].value),
        ),
    )
    if not rows:
        return Figure(title, command="bench MODEL")
    means = [f"{model.label}: {mean:.1f}% on {n} tasks" for model in evidence.models for mean, n in _mean_score(model)]
    quality = (
        f"Mean score of table 1: {'; '.join(means)}." if means else "The quality of these models was not measured."
    )
    drawing = bars(rows, title=title, x="tokens per second of one text, at the end of the context")
    return Figure(title, drawing, [], f"Memory is in figure 1. {quality}")


def _mean_score(model: Model) -> Iterator[tuple[float, int]]:
    found = [of[0].value for name in SUITES["table1"] if (of := model.find(name, TASKS[name].metric))]
    if found:
        yield 100 * sum(found) / len(found), len(found)


def position_figures(evidence: Evidence, runs: Runs) -> Iterator[Figure]:
    """Figure 5: the loss by position, one chart per model and reading."""
    title = "Figure 5. Loss by position"
    found: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for model in evidence.models:
        for row in model.named("positions"):
            if row.metric == "nats_per_token":
                reading = f"{', '.join(row.settings['texts'])}, windows of {row.settings['length']:,} tokens"
                scaling = {"none": "none", "dynamic": f"dynamic ({row.settings['factor']:g})"}.get(
                    row.settings["scaling"], f"factor {row.settings['factor']:g}"
                )
                found.setdefault((model.label, reading), {}).setdefault(scaling, []).append(row)
    if not found:
        yield Figure(title, command="eval-positions MODEL TEXT")
    for (label, reading), curves in found.items():
        series, columns = [], []
        cells: dict[tuple[int, ...], dict[str, Result]] = {}
        for kind, (scaling, rows) in enumerate(curves.items()):
            rows = sorted(rows, key=lambda row: row.settings["positions"][0])
            middles = [sum(row.settings["positions"]) / 2 + 0.5 for row in rows]
            errors = [1.96 * (row.standard_error or 0.0) for row in rows]
            values = [row.value for row in rows]
            low = [value - error for value, error in zip(values, errors, strict=True)]
            high = [value + error for value, error in zip(values, errors, strict=True)]
            series.append(Series(scaling, middles, values, low, high, kind))
            columns.append(scaling)
            for row in rows:
                cells.setdefault(tuple(row.settings["positions"]), {})[scaling] = row
        first = next(iter(curves.values()))[0]
        trained = (float(first.settings["train_length"]), "training length")
        drawing = lines(series, title=f"{title}, {label}", x="position (tokens)", y="nats per token", mark=trained)
        table = Table(
            f"Nats per token by position, {label}",
            ["positions", *columns],
            1,
            [
                [
                    f"{a:,} to {b:,}",
                    *(
                        cell([of[name]] if name in of else [], runs, lambda _, value: f"{value:.4f}")
                        for name in columns
                    ),
                ]
                for (a, b), of in sorted(cells.items())
            ],
        )
        caption = (
            f"{label}; {reading}. Lines are position interpolations; bands are 95% intervals over {first.n} windows."
        )
        yield Figure(title, drawing, list(legend(columns, list(range(len(columns))))), caption, table)


def needle_figures(evidence: Evidence, runs: Runs) -> Iterator[Figure]:
    """Heat maps of hidden facts, one per model and kind of question."""
    for model in evidence.models:
        rows = model.named("needle")
        for kind, title in _KINDS.items():
            of = {(row.settings["length"], row.settings["depth"]): row for row in rows if row.settings["kind"] == kind}
            if not of:
                continue
            lengths = sorted({length for length, _ in of})
            depths = sorted({depth for _, depth in of}, key=lambda depth: -1 if depth is None else depth)
            lengths = [length for length in lengths if all((length, depth) in of for depth in depths)]
            names = ["anywhere" if depth is None else f"{depth:.0%}" for depth in depths]
            shares = [[of[length, depth].value for depth in depths] for length in lengths]
            told = [f"{length:,}" for length in lengths]
            name = f"{model.label}: {title}"
            first = next(iter(of.values()))
            table = Table(
                name,
                ["tokens", *names],
                1,
                [
                    [f"{length:,}", *(cell([of[length, depth]], runs, percent) for depth in depths)]
                    for length in lengths
                ],
            )
            caption = (
                f"Right answers in percent, {first.n} questions each; chance is {first.settings['chance']:.0%}. "
                "Rows are tokens of the question."
            )
            drawing = heat(names, told, shares, title=name, x="depth of the fact")
            yield Figure(name, drawing, [], caption, table)


def training_figures(evidence: Evidence) -> Iterator[Figure]:
    """The loss of training runs, and the held-out loss by source."""
    for training in evidence.trainings:
        every = max(1, len(training.records) // 400)
        chunks = [training.records[i : i + every] for i in range(0, len(training.records), every)]
        tokens = [chunk[-1]["tokens"] / 1e6 for chunk in chunks]
        loss = [sum(record["loss"] for record in chunk) / len(chunk) for chunk in chunks]
        # The loss of the first steps is several times as high, and would flatten the rest.
        top = 2 * sorted(loss)[len(loss) // 2]
        kept = [(a, b) for a, b in zip(tokens, loss, strict=True) if b <= top] or list(zip(tokens, loss, strict=True))
        series = [Series("loss", [a for a, _ in kept], [b for _, b in kept])]
        title = f"Training of {training.label}"
        drawing = lines(series, title=title, x="tokens (millions)", y="nats per token")
        held_out = [record for record in training.records if "bits_per_byte" in record]
        table = None
        if held_out:
            sources = list(held_out[-1]["bits_per_byte"])
            table = Table(
                f"{title}: held-out loss in bits per byte",
                ["tokens (millions)", *sources],
                1,
                [
                    [
                        f"{record['tokens'] / 1e6:,.1f}",
                        *(
                            Cell(f"{record['bits_per_byte'][source]:.4f}", record["bits_per_byte"][source])
                            for source in sources
                        ),
                    ]
                    for record in held_out
                ],
            )
        caption = f"Means of {every} steps; steps with more than twice the median loss are left out of the drawing."
        yield Figure(title, drawing, [], caption, table)
