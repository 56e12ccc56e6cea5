"""What the engine maps of files by `torch.save`, compared with what torch reads."""

import io
import mmap
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from btlm.checkpoint.pickle_file import read_pickle
from btlm.checkpoint.tensor_file import map_tensors
from btlm.engine import Engine
from btlm.errors import NotSupported
from tests.checkpoint.tiny import pickle_tensors


def tensors():
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 2).bfloat16(),
        "c": torch.randn(7).half(),
        "d": torch.arange(5, dtype=torch.uint8),
        "e": torch.arange(-3, 3, dtype=torch.int8),
        "f": torch.nn.Parameter(torch.randn(2)),
        "mask": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "part": whole[2:4],
        "whole": whole,
        "column": whole[:, :1].clone(),
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def file(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_every_dtype_and_parts_of_a_storage(file):
    torch.save(tensors(), file)
    mapped = map_tensors([file])
    assert mapped.keys() == tensors().keys()
    for name, expected in tensors().items():
        dtype, values = mapped[name]
        bits = expected.detach().view(torch.int16) if dtype == "BF16" else expected.detach()
        stored = values.view(np.int16) if dtype == "BF16" else values.view(bool) if dtype == "BOOL" else values
        assert stored.tobytes() == bits.numpy().tobytes(), name
        assert dtype == "BOOL" or values.shape == expected.shape
    assert not mapped["a"].values.flags.writeable
    memory: Any = mapped["a"].values
    while getattr(memory, "base", None) is not None:
        memory = memory.base
    assert isinstance(memory, mmap.mmap)


def test_the_engine_runs_on_it_without_torch(copy, checkpoint):
    pickle_tensors(copy)
    ids = [5, 9, 200, 31]
    ours, expected = (Engine.open(folder, context=8).score(ids) for folder in (copy, checkpoint))
    assert np.array_equal(ours, expected)


def test_a_file_cut_short_anywhere(file):
    torch.save({"a": torch.randn(3), "b": torch.randn(2).half()}, file)
    content = file.read_bytes()
    for keep in range(0, len(content), 3):
        file.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"damaged or cut short|older format") as error:
            read_pickle(file)
        assert "\n" not in str(error.value)


def rewrite(file, change, compression=zipfile.ZIP_STORED):
    """Write the members of the archive again; ``change`` gives their content by name, None leaves one out."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


def description(value):
    """A change of the description of tensors to a pickle of a value."""
    return lambda name, content: pickle.dumps(value, 2) if name.endswith("data.pkl") else content


class Described:
    """A tensor as torch describes it, with any numbers."""

    def __init__(self, numel=15, offset=0, shape=(3, 5), strides=(5, 1), key="0"):
        self.key, self.numel = key, numel
        self.rest: Any = (offset, shape, strides, False, {})


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Described):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.numel)
        return None

    def reducer_override(self, value):
        if isinstance(value, list) or not hasattr(value, "described"):
            return NotImplemented
        return torch._utils._rebuild_tensor_v2, (value.described, *value.described.rest)


class Reduced:
    def __init__(self, described):
        self.described = described


def described(**numbers):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Reduced(Described(**numbers))})
    return lambda name, content: buffer.getvalue() if name.endswith("data.pkl") else content


@pytest.mark.parametrize(
    "numbers",
    [
        {"shape": (3, 6), "strides": (6, 1)},
        {"offset": 1},
        {"offset": 2**62},
        {"offset": -1},
        {"shape": (2**32, 2**32), "strides": (2**32, 1)},
        {"shape": (-3, -5)},
        {"shape": (3.0, 5)},
        {"shape": 15},
        {"shape": (3, 5), "strides": (1,)},
        {"key": "7"},
        {"key": "../0"},
        {"key": None},
    ],
)
def test_numbers_that_cannot_be(file, numbers):
    torch.save({"a": torch.randn(3, 5)}, file)
    rewrite(file, described())
    assert read_pickle(file)["a"].shape == (3, 5)
    rewrite(file, described(**numbers))
    with pytest.raises(ValueError, match="damaged or cut short") as error:
        read_pickle(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("numbers", [{"strides": (1, 3)}, {"strides": (0, 1)}, {"strides": (5, 0)}])
def test_tensors_that_are_not_in_one_piece_are_left_to_torch(file, numbers):
    torch.save({"a": torch.randn(3, 5)}, file)
    rewrite(file, described(**numbers))
    with pytest.raises(NotSupported, match="one piece"):
        read_pickle(file)


@pytest.mark.parametrize("value", [[1], {("a", "b"): 1}, {1: 2}, 5, None, {"a": {1, 2}}])
def test_other_objects(file, value):
    torch.save({"a": torch.randn(3)}, file)
    rewrite(file, description(value))
    if value == {"a": {1, 2}} or not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        with pytest.raises(ValueError, match="objects besides tensors"):
            read_pickle(file)


def test_a_list_of_objects_that_would_take_all_memory(file):
    torch.save({"a": torch.randn(3)}, file)
    bomb = b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"."
    rewrite(file, lambda name, content: bomb if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match="list of objects is too long"):
        read_pickle(file)


def test_compressed_members_are_left_to_torch(file):
    torch.save({"a": torch.zeros(100)}, file)
    rewrite(file, lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(NotSupported, match="compressed"):
        read_pickle(file)


def test_another_order_of_bytes(file):
    torch.save({"a": torch.zeros(3)}, file)
    rewrite(file, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(NotSupported, match="order of bytes"):
        read_pickle(file)


def test_a_member_that_says_it_is_longer_than_the_file(file):
    torch.save({"a": torch.randn(3, 5)}, file)
    rewrite(file, described(shape=(1000, 1000), strides=(1000, 1)))
    content = bytearray(file.read_bytes())
    at = content.index(b"data/0", content.index(b"PK\1\2"))  # in the directory at the end
    entry = content.rindex(b"PK\1\2", 0, at)
    content[entry + 20 : entry + 28] = struct.pack("<II", 4_000_000, 4_000_000)
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert max(member.file_size for member in archive.infolist()) == 4_000_000
    with pytest.raises(ValueError, match="does not lie in the file"):
        read_pickle(file)


@pytest.mark.parametrize("missing", ["data.pkl", "data/0"])
def test_a_member_that_is_not_there(file, missing):
    torch.save({"a": torch.zeros(3)}, file)
    rewrite(file, lambda name, content: None if name.endswith(missing) else content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_pickle(file)
