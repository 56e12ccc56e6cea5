"""What a power cut would leave: records syncs and renames in their order, for tests of files that are written whole."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from btlm.files import PARTIAL


class PowerCut:
    """What of the renames so far a power cut could take away.

    A file is on the disk when it was synced after it was last written, and a name when its folder was synced after the
    rename. Renames to a temporary name, which only take something out of the way, do not count.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renamed: list[Path] = []
        self._synced: dict[tuple[int, int], tuple[int, int]] = {}
        self._empty: list[str] = []
        self._nameless: list[tuple[str, tuple[int, int]]] = []
        sync, rename, replace = os.fsync, os.rename, os.replace

        def recorded_sync(descriptor: int) -> None:
            sync(descriptor)
            status = os.fstat(descriptor)
            self._synced[_identity(status)] = _content(status)
            self._nameless = [(name, folder) for name, folder in self._nameless if folder != _identity(status)]

        def recorded_rename(source: Path, target: Path) -> None:
            self._note(Path(source), Path(target))
            rename(source, target)

        def recorded_replace(source: Path, target: Path) -> None:
            self._note(Path(source), Path(target))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", recorded_sync)
        monkeypatch.setattr(os, "rename", recorded_rename)
        monkeypatch.setattr(os, "replace", recorded_replace)

    @property
    def lost(self) -> list[str]:
        """Files that would be empty or cut off after a power cut, and names that would not be there, as problems."""
        return [*self._empty, *(f"{name} would not be there" for name, _ in self._nameless)]

    def _note(self, source: Path, target: Path) -> None:
        if target.name.endswith(PARTIAL):
            return
        self.renamed.append(target)
        for path in _below(source):
            status = path.stat()
            if self._synced.get(_identity(status)) != _content(status):
                self._empty.append(f"{target / path.relative_to(source)} would be empty")
        self._nameless.append((str(target), _identity(target.parent.stat())))


def _below(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        yield from sorted(path.rglob("*"))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _content(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
