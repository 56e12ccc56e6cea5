"""Tensors of a checkpoint one at a time, without the rest of it in memory."""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from btlm.console import first_of, one_line
from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.alibi import alibi_slopes

from .tensor_file import read_header

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_HEAD, _TABLE, _SLOPES = "lm_head.weight", "transformer.wte.weight", "transformer.relative_pe.slopes"
# Causality buffers of old checkpoints, which loading passes over too.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights:
    """The weights of a checkpoint of BTLM, every one of them there and of the shape that the configuration says.

    Files are read where they can be, since the pages of a mapped file count as memory of the process, or mapped for
    the time of one tensor.

    Args:
        files: Of the checkpoint, in safetensors or pickled, without damage that safetensors sees.
        model: Of its configuration, on any device.

    Raises:
        ValueError: A file is damaged, or a tensor is missing, of another shape, or not one of BTLM.
    """

    def __init__(self, files: Sequence[Path], model: BTLMLMHeadModel) -> None:
        entries: dict[str, _Entry] = {}
        for file in files:
            entries |= _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        if not any(name.startswith("transformer.") for name in entries):  # a folder of the network without its head
            entries = {f"transformer.{name}": entry for name, entry in entries.items()}
        self._entries = entries
        if model.config.position_embedding_type == "alibi" and _SLOPES not in self._entries:
            # Some converted checkpoints leave them out; they follow from the number of heads.
            slopes = alibi_slopes(model.config.n_head)
            self._entries[_SLOPES] = _Entry(tuple(slopes.shape), slopes.dtype, lambda: slopes)
        self._check(files[0].parent, model)

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

    def _check(self, folder: Path, model: BTLMLMHeadModel) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        given = {name: entry.shape for name, entry in self._entries.items()}
        tied = model.config.tie_word_embeddings
        if tied:
            del expected[_HEAD]
        has_copy = tied and given.pop(_HEAD, None) is not None
        problems = [
            *(f"{name} is missing" for name in sorted(expected.keys() - given.keys())),
            *(f"{name} is not a tensor of BTLM" for name in sorted(given.keys() - expected.keys())),
            *(
                f"{name} is {list(given[name])} where config.json makes it {list(shape)}"
                for name, shape in expected.items()
                if given.get(name, shape) != shape
            ),
        ]
        if has_copy and not problems and not torch.equal(self.read(_HEAD), self.read(_TABLE)):
            problems.append(f"{_HEAD} differs from {_TABLE}, where config.json says that they are one")
        if problems:
            raise ValueError(f"The weights of {folder} do not fit its config.json: {first_of(problems)}.")


def empty_model(config: BTLMConfig) -> BTLMLMHeadModel:
    """The modules of a model, without memory for its weights."""
    with torch.device("meta"):
        model = BTLMLMHeadModel(config)
    model.eval()
    return model


def _safetensors(file: Path) -> dict[str, _Entry]:
    entries = {}
    for name, (dtype_name, shape, start, end) in read_header(file).items():
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


def _pickled(file: Path) -> dict[str, _Entry]:
    mapped = zipfile.is_zipfile(file)  # the older format has to be read as a whole, and stays in memory
    state = _unpickle(file, mapped)
    entries = {}
    for name, tensor in state.items():
        if str(name).endswith(_OLD_BUFFERS):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES.values():
            found = f"of {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{name} in {file} is {found}; only tensors of numbers with a fraction can be converted.")
        read = partial(_mapped_tensor, file, name) if mapped else tensor.clone
        entries[name] = _Entry(tuple(tensor.shape), tensor.dtype, read)
    return entries


def _mapped_tensor(file: Path, name: str) -> Tensor:
    tensor: Tensor = _unpickle(file, True)[name]
    return tensor.clone()  # the map ends here


def _unpickle(file: Path, mapped: bool) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about files that it then refuses
            state = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
        return dict(state)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged, or holds pickled objects besides tensors, which are never run; get the weights in "
            "safetensors."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{file} is damaged or cut short ({one_line(error)}); get it again.") from error
