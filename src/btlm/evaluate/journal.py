"""A journal of answers, so that an evaluation that was killed goes on without asking anything twice."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from btlm.files import naming_full_disk


class Journal:
    """Answers by the digest of what was asked, each appended to a file as soon as it is known.

    A line is written with one call of the system, so that a process that is killed leaves whole lines and at most one
    torn one, which is cut off when the journal is opened again.

    Args:
        path: The file; ``None`` keeps the answers in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._answers: dict[str, Any] = {}
        self._file: int | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming_full_disk(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        whole = 0
        with path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self._read(line)
        os.truncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __setitem__(self, key: str, answer: Any) -> None:
        """Keep an answer, which is plain data."""
        self._answers[key] = answer
        if self._file is not None and self.path is not None:
            with naming_full_disk(self.path):
                line = json.dumps([key, answer]).encode() + b"\n"
                while line:
                    line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, line: bytes) -> None:
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            return  # a damaged line is an answer that is not known
        if isinstance(key, str):
            self._answers[key] = answer
