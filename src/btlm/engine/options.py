"""How to continue a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btlm.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt: greedily, by beam search, or by sampling where one of its three options is given.

    Args:
        max_new_tokens: End here at the latest.
        num_beams: Above 1, the most probable of that many continuations; known only at the end, so not streamed.
        temperature: Sample; below 1 the probable tokens gain, above 1 the improbable ones.
        top_p: Sample from the most probable tokens that hold this share of the probability.
        top_k: Sample from this many of the most probable tokens.
        repetition_penalty: Divide positive logits of tokens that the text has by this, and multiply negative ones
            (arXiv 1909.05858); above 1 the text repeats itself less.
        no_repeat_ngram_size: Never write the same n-gram of tokens twice.
        seed: Of the samples; drawn where it is not given.
        lookup_tokens: At most so many tokens are guessed at a time, by looking for the last words earlier in the text,
            and
            checked together: the same text in less time where it repeats itself. 0 turns it off.

    Raises:
        OptionError: Names every impossible value and contradiction.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    lookup_tokens: int = 3

    def __post_init__(self) -> None:
        bounds: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("max_new_tokens", lambda value: value >= 1, "at least 1"),
            ("num_beams", lambda value: value >= 1, "at least 1"),
            ("temperature", lambda value: 0 < value < math.inf, "above 0 (without it, nothing is sampled)"),
            ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("top_k", lambda value: value >= 1, "at least 1"),
            ("repetition_penalty", lambda value: 0 < value < math.inf, "above 0 (1 changes nothing)"),
            ("no_repeat_ngram_size", lambda value: value >= 1, "at least 1"),
            ("seed", lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
            ("lookup_tokens", lambda value: 0 <= value <= 16, "between 0 and 16"),
        )
        problems, values = [], []
        for name, holds, what in bounds:
            value = getattr(self, name)
            if value is not None and not holds(value):
                problems.append(f"{{{name}}} is {{}} and must be {what}")
                values.append(value)
        if self.samples and self.num_beams > 1:
            problems.append("{num_beams} searches and {temperature}, {top_p} and {top_k} sample; use one or the other")
        if self.seed is not None and not self.samples:
            problems.append("{seed} needs sampling; add {temperature}, {top_p} or {top_k}")
        if problems:
            raise OptionError(f"{'; '.join(problems)}.", *values)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return any(option is not None for option in (self.temperature, self.top_p, self.top_k))
