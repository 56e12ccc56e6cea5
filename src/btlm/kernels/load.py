"""Which implementation of the kernels to use."""

import importlib
import importlib.util
import os
from typing import cast

from .protocol import Kernels

_NATIVE = f"{__package__}._native"


def load_kernels(name: str = "auto", threads: int | None = None) -> Kernels:
    """The kernels; there is one set for the process, with its threads.

    Args:
        name: ``"native"``, ``"torch"``, an instruction path of the native ones (``"avx512vnni"``, ``"avx2"``,
            ``"neon"``, ``"plain"``), or ``"auto"``: what the environment variable ``BTLM_KERNELS`` says, else the
            native ones on the fastest path of the machine, else torch.
        threads: As many as the process has processors where not given.

    Raises:
        ValueError: There is no such implementation here.
    """
    if name == "auto":
        name = os.environ.get("BTLM_KERNELS") or "auto"
    if name == "auto":
        name = "native" if _has_native() else "torch"
    if name == "torch":
        from . import twin

        kernels = cast(Kernels, twin)
    elif not _has_native():
        raise ValueError(
            f"The kernels {name!r} are not here: btlm was installed without a C++ compiler; install one and btlm "
            "again, or use torch."
        )
    else:
        kernels = cast(Kernels, importlib.import_module(_NATIVE))
        paths = kernels.paths()
        if name not in ("native", *paths):
            raise ValueError(
                f"The kernels {name!r} are unknown here; choose one of auto, native, torch, {', '.join(paths)}."
            )
        kernels.use_path(paths[0] if name == "native" else name)
    kernels.set_threads(processors() if threads is None else threads)
    return kernels


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_native() -> bool:
    return importlib.util.find_spec(_NATIVE) is not None
