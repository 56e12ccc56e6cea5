"""A stand-in for the server: it speaks the interface that the playground uses, and says what a test tells it to."""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from btlm.serve.app import page_policy

PAGE = Path(__file__).parents[3] / "src/btlm/serve/playground.html"

# Tokens with their probabilities and those of the alternatives. The third character is written by three tokens.
TEXT: list[tuple[str, float, dict[str, float]]] = [
    (" the", 0.62, {" a": 0.2, " his": 0.1, "\n": 0.004}),
    (" theory", 0.31, {" great": 0.08, " first": 0.35}),
    (" of", 0.97, {" and": 0.02}),
    (" relativity", 0.004, {" the": 0.4, " evolution": 0.2}),
    (",", 0.55, {".": 0.3}),
    (" which", 0.15, {" and": 0.5, "bytes:\\xe2\\x80": 0.01}),
    ("\n", 0.03, {" he": 0.4}),
    ("He", 0.4, {"The": 0.3}),
    (" said", 0.7, {" was": 0.1}),
    (" bytes", 0.02, {" so": 0.3}),
    ("bytes:\\xe2\\x82", 0.2, {" ": 0.1}),
    ("bytes:\\xac", 0.99, {"bytes:\\xad": 0.005}),
    ("  ", 0.06, {" ": 0.1}),
    ("<img src=x onerror=alert(1)>", 0.01, {"<b>": 0.5}),
    (".", 0.9, {"!": 0.05}),
]


@dataclass
class StandIn:
    """What the server says, and what it was asked."""

    text: list[tuple[str, float, dict[str, float]]] = field(default_factory=lambda: list(TEXT))
    pause: float = 0.0  # seconds between tokens
    key: str | None = None
    ready: bool = True
    refusal: str | None = None  # message of a 400
    fails_after: int | None = None  # tokens before an error in the stream
    breaks_after: int | None = None  # tokens before the connection ends
    kept_text: int | None = None  # characters of the text that are sent; the rest is cut off, as at a stop text
    warning: str = "btlm-tiny writes grammatical sentences without sense. Do not use its text for anything."
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    names: dict[str, int] = field(default_factory=dict)

    def id_of(self, name: str) -> int:
        return self.names.setdefault(name, 1000 + len(self.names))

    def tokenize(self, text: str) -> list[int]:
        return [self.id_of(part) for part in re.findall(r" ?\w+|[^\w]", text)]

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of a completion."""
        prompt = body["prompt"]
        prompt_ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        common = {"id": "cmpl-1", "object": "text_completion", "model": body["model"]}
        written, pending = 0, b""
        tokens = self.text[: body["max_tokens"]]
        for i, (name, p, others) in enumerate(tokens):
            if i == self.fails_after:
                yield {"error": {"message": "The engine ran out of memory.", "type": "server_error"}}
                return
            pending += bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                text = ""
            if self.kept_text is not None:
                text = text[: max(0, self.kept_text - written)]
            logprobs = {
                "tokens": [name],
                "token_logprobs": [math.log(p)],
                "top_logprobs": [{other: math.log(q) for other, q in {name: p, **others}.items()}],
                "text_offset": [written],
            }
            choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": logprobs, "token_ids": [self.id_of(name)]}
            choice["finish_reason"] = None
            if i == len(tokens) - 1:
                choice["finish_reason"] = "length" if len(tokens) == body["max_tokens"] else "stop"
            if i == 0:
                choice["prompt_token_ids"] = prompt_ids
            written += len(text)
            yield {**common, "choices": [choice], "usage": None}
        usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(tokens)}
        yield {**common, "choices": [], "usage": {**usage, "total_tokens": sum(usage.values())}}


def serve(state: StandIn) -> ThreadingHTTPServer:
    """Start a server at a free port; ``shutdown()`` and ``server_close()`` end it."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def answer(
            self, content: bytes | dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refuse(self, status: int, message: str) -> None:
            self.answer({"error": {"message": message, "type": "error", "param": None, "code": None}}, status)

        def is_let_in(self) -> bool:
            if state.key is None or self.headers["Authorization"] == f"Bearer {state.key}":
                return True
            self.refuse(401, "The key is missing or wrong.")
            return False

        def do_GET(self) -> None:
            if self.path == "/":
                page = PAGE.read_text()
                headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": page_policy(page)}
                self.answer(page.encode(), headers=headers)
            elif self.path == "/ready":
                self.answer({}, 200 if state.ready else 503)
            elif self.path == "/v1/models" and self.is_let_in():
                model = {"id": "btlm-tiny", "object": "model", "created": 0, "owned_by": "btlm"}
                data = [{**model, "max_model_len": 8192, "warning": state.warning}]
                self.answer({"object": "list", "data": data})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.is_let_in():
                return
            if self.path == "/tokenize":
                ids = state.tokenize(body["prompt"])
                self.answer({"tokens": ids, "count": len(ids), "max_model_len": 8192})
                return
            state.requests.append(body)
            if state.refusal:
                self.refuse(400, state.refusal)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.stream(body)
            except (BrokenPipeError, ConnectionResetError):
                state.aborted.set()

        def stream(self, body: dict[str, Any]) -> None:
            self.wfile.write(b": waiting\n\n")
            for i, event in enumerate(state.events(body)):
                if i == state.breaks_after:
                    return
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                if state.pause:
                    self.wfile.flush()
                    time.sleep(state.pause)
            self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
