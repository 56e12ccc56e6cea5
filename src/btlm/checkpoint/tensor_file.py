"""Tensors of a checkpoint where they lie in its files: nothing is read before it is used, and processes share the
pages."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .pickle_file import read_pickle
from .weight_files import ITEM_BYTES, Stored

# The layout of safetensors: a length of 8 bytes, a JSON header, and the data (github.com/huggingface/safetensors).
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
_DTYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
# Where tensors start in files that btlm writes, so that vector instructions read them in place from a mapped file.
ALIGNMENT = 64


class MappedTensor(NamedTuple):
    """A tensor in a mapped file; bf16 is held in uint16, and what is neither floats nor bytes, as plain bytes."""

    dtype: str
    values: npt.NDArray[Any]


def resident_bytes(tensor: MappedTensor) -> int:
    """Memory that the engine takes for a tensor: its pages, and those of fp16 beside a copy in fp32."""
    return tensor.values.nbytes * (3 if tensor.dtype == "F16" else 1)


def map_tensors(files: Sequence[Path]) -> dict[str, MappedTensor]:
    """The tensors of files, by name.

    Raises:
        NotSupported, ValueError: See :func:`read_header`.
    """
    return {name: tensor for file in files for name, tensor in _map_file(file).items()}


def read_header(path: Path) -> dict[str, Stored]:
    """What a file in safetensors, or one by `torch.save`, holds, by name.

    Raises:
        NotSupported: See :func:`.pickle_file.read_pickle`.
        ValueError: It is damaged or cut short.
    """
    if path.suffix != ".safetensors":
        return read_pickle(path)
    size = path.stat().st_size
    damaged = f"{path} is damaged or cut short ({size:,} bytes); get it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - _LENGTH_BYTES):
            raise ValueError(damaged)
        try:
            entries = json.loads(file.read(length)).items()
        except (AttributeError, ValueError, RecursionError) as error:
            raise ValueError(damaged) from error
    start, stored = _LENGTH_BYTES + length, {}
    for name, entry in entries:
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(damaged) from error
        if not (whole and first <= last <= size - start):
            raise ValueError(damaged)
        if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != last - first:
            raise ValueError(f"{path} is damaged or cut short: {name} has not the bytes of its shape; get it again.")
        stored[name] = Stored(dtype, shape, start + first, start + last)
    return stored


class Header(NamedTuple):
    """The beginning of a file that is to be written, and where its tensors go."""

    content: bytes
    starts: dict[str, int]
    """Offset of each tensor in the file, in the order of the file."""
    size: int
    """Bytes of the whole file."""


def make_header(layout: Mapping[str, tuple[str, Sequence[int]]]) -> Header:
    """The header of a file in safetensors.

    Tensors whose size is a multiple of :data:`ALIGNMENT` come first and start at multiples of it; the others follow
    without gaps, which the format does not allow.

    Args:
        layout: Dtype of safetensors and shape of every tensor, in their order within each of the two parts.
    """
    sizes = {name: ITEM_BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in layout.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(layout, key=lambda name: sizes[name] % ALIGNMENT != 0):  # stable
        dtype, shape = layout[name]
        starts[name] = end
        end += sizes[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    content = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return Header(content, {name: len(content) + start for name, start in starts.items()}, len(content) + end)


def _map_file(path: Path) -> dict[str, MappedTensor]:
    stored, content, tensors = read_header(path), np.memmap(path, np.uint8, "r"), {}
    for name, (dtype, shape, start, end) in stored.items():
        if dtype not in _DTYPES:  # an error where the network needs it
            tensors[name] = MappedTensor(dtype, content[start:end])
            continue
        item = np.dtype(_DTYPES[dtype])
        if start % item.itemsize:  # legal, and slow everywhere: take it into memory
            values = np.frombuffer(content[start:end].tobytes(), item)
        else:
            values = content[start:end].view(item)
        tensors[name] = MappedTensor(dtype, np.asarray(values).reshape(shape))
    return tensors
