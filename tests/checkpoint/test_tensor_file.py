import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from btlm.checkpoint.tensor_file import map_tensors
from btlm.checkpoint.weight_files import weight_files
from btlm.errors import NotSupported
from tests.checkpoint.tiny import tiny_model


def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 2).bfloat16(),
        "c": torch.randn(7).half(),
        "d": torch.arange(5, dtype=torch.uint8),
        "e": torch.arange(-3, 3, dtype=torch.int8),
        "empty": torch.zeros(0, 4),
    }


def as_torch(mapped):
    values = np.array(mapped.values)
    return (
        torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if mapped.dtype == "BF16" else torch.tensor(values)
    )


def write(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_dtype(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapped = map_tensors(weight_files(tmp_path))
    assert mapped.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert torch.equal(as_torch(mapped[name]), expected), name
    assert not mapped["a"].values.flags.writeable


def test_shards(tmp_path):
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tiny_model().save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one, many = map_tensors(weight_files(tmp_path / "whole")), map_tensors(weight_files(tmp_path / "sharded"))
    assert one.keys() == many.keys() == load_file(tmp_path / "whole" / "model.safetensors").keys()
    assert all(np.array_equal(one[name].values, many[name].values) for name in one)
    missing = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    missing.unlink()
    with pytest.raises(ValueError, match=f"lacks {missing.name}.*download it again"):
        map_tensors(weight_files(tmp_path / "sharded"))


def test_data_that_is_not_aligned(tmp_path):
    data = np.arange(2, dtype=np.float32).tobytes()
    header = json.dumps({"x": entry()}).encode()
    write(tmp_path / "model.safetensors", header + b" " * (1 - len(header) % 4 + 4), data)
    assert map_tensors(weight_files(tmp_path))["x"].values.tolist() == [0, 1]


def test_a_file_cut_short_anywhere(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.randn(4).half()}, path)
    content = path.read_bytes()
    for keep in range(len(content)):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="damaged or cut short") as error:
            map_tensors(weight_files(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"[" * 100_000,
        {"x": 5},
        {"x": {"dtype": "F32"}},
        {"x": entry(offsets=(0,))},
        {"x": entry(offsets=(0, 9))},
        {"x": entry(offsets=(8, 0))},
        {"x": entry(offsets=(-8, 0))},
        {"x": entry(offsets=("a", "b"))},
        {"x": entry(offsets=(0.0, 8.0))},
        {"x": entry(offsets=(8, 16))},
        {"x": entry(shape=(3,))},
        {"x": entry(shape=("2",))},
        {"x": entry(shape=2)},
        {"x": entry(shape=(-1, -2))},
    ],
)
def test_bad_headers(tmp_path, header):
    write(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(ValueError, match="damaged or cut short") as error:
        map_tensors(weight_files(tmp_path))
    assert "\n" not in str(error.value)


def test_a_header_longer_than_the_file(tmp_path):
    for length in (0, 1, 1 << 20, 1 << 63):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match="damaged"):
            map_tensors(weight_files(tmp_path))


def test_a_dtype_that_is_not_read(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.float64)}, tmp_path / "model.safetensors")
    assert map_tensors(weight_files(tmp_path))["x"].dtype == "F64"
    assert (
        map_tensors(weight_files(tmp_path))["x"].values.dtype == np.uint8
    )  # raw bytes, which no caller can take for numbers


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        map_tensors(weight_files(tmp_path))
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(NotSupported, match=r"pytorch_model\.bin is in torch's older format"):
        map_tensors(weight_files(tmp_path))


@pytest.mark.parametrize("index", [b"", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 5}}', b"\xff"])
def test_bad_indices(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"not a valid index|lacks") as error:
        map_tensors(weight_files(tmp_path))
    assert "\n" not in str(error.value)
