"""The thread that runs the engine. Texts come and go between two of its steps.

The event loop and the thread share nothing but a queue in each direction: commands go to the thread, and what became of
texts comes back, once per step.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from btlm.engine.engine import Engine
from btlm.engine.options import GenerationOptions
from btlm.engine.request import Request, Token
from btlm.engine.sampling import Mask
from btlm.errors import EngineFull, RequestCancelled

from .errors import EngineDead, Stopping, TooManyTexts

_log = logging.getLogger("btlm.serve")


class Update(NamedTuple):
    """What became of a text in a step.

    Args:
        tokens: Tokens that were written.
        request: The engine's request, which the thread goes on changing until it is finished; ``None`` if the text has
            ended before it began.
        finished: ``None``, ``"stop"``, ``"length"``, or ``"error"``.
        error: Why it ended, with ``"error"``.
    """

    tokens: tuple[Token, ...]
    request: Request | None
    finished: str | None
    error: ValueError | None


@dataclass(eq=False)
class Text:
    """A prompt that is to be continued, scored, or both; arguments as of :meth:`btlm.engine.Engine.add`.

    Args:
        mask: Makes the mask of the text, since a mask may remember its text.

    Attributes:
        waits: Whether the engine has not begun it.
        submitted: Seconds of :func:`time.perf_counter` at which it came.
        cancelled_for: Why it was stopped, if it was.
    """

    ids: list[int]
    options: GenerationOptions | None = None  # None to score the prompt only
    stop_ids: frozenset[int] = frozenset()
    score_from: int | None = None
    num_alternatives: int = 0
    mask: Callable[[], Mask] | None = None
    waits: bool = field(init=False, default=True)
    submitted: float = field(init=False, default_factory=time.perf_counter)
    cancelled_for: str = field(init=False, default="cancelled")

    def begin(self, engine: Engine) -> Request:
        """Give it to the engine."""
        if self.options is None:
            return engine.add_score(self.ids, self.score_from or 1, num_alternatives=self.num_alternatives)
        return engine.add(
            self.ids,
            self.options,
            stop_ids=self.stop_ids,
            score_from=self.score_from,
            num_alternatives=self.num_alternatives,
            mask=None if self.mask is None else self.mask(),
        )


class Ticket:
    """The texts of one HTTP request.

    Args:
        worker: Who writes them.
        texts: The texts.
    """

    def __init__(self, worker: "Worker", texts: Sequence[Text]) -> None:
        self._worker = worker
        self.texts = texts
        self._queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._open = set(range(len(texts)))

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """What becomes of the texts, by their index, until all have ended."""
        while self._open:
            index, update = await self._queue.get()
            if index in self._open:
                if update.finished:
                    self._open.discard(index)
                yield index, update

    def end(self, index: int) -> None:
        """Stop a text that a stop text ends; no update follows."""
        if index in self._open:
            self._open.discard(index)
            self.texts[index].cancelled_for = "stop text"
            self._worker.cancel([self.texts[index]])

    def cancel(self) -> None:
        """Stop all texts; each that has not ended ends with ``RequestCancelled``."""
        self._worker.cancel([self.texts[index] for index in self._open])

    def put(self, index: int, update: Update) -> None:
        """Called by the worker."""
        self._queue.put_nowait((index, update))


class Worker:
    """Runs an engine in a thread of its own.

    All methods are called from the event loop.

    Args:
        engine: The engine, which nobody else uses.
        max_waiting: Number of texts that may wait.
        unchanged: Called before every step; raises if the weights are no longer those that were opened.
        on_step: Called in the thread after each step with its number of written tokens and its seconds.
        on_end: Called in the thread with each text that has ended, and the engine's request for it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        unchanged: Callable[[], None] = lambda: None,
        on_step: Callable[[int, float], None] = lambda tokens, seconds: None,
        on_end: Callable[[Text, Request], None] = lambda text, request: None,
    ) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.error: BaseException | None = None  # what ended the thread
        self._unchanged, self._on_step, self._on_end = unchanged, on_step, on_end
        self._commands: queue.SimpleQueue[tuple[str, Sequence[Text]]] = queue.SimpleQueue()
        self._owners: dict[Text, tuple[Ticket, int]] = {}  # of all texts that have not ended
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="btlm-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it can write."""
        return self._thread.is_alive() and self.error is None

    @property
    def num_waiting(self) -> int:
        """Number of texts that the engine has not begun."""
        return sum(text.waits for text in self._owners)

    @property
    def num_running(self) -> int:
        """Number of texts that the engine has begun."""
        return len(self._owners) - self.num_waiting

    @property
    def capacity(self) -> int:
        """Number of texts that can be under way, waiting ones included."""
        return self.engine.cache.num_slots + self.max_waiting

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread; updates are delivered in the given loop."""
        self._loop = loop
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> Ticket:
        """Let texts be written, as soon as there is room.

        Raises:
            EngineDead: The thread has ended.
            TooManyTexts: Too many are waiting; none of these was taken.
        """
        if not self.alive:
            raise EngineDead(self.error)
        if len(self._owners) + len(texts) > self.capacity:
            raise TooManyTexts(len(texts), self.num_running, self.num_waiting, self.max_waiting)
        ticket = Ticket(self, texts)
        self._owners |= {text: (ticket, index) for index, text in enumerate(texts)}
        self._commands.put(("add", texts))
        return ticket

    def cancel(self, texts: Sequence[Text]) -> None:
        """Stop texts before the next step."""
        if texts:
            self._commands.put(("cancel", texts))

    async def stop(self) -> None:
        """End the thread after its step; texts under way end with an error."""
        self._commands.put(("stop", ()))
        while self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._fail(Stopping())

    # In the event loop, called by the thread

    def _deliver(self, updates: Sequence[tuple[Text, Update]]) -> None:
        for text, update in updates:
            owner = self._owners.get(text)
            if owner is not None:
                ticket, index = owner
                ticket.put(index, update)
                if update.finished:
                    del self._owners[text]

    def _fail(self, error: EngineDead | Stopping) -> None:
        self._deliver([(text, Update((), None, "error", error)) for text in self._owners])

    # In the thread

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # whatever it is, nobody must go on waiting
            self.error = error
            _log.critical("The engine has stopped.", exc_info=error)
            self._tell(self._fail, EngineDead(error))

    def _serve(self) -> None:
        waiting: deque[Text] = deque()
        running: dict[Text, Request] = {}
        told: dict[Text, int] = {}  # tokens that were delivered
        while True:
            updates: list[tuple[Text, Update]] = []
            idle = not waiting and not running
            for command, texts in self._take(block=idle):
                if command == "stop":
                    return
                if command == "add":
                    waiting += texts
                for text in texts if command == "cancel" else ():
                    if text in running:
                        self.engine.remove(running[text])
                    elif text in waiting:
                        waiting.remove(text)
                        updates.append((text, _cancelled()))
            while waiting and self._begin(waiting, running, updates):
                pass
            self._unchanged()
            if any(request.finished is None for request in running.values()):
                start = time.perf_counter()
                written = self.engine.step()
                self._on_step(len(written), time.perf_counter() - start)
            for text, request in list(running.items()):
                first = told.get(text, 0)
                tokens = tuple(request.tokens[first:])
                told[text] = first + len(tokens)
                if tokens or request.finished:
                    updates.append((text, Update(tokens, request, request.finished, request.error)))
                if request.finished:
                    self._on_end(text, request)
                    del running[text], told[text]
            self._unchanged()  # what was computed with other weights must not be sent
            if updates:
                self._tell(self._deliver, updates)

    def _take(self, *, block: bool) -> list[tuple[str, Sequence[Text]]]:
        commands = [self._commands.get()] if block else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _begin(self, waiting: deque[Text], running: dict[Text, Request], updates: list[tuple[Text, Update]]) -> bool:
        """Begin the first waiting text if there is room; whether there was."""
        try:
            running[waiting[0]] = waiting[0].begin(self.engine)
        except EngineFull as error:
            if running:
                return False
            updates.append((waiting[0], Update((), None, "error", error)))
        except ValueError as error:
            updates.append((waiting[0], Update((), None, "error", error)))
        waiting.popleft().waits = False
        return True


def _cancelled() -> Update:
    return Update((), None, "error", RequestCancelled("The request was cancelled while it was waiting."))
