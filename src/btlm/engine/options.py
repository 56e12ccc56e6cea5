"""How to continue a text."""

from dataclasses import dataclass
from typing import Annotated

from btlm.errors import OptionError
from btlm.settings import Count, Number, Range, check

Threads = Annotated[int, Range(1, 1024)]
Positive = Annotated[float, Range(above=0)]
# Changes of logits stay within what 32-bit numbers can hold beside any logit.
Penalty = Annotated[float, Range(0.001, 1000)]
Bias = Annotated[float, Range(-100, 100)]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt: greedily, by beam search, or by sampling where one of its three options is given.

    Args:
        max_new_tokens: Most tokens to generate; the text may end earlier.
        num_beams: Number of beams. Above 1, the most probable of that many continuations; it is known only at the end,
            so not streamed.
        temperature: Randomness of sampling: below 1 safer, above 1 wilder; 0 always takes the most probable token
            (default: no sampling).
        top_p: Share of the probability; tokens are sampled from the most probable ones that hold it.
        top_k: Number of most probable tokens to sample from.
        repetition_penalty: Penalty on tokens that the text has: positive logits are divided by it, negative ones
            multiplied (arXiv 1909.05858); above 1 the text repeats itself less.
        no_repeat_ngram_size: Length of n-grams of tokens that are never written twice.
        presence_penalty: Number that is taken from the logits of tokens that were written, prompt left aside.
        frequency_penalty: Number that is taken from the logit of a token each time it was written, prompt left aside.
        logit_bias: Numbers that are added to the logits of tokens, by id: -100 forbids a token in practice, and 100
            makes it certain.
        seed: Seed of the samples (default: a random one, which is reported).
        lookup_tokens: Most tokens to guess at a time, by looking for the last words earlier in the text, and to check
            together: the same text, faster where it repeats itself; 0 turns it off.
        draft_tokens: Most tokens that a draft guesses at a time, if there is one; how many it guesses depends on how
            often it was right. 0 turns it off.

    Raises:
        OptionError: Names every impossible value and contradiction.
    """

    max_new_tokens: Count = 128
    num_beams: Count = 1
    temperature: Number | None = None
    top_p: Annotated[float, Range(above=0, most=1)] | None = None
    top_k: Count | None = None
    repetition_penalty: Penalty | None = None
    no_repeat_ngram_size: Count | None = None
    presence_penalty: Bias | None = None
    frequency_penalty: Bias | None = None
    logit_bias: dict[int, Bias] | None = None
    seed: Annotated[int, Range(0, 2**63 - 1)] | None = None
    lookup_tokens: Annotated[int, Range(0, 16)] = 3
    draft_tokens: Annotated[int, Range(0, 16)] = 8

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
        problems = []
        if self.samples and self.num_beams > 1:
            problems.append("{num_beams} searches and {temperature}, {top_p} and {top_k} sample; use one or the other")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            problems.append("{temperature} 0 always takes the most probable token; leave {top_p} and {top_k} out")
        if self.seed is not None and not self.samples:
            problems.append("{seed} needs sampling; add {temperature}, {top_p} or {top_k}")
        if problems:
            raise OptionError(f"{'; '.join(problems)}.")

    @property
    def penalizes_written(self) -> bool:
        """Whether the tokens that were written change the logits, prompt left aside."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature != 0 and any(x is not None for x in (self.temperature, self.top_p, self.top_k))
