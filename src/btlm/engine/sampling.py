"""Logits to the next token.

The order of the rules is that of Transformers' ``generate``: repetition, n-grams, temperature, top-k, top-p.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.errors import NothingAllowed

from .options import GenerationOptions

Floats = npt.NDArray[np.float32]

# How far below the most probable token a token is looked at for top-p: this factor at a time, so many times, then all.
_THRESHOLD_STEP, _THRESHOLDS = 1 / 16, 8
# More than the sums of probabilities differ by their order.
_ROUNDING = 1e-10


class Sampler:
    """Chooses the tokens of one request; its draws depend only on the seed, not on other requests.

    Args:
        options: How to choose.

    Attributes:
        seed: Seed of the draws, to repeat them; ``None`` if nothing is drawn.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        self.seed = options.seed
        if options.samples and self.seed is None:
            self.seed = secrets.randbelow(2**31)
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits: Floats, ids: Sequence[int], allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Choose the next token.

        Args:
            logits: Logits ``[V]``; they are not changed.
            ids: Tokens before it, prompt included.
            allowed: Whether each token may be chosen, ``[V]``; ``None`` if all may.

        Raises:
            NothingAllowed: ``allowed`` and the rules exclude every token.
        """
        options = self.options
        scores = logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))
        if options.repetition_penalty is not None and options.repetition_penalty != 1:
            scores = scores.copy()
            seen = np.unique(np.asarray(ids))
            penalty = np.float32(options.repetition_penalty)
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if options.no_repeat_ngram_size is not None:
            banned = repeated(ids, options.no_repeat_ngram_size)
            if len(banned):
                scores = scores.copy()
                scores[banned] = -np.inf
        if allowed is not None and scores.max() == -np.inf:
            raise NothingAllowed("What may come next excludes every token.")
        if not options.samples:
            return int(scores.argmax())
        return self._draw(scores)

    def _draw(self, scores: npt.NDArray[np.floating[Any]]) -> int:
        options = self.options
        if options.temperature is not None:  # the largest score becomes 0, which stays finite at any temperature
            with np.errstate(over="ignore"):  # the others may become -inf
                scores = (scores - scores.max()).astype(np.float64) / options.temperature
        tokens = np.arange(len(scores))
        if options.top_k is not None and options.top_k < len(scores):
            smallest = np.partition(scores, -options.top_k)[-options.top_k]
            tokens = np.flatnonzero(scores >= smallest)
            scores = scores[tokens]
        probabilities = softmax(scores)
        if options.top_p is not None and options.top_p < 1:
            order = nucleus(probabilities, options.top_p)
            tokens, probabilities = tokens[order], probabilities[order]
        cumulative = np.cumsum(probabilities)
        point = self._random.random() * cumulative[-1]
        return int(tokens[np.searchsorted(cumulative, point, side="right")])  # random() < 1: not behind the last


def log_probabilities(logits: Floats, tokens: Sequence[int]) -> Floats:
    """Log-probabilities in nats, ``[R]``, of one token per row of logits ``[R, V]``.

    A row's result has the same bits whatever the other rows are.
    """
    most = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64)) + most[:, 0]
    scores: Floats = (logits[np.arange(len(logits)), tokens] - total).astype(np.float32)
    return scores


def best_tokens(logits: Floats, number: int) -> list[tuple[tuple[int, float], ...]]:
    """The most probable tokens of each row of logits ``[R, V]``, with their log-probabilities in nats, best first."""
    found = []
    for row in logits:
        number = min(number, len(row))
        smallest = np.partition(row, -number)[-number]
        near = np.flatnonzero(row >= smallest)
        ids = near[np.lexsort((near, -row[near]))][:number].tolist()
        scores = log_probabilities(np.broadcast_to(row, (len(ids), len(row))), ids)
        found.append(tuple(zip(ids, scores.tolist(), strict=True)))
    return found


def softmax(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Probabilities ``[V]`` of scores ``[V]``."""
    weights = np.exp((scores - scores.max()).astype(np.float64))
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities


def nucleus(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """The most probable tokens that have ``top_p`` together, the most probable first, of equals the first.

    Only tokens that are probable enough are sorted: a threshold goes down until they hold more than ``top_p``. What is
    left out could only follow them, so that the result is the same, bit for bit, as of sorting all.

    Args:
        probabilities: Of all tokens, ``[V]``; their sum is 1.
        top_p: Above 0 and below 1.

    Returns:
        Positions in ``probabilities``.
    """
    threshold = probabilities.max()
    for _ in range(_THRESHOLDS):
        threshold *= _THRESHOLD_STEP
        candidates = np.flatnonzero(probabilities >= threshold)
        if probabilities[candidates].sum() > top_p + _ROUNDING:
            break
    else:
        candidates = np.arange(len(probabilities))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    sorted_probabilities = probabilities[order]
    before = np.cumsum(sorted_probabilities) - sorted_probabilities
    return order[before < top_p]


def repeated(ids: Sequence[int], size: int) -> npt.NDArray[np.int64]:
    """Tokens that would complete an n-gram of the given size that ``ids`` already has."""
    tokens = np.asarray(ids, np.int64)
    if len(tokens) < size:
        return np.empty(0, np.int64)
    if size == 1:
        return np.unique(tokens)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    same = (windows[:, :-1] == tokens[len(tokens) - size + 1 :]).all(axis=1)
    return np.unique(windows[same, -1])
