"""Tensors of a checkpoint one at a time, without the rest of it in memory."""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from btlm.console import first_of, one_line
from btlm.errors import NotSupported
from btlm.model.alibi import alibi_slopes
from btlm.model.architecture_btlm import HEAD, SLOPES, TOKEN_TABLE, Architecture

from .open import Checkpoint
from .tensor_file import read_header
from .weight_files import check_size

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_HEAD, _TABLE = f"{HEAD}.weight", f"{TOKEN_TABLE}.weight"
# Causality buffers of old checkpoints, which loading passes over too.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights:
    """The weights of a checkpoint of BTLM, every one of them there and of the shape that the configuration says.

    Tensors are read one at a time, since the pages of a mapped file count as memory of the process.

    Args:
        checkpoint: Not quantized, in safetensors or pickled.

    Raises:
        ValueError: A file is damaged, or a tensor is missing, of another shape, or not one of BTLM.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        files, architecture = checkpoint.weight_files, checkpoint.architecture
        check_size(files, architecture.num_parameters(), quantized=False)
        entries: dict[str, _Entry] = {}
        for file in files:
            entries |= _entries(file)
        if not any(name.startswith("transformer.") for name in entries):  # a folder of the network without its head
            entries = {f"transformer.{name}": entry for name, entry in entries.items()}
        self._entries = entries
        if architecture.position_embedding_type == "alibi" and SLOPES not in self._entries:
            # Some converted checkpoints leave them out; they follow from the number of heads.
            slopes = alibi_slopes(architecture.n_head)
            self._entries[SLOPES] = _Entry(tuple(slopes.shape), slopes.dtype, lambda: slopes)
        self._check(checkpoint.name, architecture)

    def dtype(self, name: str) -> torch.dtype:
        """That in which a tensor is stored."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """A copy of one tensor, as it is stored.

        Raises:
            ValueError: It holds NaN or infinity, or its file has changed.
        """
        tensor = self._entries[name].read()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity; such a checkpoint cannot be used.")
        return tensor

    def _check(self, name: str, architecture: Architecture) -> None:
        expected = {name: facts.shape for name, facts in architecture.tensors.items()}
        given = {name: entry.shape for name, entry in self._entries.items()}
        has_copy = architecture.tie_word_embeddings and given.pop(_HEAD, None) is not None
        other = None
        if has_copy and given.keys() == expected.keys() and not torch.equal(self.read(_HEAD), self.read(_TABLE)):
            other = f"{_HEAD} differs from {_TABLE}, where config.json says that they are one"
        check_fit(
            name,
            missing=expected.keys() - given.keys(),
            unexpected=given.keys() - expected.keys(),
            shapes=[(key, given[key], shape) for key, shape in expected.items() if given.get(key, shape) != shape],
            others=[] if other is None else [other],
        )


def check_fit(
    name: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    others: Iterable[str] = (),
) -> None:
    """Refuse weights that are not those of a configuration.

    Args:
        name: What the user calls the checkpoint.
        missing: Names of tensors that it lacks.
        unexpected: Names of tensors that are not of the model.
        shapes: Names of tensors of another shape, each with its own shape and with that of the configuration.
        others: Further problems.

    Raises:
        ValueError: There are such; names the first of them.
    """
    problems = [
        *(f"{key} is missing" for key in sorted(missing)),
        *(f"{key} is not a tensor of BTLM" for key in sorted(unexpected)),
        *(
            f"{key} is {list(stored)} where config.json makes it {list(wanted)}"
            for key, stored, wanted in sorted(shapes)
        ),
        *others,
    ]
    if problems:
        raise ValueError(f"The weights of {name} do not fit its config.json: {first_of(problems)}.")


def _entries(file: Path) -> dict[str, _Entry]:
    try:
        header = read_header(file)
    except NotSupported:  # has to be read as a whole
        return {name: _Entry(tuple(t.shape), t.dtype, t.clone) for name, t in unpickle(file).items()}
    entries = {}
    for name, (dtype_name, shape, start, end) in header.items():
        if name.endswith(_OLD_BUFFERS):
            continue
        if dtype_name not in _DTYPES:
            raise ValueError(f"{name} in {file} is stored as {dtype_name}; only {', '.join(_DTYPES)} can be converted.")
        dtype = _DTYPES[dtype_name]
        entries[name] = _Entry(shape, dtype, _reader(file, start, end, dtype, shape))
    return entries


def _reader(file: Path, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        content = bytearray(end - start)
        with file.open("rb") as opened:
            opened.seek(start)
            if opened.readinto(content) < len(content):
                raise ValueError(f"{file} has become shorter while it was read; get it again.")
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    return read


def unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by torch, mapped; the older format is read as a whole, and stays in memory.

    Nothing in the file is run.

    Raises:
        ValueError: It is damaged, or holds anything but tensors of numbers with a fraction.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about files that it then refuses
            state = dict(torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds pickled objects besides tensors, which are never run; get the weights in "
            "safetensors."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} is damaged or cut short ({one_line(error)}); get it again.") from error
    tensors = {}
    for name, tensor in state.items():
        if str(name).endswith(_OLD_BUFFERS):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES.values():
            found = f"of {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{name} in {file} is {found}; only tensors of numbers with a fraction can be read.")
        tensors[name] = tensor
    return tensors
