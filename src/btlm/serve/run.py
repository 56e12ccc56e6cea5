"""What a request asks for while it is being done: its texts, piece by piece."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from btlm.engine.options import GenerationOptions
from btlm.engine.request import Request, Token
from btlm.engine.sampling import Mask
from btlm.errors import LogitsNotFinite, NothingAllowed, RequestCancelled, TooLong

from .errors import ApiError, invalid, too_long
from .service import Service
from .text import Continuation, Placed, placed_prompt
from .worker import Text, Ticket, Update

_MOST_TOLD = 1_000_000  # log-probabilities of prompts in an answer, of some 30 bytes each


@dataclass
class Job:
    """What a request asks of the engine.

    Args:
        prompts: Token ids.
        options: How to continue them; ``None`` to write nothing.
        candidates: Number of continuations of each prompt.
        keep: Number of them that are told: those with the highest mean log-probability per token.
        stop: Texts that end a continuation.
        stop_ids: Tokens that end it.
        alternatives: Number of alternatives per token; ``None`` to tell no log-probabilities.
        echo: Texts of the prompts, to be told with the continuations, or ``None``.
        mask: Makes the masks of continuations.
        token_ids: Tell the ids of tokens.
    """

    prompts: list[list[int]]
    options: GenerationOptions | None
    candidates: int = 1
    keep: int = 1
    stop: list[str] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    alternatives: int | None = None
    echo: list[str] | None = None
    mask: Callable[[], Mask] | None = None
    token_ids: bool = False

    def prompt_of(self, index: int) -> int:
        """The prompt of a continuation."""
        return index // self.candidates

    def texts(self) -> list[Text]:
        """What the engine has to do: nothing for some prompts."""
        texts = []
        for ids in self.prompts:
            scores = self.echo is not None and self.alternatives is not None and len(ids) > 1
            for i in range(self.candidates):
                options = self.options
                if options is not None and options.seed is not None:
                    options = replace(options, seed=(options.seed + i) % 2**63)
                score_from = 1 if scores else None
                texts.append(Text(ids, options, self.stop_ids, score_from, self.alternatives or 0, self.mask))
        return texts


class Piece(NamedTuple):
    """Some text of a continuation.

    Args:
        number: Number of the continuation.
        text: The text, with the prompt if it is told.
        prompt: Tokens of the prompt, if it is told.
        tokens: Tokens that were written.
        finish_reason: ``"stop"`` or ``"length"`` at its end.
        first: Whether it is the first one.
    """

    number: int
    text: str
    prompt: list[Placed]
    tokens: list[Placed]
    finish_reason: str | None
    first: bool

    @property
    def ids(self) -> list[int]:
        """Ids of the tokens that were written."""
        return [placed.token.id for placed in self.tokens]


class Run:
    """A job that is being done.

    Args:
        service: Who does it.
        job: The job.

    Attributes:
        id, created: Of the answer.
        continuations: The texts.
        reused: Number of tokens of each prompt that other texts had computed.
        gone: Whether the client has hung up.

    Raises:
        ApiError: It cannot be done, or not now.
    """

    def __init__(self, service: Service, job: Job, kind: str) -> None:
        self.service, self.job = service, job
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        engine = service.worker.engine
        number = len(job.prompts) * job.candidates
        check_number(service, number)
        told = sum(map(len, job.prompts)) * job.candidates * (1 + (job.alternatives or 0))
        if job.echo is not None and job.alternatives is not None and told > _MOST_TOLD:
            raise invalid(
                "logprobs",
                f"The answer would tell {told:,} log-probabilities of prompts, and at most {_MOST_TOLD:,} are told; "
                "ask for fewer alternatives or choices, or make several requests.",
            )
        for ids in job.prompts:
            try:
                engine.check(ids, 0 if job.options is None else job.options.max_new_tokens, job.options)
            except TooLong:
                new = "" if job.options is None else f" and {job.options.max_new_tokens:,} new ones"
                raise too_long(
                    f"{len(ids):,} prompt tokens{new} exceed the context of {engine.context:,} tokens."
                ) from None
            except ValueError as error:
                raise invalid("prompt", str(error)) from error
        # A prompt of token ids may end within a character, which belongs to the continuation if there is one.
        splits = [service.vocabulary.split(ids) for ids in job.prompts]
        begun = [rest if job.options is not None else b"" for _, rest in splits]
        self._echo = None
        if job.echo is not None:
            self._echo = [splits[i][0] if rest else job.echo[i] for i, rest in enumerate(begun)]
        starts = [0] * len(job.prompts) if self._echo is None else [len(text) for text in self._echo]
        prompts = [job.prompt_of(index) for index in range(number)]
        self.continuations = [Continuation(service.vocabulary, job.stop, starts[i], begun[i]) for i in prompts]
        self.reused = [0] * len(job.prompts)
        self.gone = False
        self._requests: list[Request] = []  # in the order in which they began to write
        texts = job.texts()
        # Without anything to write or to score, a text ends at once.
        self._idle = [i for i, text in enumerate(texts) if text.options is None and text.score_from is None]
        self._busy = [i for i in range(number) if i not in self._idle]
        self.ticket: Ticket = service.worker.submit([texts[i] for i in self._busy])

    @asynccontextmanager
    async def watched(self, receive: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
        """In this context, the texts are cancelled when the client hangs up, and at its end.

        Raises:
            ApiError: The request takes too long.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone = True
            self.ticket.cancel()

        watching = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(self.service.settings.timeout) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise  # of something else
            raise ApiError(
                504,
                f"The request took more than {self.service.settings.timeout:g} seconds; ask for less.",
                code="timeout",
                reason="timeout",
            ) from None
        finally:
            watching.cancel()
            self.ticket.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The texts, piece by piece.

        Raises:
            ApiError: A text cannot be continued, or the client has hung up.
        """
        begun: set[int] = set()
        for index in self._idle:
            yield Piece(index, *self._prompt(index, ()), [], "length", True)
        async for number, update in self.ticket.updates():
            index = self._busy[number]
            text, prompt, first = "", list[Placed](), index not in begun
            if first and update.request is not None:
                begun.add(index)
                self._requests.append(update.request)
                if index % self.job.candidates == 0:
                    self.reused[self.job.prompt_of(index)] = update.request.reused_tokens
                text, prompt = self._prompt(index, update.request.scores)
            finish = self._add(index, update)
            if self.continuations[index].stopped:
                self.ticket.end(number)
            more, tokens = self.continuations[index].take(last=finish is not None)
            if first or more or tokens or finish:
                yield Piece(index, text + more, prompt, tokens, finish, first)

    async def whole(self) -> list[Piece]:
        """The texts as a whole, by their index; errors as of :meth:`pieces`."""
        found: dict[int, Piece] = {}
        async for piece in self.pieces():
            if (before := found.get(piece.number)) is not None:
                text, tokens = before.text + piece.text, before.tokens + piece.tokens
                piece = piece._replace(text=text, prompt=before.prompt, tokens=tokens, first=True)
            found[piece.number] = piece
        return [found[index] for index in range(len(self.continuations))]

    def facts(self) -> dict[str, Any]:
        """What the log tells of it."""
        usage = self.usage()
        first = next(iter(self._requests), None)
        facts = {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
        if first is None:
            return facts
        came = self.ticket.texts[0].submitted
        if first.started is not None:
            facts["queued_s"] = round(first.started - came, 4)
        if first.written is not None:
            facts["first_token_s"] = round(first.written[0] - came, 4)
        return facts

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "system_fingerprint": self.service.fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens so far."""
        prompt, new = sum(map(len, self.job.prompts)), sum(each.num_tokens for each in self.continuations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(self.reused)},
        }

    def best(self, indices: Sequence[int]) -> list[int]:
        """Those of the continuations of a prompt that are told."""

        def mean(index: int) -> float:
            one = self.continuations[index]
            return one.total / max(1, one.num_tokens)

        return list(indices) if self.job.keep == len(indices) else sorted(indices, key=mean)[::-1][: self.job.keep]

    def _prompt(self, index: int, scores: Sequence[Token]) -> tuple[str, list[Placed]]:
        """What is told of the prompt."""
        if self._echo is None:
            return "", []
        number = self.job.prompt_of(index)
        placed = []
        if self.job.alternatives is not None:
            ids, ends = self.job.prompts[number], self.job.options is None
            placed = placed_prompt(self.service.vocabulary, ids, scores, ends=ends)
        return self._echo[number], placed

    def _add(self, index: int, update: Update) -> str | None:
        """Add the tokens of an update, and tell why the text has ended."""
        if update.error is not None:
            raise _api_error(update.error)
        one = self.continuations[index]
        for token in update.tokens:
            one.add(token)
        if update.finished or one.stopped:
            one.end()
            return "stop" if one.stopped else update.finished
        return None


def check_number(service: Service, number: int) -> None:
    """Check that so many texts can be under way.

    Raises:
        ApiError: They cannot.
    """
    if number > service.worker.capacity:
        raise invalid(
            "prompt",
            f"The request asks for {number:,} texts, and at most {service.worker.capacity:,} can be under way; "
            "make several requests.",
        )


def _api_error(error: ValueError) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestCancelled):
        return ApiError(499, "The client has hung up.", code="cancelled", reason="cancelled")
    if isinstance(error, NothingAllowed):
        return ApiError(
            400, "No token fits what the text has to be, or that is too complex; change the form or the other rules."
        )
    if isinstance(error, LogitsNotFinite):
        return ApiError(500, str(error), code="not_finite", reason="not finite")
    return invalid(None, str(error))
