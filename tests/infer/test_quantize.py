import json
import shutil

import pytest
import torch

from btlm.infer import load_model
from btlm.infer.quantize import quantize


def test_an_eight_bit_copy_loads_and_is_smaller(checkpoint, tmp_path, capsys):
    quantize(str(checkpoint), tmp_path / "eight")
    assert "bits a parameter" in capsys.readouterr().err
    original, _ = load_model(checkpoint)
    copy, tokenizer = load_model(tmp_path / "eight")
    assert tokenizer("Hi").input_ids == load_model(checkpoint)[1]("Hi").input_ids
    for (name, ours), theirs in zip(original.named_parameters(), copy.parameters(), strict=True):
        step = ours.abs().max() / 127 if ours.ndim == 2 else 0
        assert (ours - theirs).abs().max() <= step, name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "eight", checkpoint)]
    assert sizes[0] < 0.5 * sizes[1]


def test_an_eight_bit_model_is_quantized_again_without_change(checkpoint, tmp_path):
    quantize(str(checkpoint), tmp_path / "once")
    quantize(str(tmp_path / "once"), tmp_path / "twice")
    once, twice = (load_model(tmp_path / name)[0] for name in ("once", "twice"))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_a_folder_that_exists_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "kept").write_text("something")
    with pytest.raises(ValueError, match="kept exists"):
        quantize(str(checkpoint), tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "something"


def test_a_failure_leaves_no_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.infer.quantize.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        quantize(str(checkpoint), tmp_path / "eight")
    assert not (tmp_path / "eight").exists()


def test_a_leftover_of_a_failure_is_replaced(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "eight.partial")
    quantize(str(checkpoint), tmp_path / "eight")
    assert json.loads((tmp_path / "eight" / "config.json").read_text())["quantization_config"]["bits"] == 8
    assert not (tmp_path / "eight.partial").exists()
