"""Tensors of a file by `torch.save` where they lie in it, without torch and without running anything in the file.

Such a file is a zip archive of uncompressed members: ``data.pkl`` describes the tensors, and ``data/0``, ``data/1`` and
so on hold their numbers. torch's older format, which is no zip archive, has to be read by torch.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from btlm.console import one_line
from btlm.errors import NotSupported

from .weight_files import ITEM_BYTES, Stored

# Storage classes of torch -> dtypes of safetensors.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LONGEST_DESCRIPTION = 100_000_000


def read_pickle(path: Path) -> dict[str, Stored]:
    """What a file by `torch.save` holds, by name; each tensor is checked to lie inside the file.

    Raises:
        NotSupported: Only torch can read it: it has the older format, or a tensor that is not in one piece.
        ValueError: It is damaged, or holds anything but tensors.
    """
    if not zipfile.is_zipfile(path):
        raise NotSupported(f"{path} is in torch's older format.")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {member.filename: member for member in archive.infolist()}
            root = next(name for name in members if name.endswith("/data.pkl")).removesuffix("data.pkl")
            if members[f"{root}data.pkl"].file_size > _LONGEST_DESCRIPTION:
                raise ValueError("the description of its tensors is too long")
            content = archive.read(f"{root}data.pkl")
            if (order := members.get(f"{root}byteorder")) and archive.read(order) != b"little":
                raise NotSupported(f"{path} was written on a machine with another order of bytes.")
            return {
                name: _place(name, tensor, file, members[f"{root}data/{tensor.storage.key}"])
                for name, tensor in _unpickle(content).items()
            }
    except NotSupported:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds pickled objects besides tensors, which are never run; get the weights in "
            "safetensors."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged or cut short ({one_line(error)}); get it again.") from error


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows only what describes tensors; a storage is its dtype and the name of its member."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _Tensor(*arguments[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _ = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError("not a storage")
        return _Storage(dtype, key)


def _unpickle(content: bytes) -> dict[str, _Tensor]:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(content):  # makes the reader allocate as many places
            raise ValueError("its list of objects is too long")
    state = _Unpickler(io.BytesIO(content)).load()
    if not (
        isinstance(state, dict)
        and all(isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in state.items())
    ):
        raise pickle.UnpicklingError("not a dictionary of tensors")
    return state


def _place(name: str, tensor: _Tensor, file: BinaryIO, member: zipfile.ZipInfo) -> Stored:
    storage, offset, shape, strides = tensor
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError(f"{name} has impossible sizes")
    in_one_piece: list[int] = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(size > 1 and a != b for size, a, b in zip(shape, strides, in_one_piece, strict=True)) and 0 not in shape:
        raise NotSupported(f"{name} does not lie in one piece.")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise NotSupported(f"{name} is compressed.")
    item = ITEM_BYTES[storage.dtype]
    file.seek(member.header_offset)
    header = file.read(30)  # of the member; the lengths of its name and of what pads it stand at its end
    begin = (
        member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    )
    start, size = begin + offset * item, math.prod(shape) * item
    if header[:4] != b"PK\3\4" or offset * item + size > member.file_size or begin + member.file_size > file.seek(0, 2):
        raise ValueError(f"{name} does not lie in the file")
    return Stored(storage.dtype, shape, start, start + size)
