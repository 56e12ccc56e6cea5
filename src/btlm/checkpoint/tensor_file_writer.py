"""A safetensors file written tensor by tensor: its layout is known first, so no tensor waits in memory for others."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .tensor_file import Header, make_header

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class SafetensorsWriter:
    """A file that is complete when the context ends without an error.

    Args:
        path: A new file.
        layout: Dtype and shape of every tensor; :func:`btlm.checkpoint.tensor_file.make_header` says in what order they
            are stored.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = dict(layout)
        self._missing = set(layout)
        header = _header(layout)
        self._starts = header.starts
        self._file = path.open("xb")
        self._file.write(header.content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if error is None:
                assert not self._missing, f"never written: {sorted(self._missing)}"
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the layout, in any order; it is as the layout says."""
        assert self._layout[name] == (tensor.dtype, tuple(tensor.shape)), f"{name}: {tensor.dtype} {tensor.shape}"
        self._missing.remove(name)
        self._file.seek(self._starts[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_size(layout: Layout) -> int:
    """Bytes that the file of a layout takes."""
    return _header(layout).size


def _header(layout: Layout) -> Header:
    return make_header({name: (_DTYPES[dtype], shape) for name, (dtype, shape) in layout.items()})
