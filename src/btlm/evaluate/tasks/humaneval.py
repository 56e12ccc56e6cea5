"""pass@k of programs, for the task of this folder."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from btlm.evaluate.sandbox import runs_to_its_end

KS = (1, 10, 100)


def process_results(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Run programs and return pass@k for each k of :data:`KS` that is at most their number.

    Args:
        document: A problem with ``prompt``, ``test`` and ``entry_point``.
        results: The continuations of its prompt, or a list that holds their list.
    """
    texts = [one for result in results for one in ([result] if isinstance(result, str) else result)]
    right = sum(map(runs_to_its_end, programs(document, texts)))
    return {f"pass@{k}": pass_at_k(len(texts), right, k) for k in KS if k <= len(texts)}


def programs(document: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
    """Continuations with what comes before them and their tests."""
    end = f"\n{document['test']}\ncheck({document['entry_point']})\n"
    return [f"{document['prompt']}{text}{end}" for text in texts]


def pass_at_k(number: int, right: int, k: int) -> float:
    """Probability that one of k programs is right, estimated without bias from a number of programs.

    ``1 - C(number - right, k) / C(number, k)``: equation 1 of arXiv 2107.03374.
    """
    return 1.0 - math.comb(number - right, k) / math.comb(number, k)
