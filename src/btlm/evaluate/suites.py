"""The tasks of the paper's tables (arXiv 2309.11568) in lm-evaluation-harness, each with the metric that it reports."""

from dataclasses import dataclass, field
from typing import Any

_MEAN = {"aggregation": "mean", "higher_is_better": True}


@dataclass(frozen=True)
class PaperTask:
    """A task as the paper reports it.

    Args:
        name: Name of the task or group in lm-evaluation-harness, or the one it gets here.
        metric: The paper's metric, by its name in lm-evaluation-harness.
        shots: Number of examples before a question.
        stock: Task of lm-evaluation-harness that this one is made of; ``name`` if it is empty.
        changes: Keys of its configuration that differ.
    """

    name: str
    metric: str
    shots: int = 0
    stock: str = ""
    changes: dict[str, Any] = field(default_factory=dict)


_ACC_NORM = {"metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}]}

TASKS = {
    task.name: task
    for task in (
        PaperTask("piqa", "acc_norm"),
        PaperTask("social_iqa", "acc_norm", changes=_ACC_NORM),
        PaperTask("hellaswag", "acc_norm"),
        PaperTask("winogrande", "acc"),
        PaperTask("arc_easy", "acc_norm"),
        PaperTask("arc_challenge", "acc_norm"),
        PaperTask("openbookqa", "acc_norm"),
        PaperTask("boolq", "acc"),
        PaperTask("race", "acc"),
        PaperTask("race_middle", "acc", stock="race", changes={"dataset_name": "middle"}),
        PaperTask("nq_open", "exact_match"),
        PaperTask("triviaqa", "exact_match"),
        # The answers are single letters, so that acc_norm, which the paper reports, is the same as acc.
        PaperTask("mmlu", "acc", shots=5),
        PaperTask("lambada_openai", "acc"),
        PaperTask("truthfulqa_mc2", "acc"),
        PaperTask("sciq", "acc_norm"),
        PaperTask("crows_pairs_english", "pct_stereotype"),
        PaperTask("humaneval", "pass@1", stock="btlm_humaneval"),
        PaperTask("qmsum", "rougeL"),
        PaperTask("gov_report", "rougeL"),
    )
}

# The tables compare models of 3B and of 7B parameters on the same tasks.
_CHOICES = ("piqa", "social_iqa", "hellaswag", "winogrande", "openbookqa", "boolq", "arc_easy", "arc_challenge")
_TABLE = (*_CHOICES, "race_middle", "race", "nq_open", "triviaqa", "mmlu")
SUITES = {
    "table1": _TABLE,
    "table2": _TABLE,
    "long": ("qmsum", "gov_report"),
    "other": ("lambada_openai", "truthfulqa_mc2", "sciq", "crows_pairs_english"),
}


def shown_scale(metric: str) -> float:
    """What a score is multiplied by where it is shown: scores are in percent, perplexities are not."""
    return 1.0 if "perplexity" in metric else 100.0
