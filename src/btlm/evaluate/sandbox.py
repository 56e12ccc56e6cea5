"""Runs programs that a model wrote: without a network, files read-only, within limits of time and memory."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from btlm.errors import NotSupported

_CHILD = Path(__file__).with_name("sandbox_child.py")
# Users (in which this one is root), mounts, processes, networks, shared memory; in a process of its own.
_NAMESPACES = ("-U", "-r", "-m", "-p", "-n", "-i", "-f")
_DISK_BYTES = 16_000_000  # of the temporary folder


def runs_to_its_end(program: str, *, seconds: float = 5.0, memory_bytes: int = 1_000_000_000) -> bool:
    """Whether a program in Python ends without an error, and within the limits.

    Args:
        program: Source text.
        seconds: Time on the clock, at most; the processor time of a process is limited to as much.
        memory_bytes: Address space of a process, at most.

    Raises:
        NotSupported: See :func:`need_sandbox`.
    """
    return _run(program, seconds, memory_bytes)[0]


def need_sandbox() -> None:
    """Check that this system can run a program apart from everything else.

    Raises:
        NotSupported: It cannot; the message has the reason.
    """
    if sys.platform != "linux":
        raise NotSupported(f"Programs of a model are run on Linux only, and this is {sys.platform}.")
    if shutil.which("unshare") is None:
        raise NotSupported("Programs of a model are run by unshare, which is not installed; install util-linux.")
    done, said = _run("", 10.0, 1_000_000_000)
    if not done:
        reason = said.strip().splitlines()[-1:] or ["no reason is known"]
        raise NotSupported(f"This system does not let a user make namespaces, in which programs are run ({reason[0]}).")


def _run(program: str, seconds: float, memory_bytes: int) -> tuple[bool, str]:
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="btlm-run-") as folder:
        task = {
            "program": program,
            "word": word,
            "folder": folder,
            "seconds": max(1, round(seconds)),
            "memory_bytes": memory_bytes,
            "disk_bytes": _DISK_BYTES,
        }
        command = ["unshare", *_NAMESPACES, sys.executable, "-I", "-S", str(_CHILD)]
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "OMP_NUM_THREADS": "1"}
        # A session of its own, so that what the user types does not reach it, and all of it can be ended together.
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        ) as process:
            try:
                said, errors = process.communicate(json.dumps(task), timeout=seconds)
            except subprocess.TimeoutExpired:
                return False, "it took too long"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return said == word, errors
