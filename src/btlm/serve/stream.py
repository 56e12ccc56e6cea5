"""Server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .run import Run

_log = logging.getLogger("btlm.serve")
_QUIET_S = 15.0  # seconds without an event after which a comment shows that the server lives
_SLOWEST_S = 60.0  # seconds in which a client has to take what was sent


class EventStream(Response):
    """Sends events as they come; its texts are cancelled when the client hangs up or takes nothing for a minute.

    Args:
        run: The texts.
        events: Events, each a JSON object. An error becomes the last one.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Run, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run, self._events = run, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def write(text: str, *, more: bool = True) -> None:
            async with asyncio.timeout(_SLOWEST_S):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with self._run.watched(receive):
                    async for event in _with_pauses(self._events):
                        await write(": still here\n\n" if event is None else as_event(event))
            except ApiError as error:
                if self._run.gone:
                    return
                self._run.service.metrics.refusals.labels(error.reason).inc()
                await write(as_event(error.body))
            except OSError:
                raise
            except Exception as error:
                _log.error("A stream has failed.", exc_info=error)
                await write(as_event(ApiError(500, "The server has failed; its log says why.").body))
            await write("data: [DONE]\n\n", more=False)
        except OSError:  # the client takes nothing, or is gone
            self._run.gone = True
        finally:
            self._run.ticket.cancel()


def as_event(value: dict[str, Any]) -> str:
    """A server-sent event; everything beyond ASCII is escaped, since some clients end lines at U+2028."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _with_pauses(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any] | None]:
    """The events, and ``None`` whenever none has come for some seconds."""
    coming: asyncio.Task[dict[str, Any]] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=_QUIET_S)
            if not done:
                yield None
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event
    finally:
        if coming is not None:
            coming.cancel()
