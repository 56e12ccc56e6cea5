"""Files and folders that are written whole or not at all, locks, and digests."""

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from btlm.console import gigabytes
from btlm.errors import DoesNotFit

# Suffix of the temporary name of an unfinished file or folder.
PARTIAL = ".partial"
# Name, or suffix of the name, of the file by which :func:`locked` locks.
LOCK = ".lock"


# Files


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, which replaces ``path`` when the block ends without an error.

    After a power cut, ``path`` holds all of the new content or all of the old.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with naming_full_disk(path):
            yield partial
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write JSON, whole or not at all; a missing folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=indent) + "\n")


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of :func:`whole_file` that killed processes left anywhere in a folder."""
    for path in folder.rglob(f".*{PARTIAL}"):
        with suppress(FileNotFoundError):
            path.unlink()


# Folders


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder with a temporary name, which becomes ``path`` when the block ends without an error.

    After an error nothing is left, and after a power cut all of the folder or nothing. Temporary folders beside
    ``path`` that killed processes of this machine left are removed.

    Raises:
        OSError: At the end, if ``path`` exists by then and is not empty.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        if not _lives(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        with naming_full_disk(path):
            yield partial
            finish_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(partial: Path, path: Path) -> None:
    """Give a complete folder its final name, replacing what has that name now; the change survives a power cut."""
    remove_folder(path)
    finish_folder(partial, path)


def remove_folder(path: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, the rest has a temporary name, not the folder's own."""
    if path.exists():
        leftover = path.with_name(f"{path.name}.old{PARTIAL}")
        shutil.rmtree(leftover, ignore_errors=True)
        path.rename(leftover)
        shutil.rmtree(leftover)


def finish_folder(partial: Path, path: Path) -> None:
    """Give a complete folder its final name, which nothing has; the change survives a power cut."""
    umask = os.umask(0o022)
    os.umask(umask)
    for written in (*partial.rglob("*"), partial):
        if written.is_file():  # safetensors, for one, writes files that only their owner may read
            written.chmod(written.stat().st_mode | 0o666 & ~umask)
        sync(written)
    partial.rename(path)
    sync(path.parent)


def _lives(process: str) -> bool:
    if os.name != "posix":
        return True  # on other systems, the call below would end the process
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, PermissionError):
        return True  # not one of our names, or a process of another user
    except OSError:
        return False
    return True


# Disk


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to the disk, so that they survive a power cut."""
    if os.name != "posix" and path.is_dir():
        return  # other systems cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(path: Path, needed: int, remedy: str) -> None:
    """Check that a new file or folder fits the disk of the nearest existing folder above it.

    Args:
        path: The new file or folder.
        needed: Its size in bytes.
        remedy: What the user can do instead of making room.

    Raises:
        DoesNotFit: The disk has less room.
    """
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DoesNotFit(
            f"{path} takes {gigabytes(needed)}, and {folder} has {gigabytes(free)} free; make room there, or {remedy}."
        )


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """If a write to ``path`` ends since the disk is full, say which file it was and what to do; libraries say neither.

    Raises:
        DoesNotFit: The end of the disk, of a quota, or of the size that a file may have, was reached.
    """
    try:
        yield
    except OSError as error:
        full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        if error.errno is None or error.errno not in full:
            raise
        raise DoesNotFit(
            f"{path} cannot be written: {os.strerror(error.errno)}. Make room there, and run the same command again."
        ) from error


# Locks and digests


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other commands from writing the folder or file that this one writes.

    The lock is on the hidden file ``.lock`` in a folder that exists, else on one beside ``path``. It ends with this
    process, however that ends, and NFS tells other machines of it. On a file system without locks, the process that the
    file names decides: one of this machine that has ended is no obstacle. There, two commands that start at the same
    instant are not noticed.

    Raises:
        ValueError: Somebody holds the lock; the message names the process.
    """
    lock = (path / LOCK if path.is_dir() else path.with_name(f".{path.name}{LOCK}")).absolute()
    lock.parent.mkdir(parents=True, exist_ok=True)
    while (descriptor := _open_locked(lock, path)) is None:
        pass
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # first, since closing the file ends the lock
        os.close(descriptor)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only the lock of a killed process."""
    return all(path.name == LOCK for path in folder.iterdir())


def _open_locked(lock: Path, path: Path) -> int | None:
    """Open and lock a file; ``None`` if its last holder has removed it meanwhile."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        holder = os.pread(descriptor, 1000, 0).decode()
        problem = (
            f"{path} is being written by {holder or 'another process'}; wait until it ends, or give another output."
        )
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(problem) from error
        except (OSError, ModuleNotFoundError) as error:  # a file system without locks, or Windows
            named = re.fullmatch(r"process (\d+) on (.*)", holder)
            if named and (named[2] != socket.gethostname() or _lives(named[1])):
                raise ValueError(f"{problem} If it has ended, remove {lock}.") from error
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
