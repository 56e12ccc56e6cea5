"""What every request passes before it is looked at: who asks, from where, how much, and whether there is time."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btlm.errors import OptionError

from .errors import ApiError, Stopping
from .options import Serve
from .service import Service

OPEN_PATHS = {"/", "/health", "/ready"}  # without a key; they tell nothing of texts
_BODY_S = 30.0  # seconds in which a body has to arrive
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}

log = logging.getLogger("btlm.serve.access")


def read_keys(settings: Serve) -> tuple[str, ...]:
    """The keys of the options and of their file.

    Raises:
        OptionError: A key cannot be used.
    """
    keys = list(settings.api_key)
    if settings.api_key_file is not None:
        try:
            lines = Path(settings.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError("{api_key_file} {} cannot be read: {}.", settings.api_key_file, error) from error
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise OptionError("{api_key_file} {} has no key; write one per line.", settings.api_key_file)
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise OptionError("A key of {api_key} has characters that no header can carry; use letters and digits.")
    return tuple(keys)


class Guard:
    """Lets requests pass, refuses the others, and writes a line of the log for each.

    Args:
        app: What is guarded.
        service: The server.
        keys: Keys of which a request has to bring one; anybody may ask if there are none.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str]) -> None:
        self.app, self.service = app, service
        self._keys = [key.encode() for key in keys]
        self._under_way: Counter[str] = Counter()  # requests by the name of their key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        start, status = time.perf_counter(), 0
        headers, request_id = Headers(scope=scope), secrets.token_hex(8)
        line: dict[str, Any] = scope.setdefault("state", {})  # the endpoints add to it
        line["log"] = entry = {"id": request_id, "method": scope["method"], "path": scope["path"][:200]}

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        key, counted = "", False
        try:
            try:
                key = self._check(scope["path"], headers)
                self._under_way[key] += 1
                counted = True
                if scope["path"] not in OPEN_PATHS:
                    receive = await self._whole_body(scope["method"], headers, receive)
            except ApiError as error:
                self.service.metrics.refusals.labels(error.reason).inc()
                close = {"Connection": "close"}  # what is left of the body is not read
                await JSONResponse(error.body, error.status, {**error.headers, **close})(scope, receive, tell)
                return
            await self.app(scope, receive, tell)
        finally:
            if counted:
                self._under_way[key] -= 1
                if not self._under_way[key]:
                    del self._under_way[key]
            self.service.metrics.answers.labels(_path(scope), status).inc()
            client = scope.get("client") or ("", 0)
            entry |= {"client": client[0], "key": key, "status": status}
            if (run := line.get("run")) is not None:
                entry |= run.facts()
            entry["seconds"] = round(time.perf_counter() - start, 4)
            log.info(json.dumps({"time": round(time.time(), 3), **entry}))

    def _check(self, path: str, headers: Headers) -> str:
        """The name of the key of a request.

        Raises:
            ApiError: The request is refused.
        """
        settings = self.service.settings
        if settings.is_local and not self._keys:
            # A page of the web that the user reads could ask a name of its own that leads to this machine.
            host = re.sub(r":\d*$", "", headers.get("host", "")).lower().rstrip(".")
            if host not in {*_LOCAL_NAMES, settings.host}:
                raise ApiError(403, f"The host {host[:100]!r} is not this server.", reason="host")
        if path in OPEN_PATHS:
            return ""
        key = self._key(headers.get("authorization", ""))
        if self.service.draining:
            raise Stopping()
        if self._keys and self._under_way[key] >= settings.max_per_key:
            raise ApiError(
                429,
                f"The key has {self._under_way[key]} requests under way, which is its limit; wait for one to end.",
                code="rate_limit_exceeded",
                reason="key",
                retry_after=1,
            )
        return key

    def _key(self, authorization: str) -> str:
        if not self._keys:
            return ""
        scheme, _, given = authorization.partition(" ")
        # Every key is compared, so that the time tells nothing of where they differ.
        right = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "The key is missing or wrong; send it in the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                reason="unauthorized",
            )
        return hashlib.sha256(self._keys[right.index(True)]).hexdigest()[:8]

    async def _whole_body(self, method: str, headers: Headers, receive: Receive) -> Receive:
        """Read the body, and give what hands it on.

        Raises:
            ApiError: It is no JSON, too large, or does not arrive.
        """
        most = self.service.settings.max_body
        too_large = ApiError(
            413, f"The body of the request is larger than {most:,} bytes; make several requests.", reason="body"
        )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            # A page of the web can send other types to servers that it may not read.
            raise ApiError(415, f"The body is {kind[:100] or 'of no type'}; send application/json.", reason="type")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(_BODY_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The client has hung up.", reason="cancelled")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "The body of the request did not arrive in time.", reason="slow body") from None
        given = False

        async def hand_on() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return hand_on


def _path(scope: Scope) -> str:
    """The path for the metrics, which must not grow with what clients invent."""
    route = scope.get("route")
    return getattr(route, "path", "other")
