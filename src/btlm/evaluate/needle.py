"""`btlm eval-needle`: does a model use its context? A fact is hidden in a long text and asked for at its end.

The model does not write: the log-likelihood of the right answer is compared with those of wrong ones of its kind. So a
model that finds nothing is right by chance, once in as many times as there are answers. There are three kinds:

- ``text``: "The secret number of Oslo is 4821." somewhere in a text, asked for by the beginning of the same sentence;
- ``random``: two random tokens in random tokens, asked for by the first of them, which needs no language;
- ``absent``: the question of ``text`` without the fact, which nobody can answer: it shows what chance looks like.

The text is, by default, that of passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from btlm.checkpoint.open import Checkpoint
from btlm.engine.engine import Engine

from .perplexity import begin_of_text
from .results import Origin, Result

KINDS = ("text", "random", "absent")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_CITIES = ["Oslo", "Cairo", "Lima", "Delhi", "Paris", "Quito", "Rome", "Tokyo", "Vienna", "Dublin", "Madrid", "Athens"]
# Tokens of cache that an answer needs besides what it shares: two pages.
_PLACES_PER_ANSWER = 128
_FACT, _QUESTION = "\nThe secret number of {} is {}.\n", "\nThe secret number of {} is"


@dataclass(frozen=True)
class Trial:
    """A question.

    Args:
        ids: Tokens that the model reads, end-of-text first.
        answers: Tokens of each answer; the first is right.
    """

    ids: list[int]
    answers: list[list[int]]


@dataclass(frozen=True)
class Cell:
    """What a model made of the questions of one kind, length and depth.

    Args:
        kind: One of :data:`KINDS`.
        length: Tokens of each question.
        depth: Where the fact is, from 0, the beginning, to 1, the end; ``None`` where there is none.
        right: Number of questions in which the right answer was the most likely one. Where several answers were equally
            likely, it counts as one of that many.
        number: Number of questions.
    """

    kind: str
    length: int
    depth: float | None
    right: float
    number: int

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.number

    @property
    def error(self) -> float:
        """Standard error of the share by Agresti and Coull, which is not 0 where all or no answers are right."""
        number = self.number + 4
        share = (self.right + 2) / number
        return math.sqrt(share * (1 - share) / number)


class Trials:
    """Makes questions, the same ones for the same seed.

    Args:
        tokenizer: Tokenizer of the model.
        before: Token before the first one of a text, end-of-text.
        haystack: The text in which facts are hidden; it is repeated where it is too short.
        answers: Number of answers to choose from.
        seed: Seed of all random choices.
    """

    def __init__(self, tokenizer: Tokenizer, before: int, haystack: str, answers: int, seed: int) -> None:
        self._tokenizer, self._before, self._answers, self._seed = tokenizer, before, answers, seed
        self._hay = self._encode(haystack)

    def trial(self, kind: str, length: int, depth: float, number: int) -> Trial:
        """A question.

        Args:
            kind: One of :data:`KINDS`.
            length: Tokens of the question with the longest answer.
            depth: Where the fact is, from 0 to 1.
            number: Number of the question; questions of all depths and kinds with one number ask for the same.

        Raises:
            ValueError: The length is too short.
        """
        rng = np.random.default_rng((self._seed, length, number))
        if kind == "random":
            return self._random(rng, length, depth)
        city = _CITIES[rng.integers(len(_CITIES))]
        values = rng.choice(np.arange(1000, 10000), self._answers, replace=False)
        answers = [self._encode(f" {value}") for value in values]
        fact = self._encode(_FACT.format(city, values[0])) if kind == "text" else []
        question = self._encode(_QUESTION.format(city))
        room = _room(length, 1 + len(fact) + len(question) + max(map(len, answers)))
        start = int(rng.integers(len(self._hay)))
        hay = np.resize(np.roll(self._hay, -start), room).tolist()
        return Trial([self._before, *_hidden(hay, fact, depth), *question], answers)

    def _random(self, rng: np.random.Generator, length: int, depth: float) -> Trial:
        size = self._tokenizer.get_vocab_size()
        room = _room(length, 5)  # end-of-text, fact, question, answer
        known = np.setdiff1d(np.arange(size), [self._before])  # which is unlike all others to a model
        drawn = rng.choice(known, self._answers + 1, replace=False)
        hay = rng.choice(np.setdiff1d(known, drawn), room).tolist()
        first, *answers = drawn.tolist()
        return Trial([self._before, *_hidden(hay, [first, answers[0]], depth), first], [[one] for one in answers])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _room(length: int, needed: int) -> int:
    if length <= needed:
        raise ValueError(
            f"{length} tokens are too few for a fact, a question and an answer; give at least {needed + 1}."
        )
    return length - needed


def _hidden(hay: list[int], fact: list[int], depth: float) -> list[int]:
    place = round(depth * len(hay))
    return [*hay[:place], *fact, *hay[place:]]


def ask(
    checkpoint: Checkpoint,
    *,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    kinds: Sequence[str],
    number: int,
    answers: int,
    seed: int,
    on_trials: Callable[[int], object] = int,
    **engine: Any,
) -> Iterator[Cell]:
    """Ask a model all questions.

    Args:
        checkpoint: The model.
        haystack: The text in which facts are hidden.
        lengths: Tokens of a question.
        depths: Where the fact is, from 0 to 1.
        kinds: Some of :data:`KINDS`.
        number: Questions per kind, length and depth.
        answers: Answers to choose from.
        seed: Seed of the questions.
        on_trials: Called with the number of questions that were answered since the last call.
        **engine: Arguments of :meth:`btlm.engine.Engine.open`.

    Raises:
        DoesNotFit, NotSupported: The engine cannot run the model.
        ValueError: A length is too short.
    """
    before = begin_of_text(checkpoint)
    trials = Trials(checkpoint.tokenizer, before, haystack, answers, seed)
    for length in lengths:
        for kind in kinds:  # too short a length is told before hours of work
            trials.trial(kind, length, 0.0, 0)
    context = max(lengths) + 1
    places = context + _PLACES_PER_ANSWER * answers
    opened = Engine.open(checkpoint, context=context, num_requests=answers, cache_tokens=places, **engine)
    for kind in kinds:
        for length in lengths:
            for depth in (None,) if kind == "absent" else depths:
                right = 0.0
                for i in range(number):
                    trial = trials.trial(kind, length, depth or 0.0, i)
                    right += credit(log_likelihoods(opened, trial))
                    on_trials(1)
                yield Cell(kind, length, depth, right, number)


def credit(scores: npt.NDArray[np.float64]) -> float:
    """1 if the first answer is the most likely one, and of several that are equally likely its share, else 0.

    A model that says nothing, such as one whose token table is zero, finds all answers equally likely: that is chance.

    Args:
        scores: Log-likelihood of each answer, ``[answers]``.
    """
    best = scores == scores.max()
    return float(best[0] / best.sum())


def log_likelihoods(engine: Engine, trial: Trial) -> npt.NDArray[np.float64]:
    """Log-likelihood of each answer in nats, fp64 ``[answers]``; what they have in common is computed once."""
    first, *others = ([*trial.ids, *answer] for answer in trial.answers)
    found = [engine.score(first, len(trial.ids)).sum(dtype=np.float64)]  # its pages are shared by the others
    requests = [engine.add_score(ids, len(trial.ids)) for ids in others]
    try:
        while any(request.finished is None for request in requests):
            engine.step()
    finally:
        for request in requests:
            engine.remove(request)
    for request in requests:
        if request.error is not None:
            raise request.error
        found.append(np.float64(math.fsum(token.logprob for token in request.scores)))
    return np.array(found)


def rows_of(cells: Sequence[Cell], origin: Origin, settings: dict[str, Any]) -> list[Result]:
    """Rows for `results.json`: the share of right answers of each kind, length and depth."""
    rows = []
    for cell in cells:
        where = "" if cell.depth is None else f" at {cell.depth:.0%}"
        of = {"kind": cell.kind, "length": cell.length, "depth": cell.depth}
        name = f"needle {cell.kind}, {cell.length} tokens{where}"
        error, own = cell.error, {**settings, **of}
        rows.append(
            origin.result(name, "accuracy", cell.share, "", cell.number, standard_error=error, shots=0, settings=own)
        )
    return rows
