"""ROUGE of a summary, for the tasks of this folder."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_KINDS = ["rouge1", "rouge2", "rougeL"]


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measures of a text, from 0 to 1, with stems of words, against the answer that it is nearest to.

    Args:
        document: The question, with ``answers``.
        results: The text.
    """
    scores = [_scorer().score(answer, results[0]) for answer in document["answers"]]
    return {kind: max(float(score[kind].fmeasure) for score in scores) for kind in _KINDS}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(_KINDS, use_stemmer=True)
