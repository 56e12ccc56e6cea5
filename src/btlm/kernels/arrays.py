"""Dtypes of the kernels' arrays, and checks of what callers pass."""

import math
import mmap
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]

UINT8, UINT16, INT64, FLOAT32 = (np.dtype(name) for name in ("uint8", "uint16", "int64", "float32"))

DTYPES = {"int4": 4, "int8": 8, "bfloat16": 16, "float32": 32}
"""Bits per number of the dtypes in which matrices and caches are stored."""

PACKED = ("int4", "int8")
"""Those stored as integers, with scales in bf16."""

ELEMENT = {"int4": UINT8, "int8": UINT8, "bfloat16": UINT16, "float32": FLOAT32}
"""The numpy dtype that holds each of them."""


PAGE_TOKENS = 64
"""Tokens per page of a cache."""

RUN_PAGES = 16
"""Consecutive pages in which the tokens of a head lie side by side."""


def num_pages(tokens: int) -> int:
    """Number of pages that hold a number of tokens."""
    return -(-tokens // PAGE_TOKENS)


def block_rows(pages: npt.NDArray[Any], number: int, heads: int) -> npt.NDArray[np.int64]:
    """Rows in which the arrays of a cache store the blocks of pages.

    Args:
        pages: Pages, ``[*, N]``.
        number: Number of pages of the cache.
        heads: Number of heads.

    Returns:
        ``[*, H, N]``.
    """
    inside = pages % RUN_PAGES
    first = (pages - inside).astype(np.int64)
    length = np.minimum(RUN_PAGES, number - first)
    rows: npt.NDArray[np.int64] = (first * heads + inside)[..., None, :] + np.arange(heads)[:, None] * length[
        ..., None, :
    ]
    return rows


def untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Zeros whose memory the system gives when they are first written to, in pages of a few KB.

    ``np.zeros`` asks for pages of 2 MB where arrays are large. To clear those takes so long that each time a cache grew
    by 1,024 tokens, a step of BTLM-3B's shape took 0.4 s longer.

    Raises:
        MemoryError: The process cannot have so much.
    """
    size = math.prod(shape) * dtype.itemsize
    if sys.platform == "win32":
        return np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"The system does not give {size:,} bytes of memory.") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a system without pages of 2 MB
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def require(holds: bool, problem: str) -> None:
    """Raise a ValueError that names the problem, unless the condition holds."""
    if not holds:
        raise ValueError(problem)


def require_dtype(name: str) -> None:
    """Raise a ValueError unless the name is one of :data:`DTYPES`."""
    require(name in DTYPES, f"the dtype {name!r} is unknown; choose one of {', '.join(DTYPES)}")


def require_array(name: str, array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless the array has the dtype and shape and is C-contiguous."""
    contiguous = array.flags.c_contiguous
    if array.shape != shape or array.dtype != dtype or not contiguous:
        layout = "" if contiguous else ", not contiguous"
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}{layout}, and must be {dtype} {list(shape)}")


def require_out(out: Floats, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a result of the shape can be written to the array in place."""
    require_array("out", out, FLOAT32, shape)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
