"""The page of `btlm report`: what its template shows."""

from typing import Any

from btlm import __version__

from .reference import SOURCE
from .report_data import Evidence
from .report_figures import (
    memory_figure,
    needle_figures,
    position_figures,
    score_figure,
    speed_figure,
    training_figures,
)
from .report_tables import Runs, benchmark_table, further_table, model_table, perplexity_table
from .suites import SUITES

_SMALL = ("BTLM-3B-8k", "StableLM-alpha-3B-v2", "OpenLLaMA-3B-v2", "Pythia-2.8B", "StableLM-3B-4E1T")
_LARGE = ("BTLM-3B-8k", "RedPajama-7B", "MPT-7B", "OpenLLaMA-7B-v2", "LLaMA-7B")


def page(evidence: Evidence) -> dict[str, Any]:
    """What the template shows: tables and figures by section."""
    runs = Runs()
    benchmarks = [
        table
        for title, references, suite in (
            ("Table 1. Benchmarks, beside published scores of models of 3B parameters", _SMALL, "table1"),
            ("Table 2. Benchmarks, beside published scores of models of 7B parameters", _LARGE, "table2"),
            ("Other benchmarks", _SMALL, "other"),
        )
        if (table := benchmark_table(evidence, runs, title, references, SUITES[suite]))
    ]
    known = {name for suite in SUITES.values() for name in suite}
    if further := further_table(evidence, runs, known):
        benchmarks.append(further)
    figures = [
        memory_figure(evidence, runs),
        speed_figure(evidence, runs),
        score_figure(evidence, "Figure 3. Benchmarks at 3B parameters", _SMALL),
        score_figure(evidence, "Figure 4. Benchmarks at 7B parameters", _LARGE),
        *position_figures(evidence, runs),
    ]
    needles, trainings = list(needle_figures(evidence, runs)), list(training_figures(evidence))
    text = perplexity_table(evidence, runs)
    return {
        "title": " and ".join(model.label for model in evidence.models) or "Training",
        "models": model_table(evidence),
        "benchmarks": benchmarks,
        "figures": figures,
        "text": text,
        "needles": needles,
        "trainings": trainings,
        "source": SOURCE,
        "partial": any(row.partial for row in evidence.rows),
        "runs": [facts for _, facts in runs.found.values()],
        "version": __version__,
    }
