"""The scheduler: which tokens of which requests a step computes, and what its logits mean.

A step is one forward pass for several requests. Each brings the tokens that are not in the cache yet: a piece of its
prompt, its last token, or its last token and guesses of the next ones. Requests join and leave between two steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from btlm.errors import EngineFull

from .cache import KVCache, common_prefix
from .options import GenerationOptions
from .sampling import Sampler, log_probabilities, log_probability
from .speculation import PromptLookup

_MOST_GUESSING = 2  # requests; with more of them a step's extra tokens are no longer free


class Token(NamedTuple):
    """A token that was written.

    Args:
        id: Token id.
        logprob: Log-probability in nats under the model, before temperature and the other rules.
    """

    id: int
    logprob: float


@dataclass(eq=False)
class Request:
    """A prompt that the engine continues or scores; see :meth:`btlm.engine.Engine.add`.

    Args:
        ids: Tokens of the prompt, then those that were written.
        options: How to continue it.
        stop_ids: Tokens that end it.
        max_new_tokens: Number of tokens to write at most; 0 to score the prompt only.
        scores: Log-probabilities in nats of the prompt's tokens from the second one on, as far as they are computed;
            ``None`` if they are not wanted.
        prompt_tokens: Length of the prompt.
        reused_tokens: Tokens of the prompt that were in the cache when the request was added.
        cached: Tokens of ``ids`` that are in the cache.
        tokens: Tokens that were written.
        finished: ``None``, ``"stop"`` after a stop id, ``"length"`` after ``max_new_tokens``, or ``"error"``.
        error: Why it cannot be continued, after ``"error"``.
    """

    ids: list[int]
    options: GenerationOptions
    stop_ids: frozenset[int]
    max_new_tokens: int
    scores: list[float] | None = None
    prompt_tokens: int = field(init=False)
    reused_tokens: int = field(init=False, default=0)
    cached: int = field(init=False, default=0)
    tokens: list[Token] = field(init=False, default_factory=list)
    finished: str | None = field(init=False, default=None)
    error: ValueError | None = field(init=False, default=None)
    sampler: Sampler = field(init=False)
    lookup: PromptLookup = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self.sampler = Sampler(self.options)
        self.lookup = PromptLookup(self.options.lookup_tokens)

    @property
    def new_tokens(self) -> int:
        """Number of tokens written."""
        return len(self.tokens)

    @property
    def unread(self) -> int:
        """Number of tokens that the next steps have to read; nothing follows the last token of a score."""
        return len(self.ids) - self.cached - (self.max_new_tokens == 0)


class Part(NamedTuple):
    """What a request brings to a step.

    Args:
        request: The request.
        slot: Its slot in the cache.
        read: Number of its own tokens, from ``request.cached`` on.
        guess: Guesses of the tokens after them.
        rows: Number of its last tokens, guesses included, whose logits are wanted.
        scored: Number of those rows that score tokens of the prompt. They come first; the others write.
    """

    request: Request
    slot: int
    read: int
    guess: list[int]
    rows: int
    scored: int


class Step:
    """One forward pass: its parts, and the arrays for :meth:`btlm.engine.network.Network.forward`.

    Args:
        parts: What the requests bring, in the order of the arrays.

    Attributes:
        ids: ``[T]``, int64.
        segments: ``[P, 4]``, int64, one row per part.
        rows: ``[R]``, int64.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        ids: list[int] = []
        segments: list[tuple[int, int, int, int]] = []
        rows: list[int] = []
        for part in parts:
            first, cached = len(ids), part.request.cached
            ids += [*part.request.ids[cached : cached + part.read], *part.guess]
            segments.append((first, part.slot, cached, len(ids) - first))
            rows += range(len(ids) - part.rows, len(ids))
        self.ids, self.segments, self.rows = (np.array(values, np.int64) for values in (ids, segments, rows))


