"""A safetensors file written tensor by tensor: its layout is known first, so no tensor waits in memory for others."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

# Where tensors start, so that vector instructions read them in place from a mapped file.
ALIGNMENT = 64

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class SafetensorsWriter:
    """A file that is complete when the context ends without an error.

    Tensors whose size is a multiple of 64 bytes come first and start at multiples of 64 bytes of the file; the others
    follow without gaps, which the format does not allow.

    Args:
        path: A new file.
        layout: Dtype and shape of every tensor, in the order that they shall have within each of the two parts.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._layout = dict(layout)
        self._missing = set(layout)
        header, self._starts, self.size = _header(layout)
        self._file = path.open("xb")
        self._file.write(header)

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


def file_size(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes that the file of a layout takes."""
    return _header(layout)[2]


def _header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in layout.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(layout, key=lambda name: sizes[name] % ALIGNMENT != 0):  # stable
        dtype, shape = layout[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end
