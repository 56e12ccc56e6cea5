"""A server for the benchmarks: `btlm serve` in a process of its own, and words to ask it with."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Each is one token with a blank before it.
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "was",
    "that",
    "his",
    "he",
    "it",
    "with",
    "is",
    "for",
    "as",
    "had",
    "you",
    "not",
    "be",
    "her",
    "on",
    "at",
    "by",
    "which",
    "have",
    "or",
    "from",
    "this",
]


@contextmanager
def serving(model: Path | str, *arguments: str, log: Path | None = None) -> Iterator[tuple[str, int]]:
    """In this context, a server runs.

    Args:
        model: Checkpoint.
        arguments: Flags of `btlm serve`.
        log: File that receives its log.

    Yields:
        Its address and its process id.
    """
    command = [sys.executable, "-m", "btlm", "serve", str(model), "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://\S+)", line):
                break
        else:
            raise RuntimeError("".join(lines))
        reader = threading.Thread(target=_drain, args=(process.stderr, log), daemon=True)
        reader.start()
        yield found.group(1), process.pid
    finally:
        process.terminate()
        process.wait()


def _drain(lines: IO[str], log: Path | None) -> None:
    if log is None:
        for _ in lines:
            pass
        return
    with log.open("w", buffering=1) as file:
        file.writelines(lines)