class Scheduler:
    """Requests under way, and the slots of the cache.

    Args:
        cache: One slot per request.
        step_tokens: Tokens per step.
        step_scores: Scored tokens per step, which bounds the memory for their logits.
    """

    def __init__(self, cache: KVCache, step_tokens: int, step_scores: int) -> None:
        self._cache = cache
        self._step_tokens = step_tokens
        self._step_scores = step_scores
        self._slots = [_Slot(i) for i in range(cache.num_slots)]  # the least recently assigned first

    @property
    def has_room(self) -> bool:
        """Whether a request can be added."""
        return any(slot.request is None for slot in self._slots)

    def add(self, request: Request) -> None:
        """Give a request a slot, and what the cache holds of the beginning of its prompt.

        A prompt that is scored is computed from its first token.

        Raises:
            EngineFull: All slots are taken.
        """
        free = [slot for slot in self._slots if slot.request is None]
        if not free:
            raise EngineFull(f"The engine is full: {len(self._slots)} requests are under way; remove one.")
        slot = free[0]
        if request.scores is None:
            # The last token is computed in any case: its logits are needed.
            shared = {s.index: min(common_prefix(request.ids, s.ids()), len(request.ids) - 1) for s in self._slots}
            best = max(self._slots, key=lambda s: (shared[s.index], s.request is None))
            request.reused_tokens = request.cached = shared[best.index]
            if best.request is None and (request.cached == len(best.ids()) or len(free) == 1):
                slot = best
            elif request.cached and slot is not best:  # later requests may want to reuse what is left in the best one
                self._cache.copy(best.index, slot.index, request.cached)
        slot.request = request
        self._slots.remove(slot)
        self._slots.append(slot)

    def remove(self, request: Request) -> None:
        """Stop a request, unless it has ended; its tokens stay in the cache until the slot is given away."""
        for slot in self._slots:
            if slot.request is request:
                slot.left, slot.request = slot.ids(), None

    def fail(self, request: Request, error: ValueError) -> None:
        """End a request that cannot be continued."""
        request.finished, request.error = "error", error
        self.remove(request)

    def plan(self, only: Request | None = None) -> Step:
        """Choose what the next step computes, for all requests or only for one; nothing changes yet.

        Requests that write come first, so that a long prompt does not hold them up.
        """
        running = [(slot.request, slot.index) for slot in self._slots if slot.request is not None]
        guessing = len(running) <= _MOST_GUESSING
        tokens, scores = self._step_tokens, self._step_scores  # that are left
        parts = []
        for request, slot in sorted(running, key=lambda pair: pair[0].unread):
            if only is not None and request is not only:
                continue
            to_score = 0 if request.scores is None else max(0, request.prompt_tokens - 1 - request.cached)
            read = min(request.unread, tokens, scores if to_score else tokens)
            if read == 0:
                continue
            scored = min(read, to_score)
            writes = read == request.unread and request.max_new_tokens > 0
            guess = []
            if writes and read == 1 and guessing:
                left = request.max_new_tokens - request.new_tokens - 1  # beside the token that is written in any case
                room = tokens - len(running)  # each request can have one token
                guess = request.lookup.guess(request.ids)[: max(0, min(left, room))]
            rows = (read if scored else int(writes)) + len(guess)
            parts.append(Part(request, slot, read, guess, rows, scored))
            tokens -= read + len(guess)
            scores -= scored
        return Step(parts)

    def record(self, step: Step, logits: npt.NDArray[np.float32]) -> list[tuple[Request, Token]]:
        """Score and write by the logits of a step, and remove the requests that end.

        Args:
            step: As :meth:`plan` returned it.
            logits: ``[R, V]``.

        Returns:
            The tokens that were written; several of one request where guesses were right.
        """
        written: list[tuple[Request, Token]] = []
        row = 0
        for request, _, read, guess, num_rows, scored in step.parts:
            rows = logits[row : row + num_rows]
            row += num_rows
            if request.scores is not None and scored:
                following = request.ids[request.cached + 1 : request.cached + 1 + scored]
                request.scores += log_probabilities(rows[:scored], following).tolist()
            request.cached += read
            if num_rows > scored:
                written += [(request, token) for token in _write(request, guess, rows[scored:])]
            elif request.unread == 0:
                request.finished = "length"
            if request.finished:
                self.remove(request)
        return written


@dataclass(eq=False)
class _Slot:
    """A slot of the cache.

    Args:
        index: Its place in the cache.
        request: The request that has it, if any.
        left: Tokens that the last request left in it.
    """

    index: int
    request: Request | None = None
    left: list[int] = field(default_factory=list)

    def ids(self) -> list[int]:
        """Tokens whose keys and values it holds."""
        return self.left if self.request is None else self.request.ids[: self.request.cached]


def _write(request: Request, guess: list[int], logits: npt.NDArray[np.float32]) -> list[Token]:
    """Choose tokens as long as they are what was guessed, each by its own draw: the same tokens as without guesses."""
    tokens: list[Token] = []
    for i, row in enumerate(logits):
        choice = request.sampler.choose(row, request.ids)
        request.ids.append(choice)
        tokens.append(Token(choice, log_probability(row, choice)))
        request.tokens.append(tokens[-1])
        if choice in request.stop_ids:
            request.finished = "stop"
        elif request.new_tokens >= request.max_new_tokens:
            request.finished = "length"
        right = i < len(guess) and choice == guess[i]
        if request.finished or not right:
            break
        request.cached += 1
    request.lookup.learn(len(guess), len(tokens) - 1)
    return tokens
