"""Which implementation of the kernels to use."""

import importlib
import importlib.util
import logging
import os

from .interface import Kernels

_NATIVE = f"{__package__}._native"
_MOST_THREADS = 1024
_SLOW = (
    "btlm was installed without a C++ compiler and computes with torch, which takes some 20 times as long as native "
    "kernels; install a compiler, then btlm again."
)

_logger = logging.getLogger(__name__)


def load_kernels(name: str = "auto", threads: int | None = None) -> Kernels:
    """Kernels with threads of their own.

    Args:
        name: ``"native"``, ``"torch"``, an instruction set of the native kernels (``"amx"``, ``"avx512vnni"``,
            ``"avx2"``, ``"neon"``, ``"plain"``), or ``"auto"``: the environment variable ``BTLM_KERNELS`` if it is set,
            else the native kernels, else torch. ``"native"`` uses the fastest instruction set of the machine.
        threads: Number of threads, 1 to 1,024; by default one per processor that this process may use.

    Raises:
        ValueError: There is no such implementation here, or the threads cannot be had.
    """
    if name == "auto":
        name = os.environ.get("BTLM_KERNELS") or "auto"
    sets = instruction_sets()
    if name == "auto":
        name = "native" if sets else "torch"
        if not sets:
            _logger.warning(_SLOW)
    if name != "torch" and not sets:
        raise ValueError(
            f"The kernels {name!r} are not here: btlm was installed without a C++ compiler; install one and btlm "
            "again, or use torch."
        )
    if name not in ("torch", "native", *sets):
        raise ValueError(
            f"The kernels {name!r} are unknown here; choose one of auto, native, torch, {', '.join(sets)}."
        )
    threads = processors() if threads is None else threads
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"{threads} threads are not between 1 and {_MOST_THREADS:,}")
    if name == "torch":
        from .reference import TorchKernels

        return Kernels(TorchKernels(threads))
    return Kernels(importlib.import_module(_NATIVE).Kernels(sets[0] if name == "native" else name, threads))


def instruction_sets() -> list[str]:
    """The instruction sets on which the native kernels can run here, the fastest first; none if they were not built."""
    if importlib.util.find_spec(_NATIVE) is None:
        return []
    sets: list[str] = importlib.import_module(_NATIVE).instruction_sets()
    return sets


def processors() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
