"""Tensors of a checkpoint where they lie in its files: nothing is read before it is used, and processes share the
pages."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .locate import WEIGHTS

# The layout of safetensors: a length of 8 bytes, a JSON header, and the data (github.com/huggingface/safetensors).
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
_DTYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}


class MappedTensor(NamedTuple):
    """A tensor in a mapped file; bf16 is held in uint16, and what is neither floats nor bytes, as plain bytes."""

    dtype: str
    values: npt.NDArray[Any]


def resident_bytes(tensor: MappedTensor) -> int:
    """Memory that the engine takes for a tensor: its pages, and those of fp16 beside a copy in fp32."""
    return tensor.values.nbytes * (3 if tensor.dtype == "F16" else 1)


def map_tensors(folder: Path) -> dict[str, MappedTensor]:
    """The tensors of a folder in safetensors, by name.

    Raises:
        ValueError: There are none, or a file is damaged or cut short.
    """
    if (folder / "model.safetensors").is_file():
        return _map_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        kinds = [name for name in WEIGHTS if (folder / name).is_file()]
        found = f"its weights are in {kinds[0]}" if kinds else "it holds no weights"
        raise ValueError(f"{folder} has no model.safetensors; {found}.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of weight files.") from error
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, which {index.name} names; download it again.")
    return {key: tensor for name in names for key, tensor in _map_file(folder / name).items()}


class Stored(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """What a file in safetensors holds, by name.

    Raises:
        ValueError: It is damaged or cut short.
    """
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
        stored[name] = Stored(dtype, shape, start + first, start + last)
    return stored


def _map_file(path: Path) -> dict[str, MappedTensor]:
    stored, content, tensors = read_header(path), np.memmap(path, np.uint8, "r"), {}
    for name, (dtype, shape, start, end) in stored.items():
        if dtype not in _DTYPES:  # an error where the network needs it
            tensors[name] = MappedTensor(dtype, content[start:end])
            continue
        item = np.dtype(_DTYPES[dtype])
        if math.prod(shape) * item.itemsize != end - start:
            raise ValueError(
                f"{path} is damaged or cut short: {name} does not have the bytes of its shape; get it again."
            )
        if start % item.itemsize:  # legal, and slow everywhere: take it into memory
            values = np.frombuffer(content[start:end].tobytes(), item)
        else:
            values = content[start:end].view(item)
        tensors[name] = MappedTensor(dtype, np.asarray(values).reshape(shape))
    return tensors
