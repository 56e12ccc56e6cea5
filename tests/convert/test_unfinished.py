"""Runs of `btlm quantize` with a calibration text go on after a stop."""

import errno
import shutil
import signal
import sys

import pytest
import torch

from btlm.convert.quantize import quantize
from btlm.errors import DoesNotFit
from btlm.model.storage_btlm import pack_scale
from tests.checkpoint.tiny import change_tensors, cut, save_tiny
from tests.convert.runs import WIDE, start_slow_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("deep"), **WIDE | {"n_layer": 3})


@pytest.fixture(scope="module")
def whole(deep, text, tmp_path_factory):
    """The files of a copy that was written in one run."""
    copy = tmp_path_factory.mktemp("whole") / "copy"
    quantize(deep, copy, calibration=text)
    return files_of(copy)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("matrix", "blocks"),
    [(7, 1), *(pytest.param(*at, marks=pytest.mark.slow) for at in ((1, 0), (6, 0), (11, 1), (12, 2), (16, 2)))],
)
def test_a_killed_calibrated_run_goes_on_with_the_same_bytes(deep, text, whole, tmp_path, capfd, matrix, blocks):
    """The table comes first, then five matrices per block."""
    with start_slow_run(tmp_path / "copy", deep, "--calibrate", str(text), matrix=matrix) as run:
        run.kill()
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert left.name == ".copy.unfinished.partial"
    errors = quantize(deep, tmp_path / "copy", calibration=text)
    told = capfd.readouterr().err
    assert ("going on after" in told) == (blocks > 0)
    assert f"going on after {blocks} of 3 blocks" in told or not blocks
    assert "starting anew" not in told
    assert "3 of 3 blocks done; about 0:00:00 left" in told
    assert files_of(tmp_path / "copy") == whole
    assert len(errors) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_calibrated_run_that_is_told_to_stop_keeps_what_is_done(deep, text, whole, tmp_path, sent, status):
    with start_slow_run(tmp_path / "copy", deep, "--calibrate", str(text), matrix=13) as run:
        run.send_signal(sent)
        assert run.wait(60) == status
        assert "2 of 3 blocks are done, and the same command goes on after them; remove" in run.stderr.read()
    with start_slow_run(tmp_path / "copy", deep, "--calibrate", str(text), matrix=2) as run:
        run.kill()  # a later stop, in the next block: nothing is lost
    quantize(deep, tmp_path / "copy", calibration=text)
    assert files_of(tmp_path / "copy") == whole
    with start_slow_run(tmp_path / "other", deep, "--calibrate", str(text), matrix=3) as run:
        run.send_signal(sent)
        assert run.wait(60) == status
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_calibrated_run_that_would_fail_again_leaves_nothing(deep, text, tmp_path, capfd):
    source = tmp_path / "source"
    shutil.copytree(deep, source)
    wrong = "transformer.h.2.mlp.c_fc.weight"
    change_tensors(source, lambda tensors: tensors | {wrong: torch.full_like(tensors[wrong], float("nan"))})
    with pytest.raises(ValueError, match=f"{wrong} holds NaN or infinity"):
        quantize(source, tmp_path / "copy", calibration=text)
    told = capfd.readouterr().err
    assert "2 of 3 blocks done" in told  # so there was something to keep
    assert "goes on" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_calibrated_run_keeps_what_is_done_when_the_disk_is_full(deep, text, whole, tmp_path, capfd, monkeypatch):
    calls = iter(range(100))

    def fills(*arguments):
        if next(calls) == 8:  # in the second block
            raise OSError(errno.ENOSPC, "No space left on device")
        return pack_scale(*arguments)

    with monkeypatch.context() as changed:
        changed.setattr("btlm.convert.quantize.pack_scale", fills)
        with pytest.raises(DoesNotFit, match="Make room there, and run the same command again"):
            quantize(deep, tmp_path / "copy", calibration=text)
    assert "1 of 3 blocks are done, and the same command goes on after them" in capfd.readouterr().err
    quantize(deep, tmp_path / "copy", calibration=text)
    assert "going on after 1 of 3 blocks" in capfd.readouterr().err
    assert files_of(tmp_path / "copy") == whole


@pytest.mark.parametrize(
    "change", ["weights", *(pytest.param(what, marks=pytest.mark.slow) for what in ("text", "bits", "record", "file"))]
)
def test_what_an_earlier_run_left_of_something_else_is_not_used(deep, text, tmp_path, capfd, change):
    source, other_text = tmp_path / "source", tmp_path / "text.txt"
    shutil.copytree(deep, source)
    other_text.write_text(text.read_text())
    with start_slow_run(tmp_path / "copy", source, "--calibrate", str(other_text), matrix=8) as run:
        run.kill()
    left, bits = tmp_path / ".copy.unfinished.partial", 4
    if change == "text":
        other_text.write_text(text.read_text()[::-1])
    elif change == "bits":
        bits = 8
    elif change == "weights":
        change_tensors(source, lambda tensors: tensors | {"transformer.h.1.mlp.c_fc.bias": torch.ones(150)})
    elif change == "record":
        cut(left / "unfinished.safetensors", 0.9)
    else:
        (left / "model.safetensors").unlink()
    quantize(source, tmp_path / "copy", calibration=other_text, bits=bits)
    assert "starting anew" in capfd.readouterr().err
    quantize(source, tmp_path / "fresh", calibration=other_text, bits=bits)
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "fresh")
