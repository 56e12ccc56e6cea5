"""Whether the weights on the disk are still those that were opened.

They are mapped: a file that is replaced or deleted stays as it was for this process, but one that somebody writes into
changes under it.
"""

import os
from collections.abc import Iterable
from pathlib import Path


class WeightsChanged(ValueError):
    """Somebody has written into a file of the weights."""


class Weights:
    """The files of weights as they were.

    Args:
        files: The files.

    Attributes:
        marks: Size and time of each.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [file.open("rb", buffering=0) for file in files]
        self.marks = [_mark(file.fileno()) for file in self._files]

    def check(self) -> None:
        """Check that they have not changed.

        Raises:
            WeightsChanged: One of them has.
        """
        for file, was in zip(self._files, self.marks, strict=True):
            if _mark(file.fileno()) != was:
                raise WeightsChanged(f"{file.name} was written to while it was in use; start the server again.")

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _mark(descriptor: int) -> tuple[int, int]:
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns
