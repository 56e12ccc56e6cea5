"""A stand-in for the Hugging Face Hub: it speaks as much of its protocol as a download needs, on this machine."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories, and what was asked for.

    Args:
        repositories: Folders of repositories, by their ids.

    Attributes:
        asked: Method, path, and range of every request.
        cut: Names of files whose first download breaks off in the middle.
    """

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: set[str] = set()
        self.url = ""

    def ranges_of(self, name: str) -> list[str | None]:
        """The ranges in which a file was fetched."""
        return [part for method, path, part in self.asked if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """In this context, a stand-in runs at :attr:`Hub.url`, which belongs into ``HF_ENDPOINT``."""
    state = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer()

        def do_HEAD(self):
            self.answer()

        def answer(self):
            path = self.path.partition("?")[0]
            state.asked.append((self.command, path, self.headers.get("Range")))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/[^/]+)?", path):
                self.tell(found[1])
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self.give(state.repositories.get(found[1]), found[2])
            else:
                self.refuse("EntryNotFound")

        def tell(self, repository):
            if (folder := state.repositories.get(repository)) is None:
                return self.refuse("RepoNotFound")
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if "/tree/" in self.path:
                digests = {name: hashlib.sha1(name.encode()).hexdigest() for name in names}
                files = [{"type": "file", "path": name, "oid": digests[name], "size": 1} for name in names]
                return self.send(json.dumps(files).encode())
            siblings = [{"rfilename": name} for name in names]
            content = {"id": repository, "sha": COMMIT, "private": False, "siblings": siblings}
            return self.send(json.dumps(content).encode())

        def give(self, folder, name):
            if folder is None or not (folder / name).is_file():
                return self.refuse("RepoNotFound" if folder is None else "EntryNotFound")
            content = (folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            start, size = 0, len(content)
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start = int(found[1])
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self.send(content[start:], 206 if start else 200, headers, name)

        def refuse(self, code):
            self.send(b"", 404, {"X-Error-Code": code, "X-Error-Message": f"{code}: no such thing"})

        def send(self, content, status=200, headers=None, name=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in state.cut:
                state.cut.discard(name)
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
