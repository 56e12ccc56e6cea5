"""Memory of this machine and of this process."""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btlm.kernels import load_kernels

_READ_BYTES = 512 * 2**20  # far more than a processor's caches hold
_READS = 5
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still allocate: the smallest of the machine's free memory and the process's limits.

    The limits are those of its control group (Linux) and of its address space (``ulimit -v``). ``None`` if neither
    they nor the free memory are known.
    """
    known = [value for value in (_free(), _control_group(), _address_space()) if value is not None]
    return min(known, default=None)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes, mapped files included."""
    try:  # on Linux ru_maxrss also counts what the parent process had
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_rate(threads: int | None) -> dict[str, Any]:
    """Measure how fast this machine reads memory: the median over several passes over an array.

    Args:
        threads: Number of threads; see :func:`btlm.kernels.load_kernels`.

    Returns:
        ``bytes_per_s``, and the ``kernels`` and ``threads`` that read.
    """
    kernels = load_kernels("auto", threads)
    values = np.ones(_READ_BYTES, np.uint8)
    seconds = []
    for _ in range(_READS):
        start = time.perf_counter()
        kernels.sum_bytes(values)
        seconds.append(time.perf_counter() - start)
    return {
        "bytes_per_s": _READ_BYTES / statistics.median(seconds),
        "kernels": kernels.name,
        "threads": kernels.threads,
    }


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _control_group() -> int | None:
    """Bytes that the control groups of this process leave: the least of its own and of those above it."""
    left = []
    for folder, (limit, used, idle) in _control_groups():
        try:
            most = (folder / limit).read_text().strip()
            taken = int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if most != "max":
                left.append(int(most) - taken + int(statistics.get(idle, 0)))
        except (OSError, ValueError):
            continue
    return min(left, default=None)


def _control_groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the control groups of this process, of version 2 or 1, and the names of what they tell."""
    second, first = _CGROUPS, _CGROUPS / "memory"
    files = {
        second: ("memory.max", "memory.current", "inactive_file"),
        first: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    found = dict.fromkeys((second, first))  # in a container they are those of the container
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = second if not controllers else first if "memory" in controllers.split(",") else None
        if root is not None:
            inside = Path(path.strip("/"))
            found |= dict.fromkeys(root / part for part in (inside, *inside.parents))
    for folder in found:
        yield folder, files[first if folder.is_relative_to(first) else second]


def _address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return limit - pages * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
