"""A request to the engine, and the tokens that it is told of."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from .draft import DraftGuesses
from .options import GenerationOptions
from .sampling import Mask, Sampler
from .speculation import PromptLookup


class Token(NamedTuple):
    """A token that was written or scored.

    Args:
        id: Token id.
        logprob: Log-probability in nats under the model, before temperature and the other rules.
        best: Whether no other token is more probable.
        alternatives: The most probable tokens, the first ones first, each with its log-probability; as many as the
            request wants.
    """

    id: int
    logprob: float
    best: bool = True
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """A prompt that the engine continues or scores; see :meth:`btlm.engine.Engine.add`.

    Args:
        ids: Tokens of the prompt, then those that were written.
        options: How to continue it.
        stop_ids: Tokens that end it.
        max_new_tokens: Number of tokens to write at most; 0 to score the prompt only.
        score_from: Index of the first token of the prompt that is scored, at least 1; ``None`` if none is.
        num_alternatives: Number of alternatives per token.
        mask: Tells which tokens may come next.

    Attributes:
        scores: The scored tokens, as far as they are computed.
        prompt_tokens: Length of the prompt.
        reused_tokens: Tokens of the prompt that other requests had computed.
        cached: Tokens of ``ids`` that are in the cache.
        tokens: Tokens that were written.
        finished: ``None``, ``"stop"`` after a stop id, ``"length"`` after ``max_new_tokens``, or ``"error"``.
        error: Why it was not continued, after ``"error"``; ``RequestCancelled`` where it was removed.
        added, started, written: Seconds of :func:`time.perf_counter` at which it was added, first computed, and at
            which its first and its latest token were written; ``None`` before.
        lookup, draft: Guesses of its next tokens, and how many were made and accepted.
    """

    ids: list[int]
    options: GenerationOptions
    stop_ids: frozenset[int]
    max_new_tokens: int
    score_from: int | None = None
    num_alternatives: int = 0
    mask: Mask | None = None
    scores: list[Token] = field(init=False, default_factory=list)
    prompt_tokens: int = field(init=False)
    reused_tokens: int = field(init=False, default=0)
    cached: int = field(init=False, default=0)
    tokens: list[Token] = field(init=False, default_factory=list)
    finished: str | None = field(init=False, default=None)
    error: ValueError | None = field(init=False, default=None)
    added: float = field(init=False, default_factory=lambda: time.perf_counter())
    started: float | None = field(init=False, default=None)
    written: tuple[float, float] | None = field(init=False, default=None)
    sampler: Sampler = field(init=False)
    lookup: PromptLookup = field(init=False)
    draft: DraftGuesses = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self.sampler = Sampler(self.options, self.prompt_tokens)
        self.lookup = PromptLookup(self.options.lookup_tokens)
        self.draft = DraftGuesses(self.options.draft_tokens if self.max_new_tokens else 0)

    @property
    def new_tokens(self) -> int:
        """Number of tokens written."""
        return len(self.tokens)

    @property
    def unread(self) -> int:
        """Number of tokens that the next steps have to read; nothing follows the last token of a score."""
        return len(self.ids) - self.cached - (self.max_new_tokens == 0)

    @property
    def places(self) -> int:
        """Number of tokens that it can have in the cache; the last one that it writes is not read."""
        return max(1, self.prompt_tokens + self.max_new_tokens - 1)

    @property
    def reusable(self) -> int:
        """Number of tokens of the prompt that need not be computed, if others have computed them.

        The logits of the tokens before those that are scored or written are needed.
        """
        return (self.prompt_tokens if self.score_from is None else self.score_from) - 1

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first one; ``None`` until there are two."""
        if self.written is None or self.written[0] == self.written[1]:
            return None
        return (self.new_tokens - 1) / (self.written[1] - self.written[0])
