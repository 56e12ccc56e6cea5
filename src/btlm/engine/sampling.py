"""Logits to the next token.

The order of the rules is that of Transformers' ``generate``: bias, repetition, n-grams, temperature, top-k, top-p. The
penalties that OpenAI's interface has, for what was written, follow the one for repetition, as in vLLM.
"""

import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from btlm.errors import NothingAllowed

from .options import GenerationOptions

Floats = npt.NDArray[np.float32]

# Tells which tokens may come next, bool ``[V]`` or ``None`` for all, from those that were written. It is asked about
# guesses, too, which may not be written in the end, so that its answer must follow from what it is given.
Mask = Callable[[Sequence[int]], npt.NDArray[np.bool_] | None]

# How far below the most probable token a token is looked at for top-p: this factor at a time, so many times, then all.
_THRESHOLD_STEP, _THRESHOLDS = 1 / 16, 8
# More than the sums of probabilities differ by their order.
_ROUNDING = 1e-10
_SMALLEST = 1e-300


class Sampler:
    """Chooses the tokens of one request; its draws depend only on the seed, not on other requests.

    Args:
        options: How to choose.
        prompt_tokens: Number of tokens that were not written, which only the penalty for repetition counts.

    Attributes:
        seed: Seed of the draws, to repeat them; ``None`` if nothing is drawn.
    """

    def __init__(self, options: GenerationOptions, prompt_tokens: int = 0) -> None:
        self.options = options
        self.prompt_tokens = prompt_tokens
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
        if options.logit_bias:
            scores = scores.copy()
            scores[list(options.logit_bias)] += np.fromiter(options.logit_bias.values(), np.float32)
        if options.repetition_penalty is not None and options.repetition_penalty != 1:
            scores = scores.copy()
            seen = np.unique(np.asarray(ids))
            penalty = np.float32(options.repetition_penalty)
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        if options.penalizes_written:
            scores = scores.copy()
            written, times = np.unique(np.asarray(ids[self.prompt_tokens :], np.int64), return_counts=True)
            scores[written] -= times.astype(np.float32) * np.float32(options.frequency_penalty or 0)
            scores[written] -= np.float32(options.presence_penalty or 0)
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
        """Draw a token: of exponential variates E, one per token, the smallest ``E / p`` is that of a token with its p.

        This is the Gumbel-max trick. Two networks that draw with the same variates agree nearly as often as their
        distributions allow, which drafts need.
        """
        options = self.options
        draws = self._random.random(len(scores))
        tokens = np.arange(len(scores))
        if options.top_k is not None and options.top_k < len(scores):
            smallest = np.partition(scores, -options.top_k)[-options.top_k]
            tokens = np.flatnonzero(scores >= smallest)
            scores, draws = scores[tokens], draws[tokens]
        probabilities = softmax(scores, options.temperature)
        if options.top_p is not None and options.top_p < 1:
            kept = nucleus(probabilities, options.top_p)
            tokens, probabilities, draws = tokens[kept], probabilities[kept], draws[kept]
        # -E / p, in place; the logarithm of a draw, below 1, is made smaller than 0 even where it is 0.
        np.subtract(1, draws, out=draws)
        np.log(draws, out=draws)
        draws -= _SMALLEST
        with np.errstate(divide="ignore", over="ignore"):  # of a token that is not possible, or hardly
            draws /= probabilities
        return int(tokens[draws.argmax()])


def log_totals(logits: Floats) -> list[float]:
    """Logarithms of the sum of ``exp(logits)``, one per row of logits ``[R, V]``.

    A row's result has the same bits whatever the other rows are.
    """
    totals = []
    powers = np.empty(logits.shape[1], np.float32)  # of one row, which stays in a core's cache
    for row in logits:
        most = row.max()
        np.exp(np.subtract(row, most, out=powers), out=powers)
        totals.append(math.log(powers.sum()) + float(most))
    return totals


def log_probabilities(logits: Floats, tokens: Sequence[int], totals: Sequence[float] | None = None) -> Floats:
    """Log-probabilities in nats, ``[R]``, of one token per row of logits ``[R, V]``.

    Args:
        logits: Logits.
        tokens: One per row.
        totals: Results of :func:`log_totals`, if they are known.
    """
    totals = log_totals(logits) if totals is None else totals
    rows = zip(logits, tokens, totals, strict=True)
    return np.array([float(row[token]) - total for row, token, total in rows], np.float32)


def best_tokens(
    logits: Floats, number: int, totals: Sequence[float] | None = None
) -> list[tuple[tuple[int, float], ...]]:
    """The most probable tokens of each row of logits ``[R, V]``, with their log-probabilities in nats, best first.

    Args:
        logits: Logits.
        number: Number of tokens, at least 1.
        totals: Results of :func:`log_totals`, if they are known.
    """
    found = []
    for row, total in zip(logits, log_totals(logits) if totals is None else totals, strict=True):
        number = min(number, len(row))
        smallest = row.max() if number == 1 else np.partition(row, -number)[-number]
        near = np.flatnonzero(row >= smallest)
        ids = near[np.lexsort((near, -row[near]))][:number].tolist()
        scores = np.array([float(row[token]) - total for token in ids], np.float32)
        found.append(tuple(zip(ids, scores.tolist(), strict=True)))
    return found


def softmax(scores: npt.NDArray[np.floating[Any]], temperature: float | None = None) -> npt.NDArray[np.float64]:
    """Probabilities ``[V]`` of scores ``[V]``, divided by a temperature if there is one."""
    weights: npt.NDArray[np.float64] = np.subtract(scores, scores.max(), dtype=np.float64)
    if temperature is not None:  # the largest is 0, which stays finite at any temperature
        with np.errstate(over="ignore"):  # the others may become -inf
            weights /= temperature
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


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
