"""The scheduler: which tokens of which requests a step computes, and what its logits mean.

A step is one forward pass for several requests. Each brings the tokens that are not in the cache yet: a piece of its
prompt, its last token, or its last token and guesses of the next ones. Requests join and leave between two steps.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from btlm.console import plural
from btlm.errors import EngineFull, NothingAllowed, RequestCancelled
from btlm.kernels import num_pages
from btlm.kernels.arrays import PAGE_TOKENS

from .cache import KVCache, common_prefix
from .draft import Draft, DraftGuesses, Wanted
from .pace import Pace
from .request import Request, Token
from .sampling import best_tokens, log_probabilities, log_totals
from .speculation import PromptLookup

_MOST_GUESSING = 2  # requests; with more of them a step's extra tokens are no longer free


class Part(NamedTuple):
    """What a request brings to a step.

    Args:
        request: The request.
        slot: Its slot in the cache.
        read: Number of its own tokens, from ``request.cached`` on.
        guess: Guesses of the tokens after them.
        guesser: Who guessed.
        rows: Number of its last tokens, guesses included, whose logits are wanted.
        scored: Number of those rows that score tokens of the prompt. They come first; the others write.
    """

    request: Request
    slot: int
    read: int
    guess: list[int]
    guesser: PromptLookup | DraftGuesses
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
    """Requests under way, and what the cache holds for them.

    Args:
        cache: One slot per request.
        step_tokens: Tokens per step.
        step_scores: Scored tokens per step, which bounds the memory for their logits.
        patience: See :class:`Pace`.
        draft: Guesses tokens.
    """

    def __init__(
        self,
        cache: KVCache,
        step_tokens: int,
        step_scores: int,
        patience: float | None = None,
        draft: Draft | None = None,
    ) -> None:
        self.pace = Pace(patience)
        self._draft = draft
        self._cache = cache
        self._step_tokens = step_tokens
        self._step_scores = step_scores
        self._slots: dict[Request, int] = {}  # of the requests under way
        self._leaders: dict[Request, tuple[Request, int]] = {}
        self._left: list[_Text] = []  # of ended requests, the oldest first

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return len(self._slots) < self._cache.num_slots

    def add(self, request: Request) -> None:
        """Give a request a slot, and what the cache holds of the beginning of its prompt.

        It gets places for all tokens that it may read and write, so that nothing that is under way ever has to wait for
        memory. For these, what ended requests have left in the cache is dropped, the oldest first, as far as necessary.
        Where a request under way is about to compute tokens that both begin with, this one waits for them.

        Raises:
            EngineFull: All slots are taken, or the cache has too few free places; nothing has changed.
        """
        if not self.has_room:
            raise EngineFull(f"The engine is full: {len(self._slots)} requests are under way; remove one.")
        running = [
            _Text(other.ids[: other.cached], self._cache.pages(slot), _drafted(other))
            for other, slot in self._slots.items()
        ]
        taken = {page for text in running for page in text.pages}

        def missing(text: _Text, kept: int, move: bool) -> int:
            """Number of pages that are too few to begin with the first tokens of a text."""
            shared = num_pages(kept) if move else kept // PAGE_TOKENS
            held = taken.union(text.pages[: num_pages(kept)])
            return num_pages(request.places) - shared - (self._cache.num_pages - len(held))

        texts = [*running, *self._left]
        shared = [min(common_prefix(request.ids, text.ids), request.reusable) for text in texts]
        kept = max(shared, default=0)
        best = texts[shared.index(kept)] if kept else _Text([], [], 0)
        # Only what an ended request has left, and to no other text, can be appended to without a copy of its last page.
        movable = best in self._left and self._cache.holders(best.pages[num_pages(kept) - 1]) == 1
        move = movable and (kept == len(best.ids) or missing(best, kept, move=False) > 0)
        if missing(best, kept, move) > 0:
            kept, move = kept // PAGE_TOKENS * PAGE_TOKENS, False
        if (pages := missing(best, kept, move)) > 0:
            raise EngineFull(
                f"The engine is full: the request needs places for {request.places:,} tokens in the cache, "
                f"{pages * PAGE_TOKENS:,} more than requests under way leave; remove one."
            )
        source = best.pages[: num_pages(kept)]
        self._cache.hold(source)
        if move:
            self._forget(best)
        while self._cache.free_pages < num_pages(request.places) - (len(source) if move else kept // PAGE_TOKENS):
            self._forget(self._left[0])
        slot = min(set(range(self._cache.num_slots)) - set(self._slots.values()))
        self._cache.begin(slot, request.places, source, kept, move=move)
        self._cache.drop(source)
        request.reused_tokens = request.cached = kept
        request.draft.read = min(kept, best.drafted)
        self._lead(request)
        self._slots[request] = slot

    def remove(self, request: Request) -> None:
        """Stop a request, unless it has ended; its tokens stay in the cache until the memory is needed."""
        if request not in self._slots:
            return
        if request.finished is None:
            request.finished = "error"
            request.error = RequestCancelled(f"The request was cancelled after {plural(request.new_tokens, 'token')}.")
        self._leaders.pop(request, None)
        followers = [follower for follower, (leader, _) in self._leaders.items() if leader is request]
        for follower in followers:
            self._follow(follower)
        pages = self._cache.end(self._slots.pop(request), request.cached)
        text = _Text(request.ids[: request.cached], pages, _drafted(request))
        for follower in followers:
            self._lead(follower)
        for other in [other for other in self._left if common_prefix(other.ids, text.ids) == len(other.ids)]:
            self._forget(other)  # it is the beginning of this one
        if text.ids:
            self._left.append(text)

    def fail(self, request: Request, error: ValueError) -> None:
        """End a request that cannot be continued."""
        request.finished, request.error = "error", error
        self.remove(request)

    def plan(self) -> Step:
        """Choose what the next step computes.

        Requests that write come first, and while they do, :class:`Pace` bounds what is read of prompts.
        """
        for follower, (leader, most) in list(self._leaders.items()):
            if leader.cached >= most:
                self._follow(follower)
        guessing = len(self._slots) <= _MOST_GUESSING
        tokens, scores = self._step_tokens, self._step_scores  # that are left
        prompts = self.pace.prompt_tokens if any(request.new_tokens for request in self._slots) else None
        parts: list[Part] = []
        wanted: dict[int, Wanted] = {}  # of the draft, by the number of a part
        order = sorted(self._slots.items(), key=lambda item: (not item[0].new_tokens, item[0].unread))
        for request, slot in order:
            if request in self._leaders:
                continue
            request.draft.read = _drafted(request)
            most = tokens if request.new_tokens or prompts is None else min(tokens, prompts)
            read = min(request.unread, most)
            scored = 0
            if request.score_from is not None:
                unscored = max(0, request.score_from - 1 - request.cached)  # they have to be read before
                read = min(read, unscored + scores)
                scored = max(0, min(request.cached + read, request.prompt_tokens - 1) - request.cached - unscored)
            if read == 0:
                continue
            writes = read == request.unread and request.max_new_tokens > 0
            guess: list[int] = []
            number = 0  # of tokens that the draft guesses
            if writes and read == 1:
                left = request.max_new_tokens - request.new_tokens - 1  # beside the token that is written in any case
                room = max(0, min(left, tokens - len(self._slots)))  # each request can have one token
                if self._draft is not None:
                    number = request.draft.number(self._draft.costs, room, len(self._slots))
                if number == 0 and guessing:
                    guess = request.lookup.guess(request.ids)[:room]
            if number or (read > 1 and request.draft.most):
                end = request.cached + read
                wanted[len(parts)] = Wanted(
                    request.ids, request.sampler, request.draft, slot, end, number, request.mask, request.prompt_tokens
                )
            guesser = request.draft if number else request.lookup
            parts.append(Part(request, slot, read, guess, guesser, scored + writes + len(guess), scored))
            tokens -= read + number + len(guess)
            scores -= scored
            if prompts is not None and not request.new_tokens:
                prompts -= read
        if self._draft is not None:
            for i, guess in zip(wanted, self._draft.guess(list(wanted.values())), strict=True):
                parts[i] = parts[i]._replace(guess=guess, rows=parts[i].rows + len(guess))
        return Step(parts)

    def record(self, step: Step, logits: npt.NDArray[np.float32], seconds: float) -> list[tuple[Request, Token]]:
        """Score and write by the logits of a step, and remove the requests that end.

        Args:
            step: As :meth:`plan` returned it.
            logits: ``[R, V]``.
            seconds: Duration of the forward pass.

        Returns:
            The tokens that were written; several of one request where guesses were right.
        """
        prompts = [part.read for part in step.parts if not part.request.new_tokens]
        self.pace.learn(sum(prompts), len(step.parts) - len(prompts), seconds)
        if self._draft is not None and not prompts:
            self._draft.costs.learn_step(len(step.ids), seconds)
        now = time.perf_counter()
        written: list[tuple[Request, Token]] = []
        row = 0
        for request, _, read, guess, guesser, num_rows, scored in step.parts:
            rows = logits[row : row + num_rows]
            row += num_rows
            request.started = request.started or now - seconds
            request.cached += read
            if scored:
                start = min(request.cached + 1, request.prompt_tokens) - scored
                request.scores += _tokens(request, rows[:scored], request.ids[start : start + scored])
            if num_rows > scored:
                tokens, right = _write(request, guess, rows[scored:])
                guesser.learn(len(guess), right)
                if tokens:
                    request.written = (request.written or (now, now))[0], now
                written += [(request, token) for token in tokens]
            elif request.unread == 0:
                request.finished = "length"
            if request.finished:
                self.remove(request)
        return written

    def _lead(self, request: Request) -> None:
        """Let a request wait for the one that is about to compute most of the beginning of its prompt, if any is."""
        self._leaders.pop(request, None)
        most, leader = 0, None
        for other in self._slots:
            if other is request:
                break  # only for those before it, so that never two wait for each other
            if other.unread > 1 and (both := min(common_prefix(request.ids, other.ids), request.reusable)) > most:
                most, leader = both, other
        if leader is not None and most > request.cached:
            self._leaders[request] = leader, most

    def _follow(self, request: Request) -> None:
        """Let a request have what the one that it waited for has computed."""
        leader, most = self._leaders.pop(request)
        kept = min(leader.cached, most)
        if kept > request.cached:
            self._cache.follow(self._slots[request], self._cache.pages(self._slots[leader]), kept)
            request.reused_tokens = request.cached = kept
            request.draft.read = min(kept, leader.draft.read)

    def _forget(self, text: "_Text") -> None:
        self._left.remove(text)
        self._cache.drop(text.pages)


@dataclass(frozen=True, eq=False)
class _Text:
    """Tokens whose keys and values are in pages of the cache."""

    ids: list[int]
    pages: list[int]
    drafted: int  # of the tokens: those that the draft has read, too


def _drafted(request: Request) -> int:
    """Number of tokens of a request that the draft has read, too; behind them may be guesses that were wrong."""
    return min(request.draft.read, request.cached)


def _write(request: Request, guess: list[int], logits: npt.NDArray[np.float32]) -> tuple[list[Token], int]:
    """Choose tokens as long as they are what was guessed, each by its own draw: the same tokens as without guesses.

    Returns:
        The tokens, and the number of right guesses.
    """
    tokens: list[Token] = []
    right = 0
    for i, row in enumerate(logits):
        allowed = None if request.mask is None else request.mask(request.ids[request.prompt_tokens :])
        try:
            choice = request.sampler.choose(row, request.ids, allowed)
        except NothingAllowed as error:
            request.finished, request.error = "error", error
            break
        request.ids.append(choice)
        tokens += _tokens(request, row[None], [choice])
        request.tokens.append(tokens[-1])
        if choice in request.stop_ids:
            request.finished = "stop"
        elif request.new_tokens >= request.max_new_tokens:
            request.finished = "length"
        if i == len(guess) or choice != guess[i]:
            break
        right += 1
        if request.finished:
            break
        request.cached += 1
    return tokens, right


def _tokens(request: Request, logits: npt.NDArray[np.float32], ids: Sequence[int]) -> list[Token]:
    """Tokens with what the model says of them, by one row of logits each."""
    totals = log_totals(logits)
    scores = log_probabilities(logits, ids, totals).tolist()
    best = logits[np.arange(len(ids)), ids] == logits.max(axis=1)
    others = best_tokens(logits, request.num_alternatives, totals) if request.num_alternatives else [()] * len(ids)
    return [Token(*each) for each in zip(ids, scores, best.tolist(), others, strict=True)]
