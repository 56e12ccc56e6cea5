import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btlm.checkpoint.open import Checkpoint
from btlm.console import progress_bars
from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.evaluate import bench as bench_module
from btlm.evaluate import bench_plot
from btlm.evaluate.bench import bench_table, run_bench
from btlm.evaluate.bench_plot import plot_memory, plot_speed
from btlm.evaluate.random_checkpoint import DTYPES, SHAPES, random_weight_bytes, shape_config, write_random_model
from btlm.evaluate.results import read_results
from btlm.model.architecture_btlm import Architecture
from tests.checkpoint.tiny import save_tiny

SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 180, "vocab_size": 257, "n_positions": 128}
SMALL = {**SHAPES["btlm-3b"], **SIZES}
UNTIED = {**SMALL, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _temporary_files(tmp_path, monkeypatch):
    """Put temporary files into a folder of the test, so that it can see what is left behind."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setitem(SHAPES, "untied", UNTIED)


def left_behind(tmp_path):
    return list((tmp_path / "temporary").iterdir())


def fake_child(task, progress, title, total):
    """Stand in for the process that measures, without measuring."""
    if "folder" not in task:
        return {"bytes_per_s": 40e9, "kernels": "plain", "threads": 2}
    return {
        "weight_dtype": "4bit",
        "cache_dtype": "int8",
        "open_s": 0.01,
        "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 10.0,
        "weight_bytes": 2_000_000_000,
        "weight_bytes_read": 1_800_000_000,
        "cache_bytes": 300_000_000,
        "cache_bytes_read": 200_000_000,
        "peak_bytes": 2_400_000_000,
    }


# Random weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SMALL, UNTIED])
def test_random_model_runs(dtype, sizes, tmp_path):
    told: list[int] = []
    write_random_model(tmp_path, sizes, dtype, on_bytes=told.append)
    engine = Engine.open(tmp_path, context=32, threads=1)
    tokens = list(engine.generate([1, 2, 3], GenerationOptions(max_new_tokens=4), stop_ids=frozenset()))
    assert len(tokens) == 4
    assert all(math.isfinite(token.logprob) for token in tokens)
    assert engine.network.weight_dtype == dtype
    size = sum(tensor.values.nbytes for tensor in Checkpoint.open(tmp_path).tensors.values())
    assert size == random_weight_bytes(sizes, dtype) == told[-1]


@pytest.mark.parametrize(("dtype", "bits"), [("4bit", 4), ("8bit", 8), ("float32", None)])
@pytest.mark.parametrize("tied", [True, False])
def test_random_model_is_stored_as_a_saved_one(dtype, bits, tied, tmp_path):
    saved = save_tiny(tmp_path / "saved", **SIZES, tie_word_embeddings=tied)
    if bits:
        quantize(saved, tmp_path / "quantized", bits=bits)
        saved = tmp_path / "quantized"
    (tmp_path / "random").mkdir()
    write_random_model(tmp_path / "random", {**SMALL, "tie_word_embeddings": tied}, dtype)

    def layout(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = Checkpoint.open(folder).tensors.items()
        return {name: (tensor.dtype, tensor.values.shape) for name, tensor in tensors if "relative_pe" not in name}

    assert layout(tmp_path / "random") == layout(saved)


def test_random_tensors_are_aligned_and_spread(tmp_path):
    write_random_model(tmp_path, SMALL, "bfloat16")
    tensors = Checkpoint.open(tmp_path).tensors
    assert all(tensor.values.ctypes.data % 64 == 0 for tensor in tensors.values() if tensor.values.nbytes % 64 == 0)
    stored = torch.from_numpy(tensors["transformer.h.0.attn.c_attn.weight"].values.copy()).view(torch.bfloat16)
    assert stored.float().std() == pytest.approx(0.02, rel=0.02)


def test_named_shapes_have_the_published_sizes():
    # The released BTLM has 2,646,255,744 parameters, Llama-7B 6,738,415,616; Llama has no biases, not even in norms.
    assert Architecture.from_config(shape_config(SHAPES["btlm-3b"], "bfloat16")).num_parameters() == 2_646_255_744
    assert random_weight_bytes(SHAPES["btlm-3b"], "bfloat16") == 2 * 2_646_255_744
    assert random_weight_bytes(SHAPES["llama-7b"], "bfloat16") == pytest.approx(2 * 6_738_415_616, rel=5e-4)
    # At most two thirds of a byte per parameter: half a byte, scales, and the tables in eight bits.
    assert 0.5 < random_weight_bytes(SHAPES["llama-7b"], "4bit") / 6_738_415_616 < 0.67


# Measurements


def test_bench_measures_folders_and_shapes(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_random_model(folder, SMALL, "8bit")
    output = tmp_path / "new" / "bench"
    options: dict[str, Any] = {"dtypes": ["bfloat16"], "contexts": [64], "new_tokens": 8, "threads": 1}
    rows = run_bench([str(folder), "untied"], **options, output=output)
    mine, untied = rows
    assert (mine["model"], mine["dtype"], mine["cache_dtype"]) == ("mine", "8bit", "int8")
    assert (untied["model"], untied["dtype"], untied["cache_dtype"]) == ("untied", "bfloat16", "bfloat16")
    # A step only looks up single rows in the table of an untied model, which has 257 rows of 128 in bf16.
    assert untied["weight_bytes"] - untied["weight_bytes_read"] == 257 * 128 * 2
    assert mine["weight_bytes"] == mine["weight_bytes_read"] == random_weight_bytes(SMALL, "8bit")
    # Keys and values of 2 layers, 4 heads of 32, and 64 tokens: in bf16, or in bytes with a scale of two bytes.
    assert untied["cache_bytes"] == 2 * 2 * 4 * 64 * 64
    assert mine["cache_bytes"] == 2 * 2 * 4 * 64 * 34
    for row in rows:
        assert row["context"] == 64
        assert row["peak_bytes"] > 10_000_000  # Python itself takes more than this
        assert all(row[key] > 0 for key in ("open_s", "prefill_tokens_per_s", "decode_tokens_per_s"))
        read = row["weight_bytes_read"] + row["cache_bytes_read"]
        assert row["share_of_read_rate"] == pytest.approx(read * row["decode_tokens_per_s"] / row["read_bytes_per_s"])
    kept = read_results(output / "results.json")
    assert {(Path(one.model).name, one.settings["dtype"], one.metric): one.value for one in kept} == {
        (row["model"], row["dtype"], key): value
        for row in rows
        for key, value in row.items()
        if isinstance(value, (int, float)) and key != "context"
    }
    assert {(one.name.partition(" ")[0], one.settings["threads"], one.settings["new_tokens"]) for one in kept} == {
        ("bench", 1, 8)
    }
    assert {one.metric: one.unit for one in kept}["decode_tokens_per_s"] == "per s"
    assert sorted(path.name for path in output.iterdir()) == ["figure-1.png", "figure-2.png", "results.json"]
    for name in ("figure-1.png", "figure-2.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert "untied" in capsys.readouterr().out
    assert not left_behind(tmp_path)


def test_child_imports_no_torch():
    heavy = ("torch", "rich", "matplotlib")
    code = f"import sys, btlm.evaluate.bench_child; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peak_is_that_of_the_child(tmp_path):
    held = np.ones(300_000_000, np.uint8)  # memory of the parent, which must not count
    (row,) = run_bench(["small"], contexts=[64], new_tokens=8, threads=1)
    assert row["peak_bytes"] < held.nbytes


def test_table_fits_80_columns(capsys):
    rows = [
        {"model": "llama-7b", "dtype": "bfloat16", "context": 8192, "read_bytes_per_s": 40e9, "share_of_read_rate": 1.0}
        | fake_child({"folder": ""}, None, "", 1)
    ]
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(bench_table(rows))
    lines = capture.get().splitlines()
    shown = ["llama-7b", "bfloat16", "8,192", "2.00", "0.30", "2.40", "0.01", "100", "10.0", "40.0", "100%"]
    assert shown in [line.split() for line in lines]


@pytest.mark.parametrize(("peak", "marked"), [(0.1e9, False), (1.1e9, True), (8e9, True)])
def test_the_line_of_small_devices_is_drawn_where_it_leaves_room(monkeypatch, tmp_path, peak, marked):
    row = {"model": "m", "dtype": "4bit", "context": 512} | fake_child({"folder": ""}, None, "", 1)
    kept = []
    monkeypatch.setattr(bench_plot, "save_figure", lambda figure, picture: kept.append(figure))
    for plot in (plot_memory, plot_speed):
        plot([row | {"peak_bytes": peak, "weight_bytes": peak / 2}], tmp_path / "figure.png")
    for figure in kept:
        assert ("3 GB" in [text.get_text().strip() for text in figure.axes[0].texts]) is marked
    assert (kept[0].axes[0].get_xlim()[1] > 3) == marked


def test_dtypes_need_a_shape(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "_child", fake_child)
    (tmp_path / "mine").mkdir()
    write_random_model(tmp_path / "mine", SMALL, "float32")
    with pytest.raises(ValueError, match="dtypes are for shapes with random weights, and checkpoints are measured as"):
        run_bench([str(tmp_path / "mine")], dtypes=["4bit"], contexts=[64], new_tokens=8)
    rows = run_bench([str(tmp_path / "mine"), "small"], dtypes=["8bit"], contexts=[64], new_tokens=8)
    assert [row["dtype"] for row in rows] == ["float32", "8bit"]
    (row,) = run_bench(["small"], contexts=[64], new_tokens=8)
    assert row["dtype"] == "4bit"


def test_every_dtype_and_context_is_measured_once(monkeypatch, tmp_path):
    tasks = []

    def child(task, progress, title, total):
        if "folder" in task:
            tasks.append((task["context"], json.loads((Path(task["folder"]) / "config.json").read_text())["dtype"]))
        return fake_child(task, progress, title, total)

    monkeypatch.setattr(bench_module, "_child", child)
    rows = run_bench(["small", "small"], dtypes=["bfloat16", "float32"], contexts=[96, 64, 96], new_tokens=8)
    assert tasks == [(64, "bfloat16"), (96, "bfloat16"), (64, "float32"), (96, "float32")]
    assert rows[0]["share_of_read_rate"] == pytest.approx(2e9 * 10 / 40e9)


def test_folders_of_one_name_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "_child", fake_child)
    given = []
    for name in ("a", "b"):
        folder = tmp_path / name / "copy"
        folder.mkdir(parents=True)
        write_random_model(folder, SMALL, "4bit")
        given.append(str(folder))
    assert [row["model"] for row in run_bench(given, contexts=[64], new_tokens=8)] == given


def test_interruption_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(task, progress, title, total):
        assert left_behind(tmp_path)  # the weights have been written
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(["small"], contexts=[64], new_tokens=8)
    assert not left_behind(tmp_path)


def test_an_interruption_ends_the_measuring_process(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho '{\"tokens\": 1}'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    started: list[Any] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with progress_bars() as progress:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench_module._child({"folder": ""}, progress, "title", 1)
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_termination_leaves_nothing(tmp_path):
    """The process is terminated while it writes the weights of btlm-3b."""
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-m", "btlm", "bench", "btlm-3b", "--contexts", "64"]
    environment = os.environ | {"TMPDIR": str(place)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(place.glob("btlm-bench-*/model.safetensors")):
            time.sleep(0.01)
        process.terminate()
        _, told = process.communicate()
    assert (process.returncode, told.count("Traceback")) == (143, 0)
    assert not list(place.iterdir())


def test_cache_dtype(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_random_model(folder, SMALL, "4bit")
    (row,) = run_bench([str(folder)], contexts=[64], new_tokens=8, cache_dtype="int4", threads=1)
    assert row["cache_dtype"] == "int4"
    assert row["cache_bytes"] == 2 * 2 * 4 * 64 * 18  # half a byte per dimension, of 32, and a scale of two bytes


def test_measurements_before_a_failure_are_kept(monkeypatch, tmp_path):
    def child(task, progress, title, total):
        if task.get("context") == 96:
            raise ValueError("The second one fails.")
        return fake_child(task, progress, title, total)

    monkeypatch.setattr(bench_module, "_child", child)
    with pytest.raises(ValueError, match="second"):
        run_bench(["small"], contexts=[64, 96], new_tokens=8, output=tmp_path / "bench")
    assert {row.settings["context"] for row in read_results(tmp_path / "bench" / "results.json")} == {64}


# Errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtypes": ["4bit", "int3"]}, "'int3'., not a list of any of 4bit"),
        ({"contexts": [512, "many"]}, "512, 'many'., not a list of whole numbers"),
        ({"contexts": [8]}, "must exceed the 8 of new_tokens"),
        ({"new_tokens": 2}, "new_tokens is 2, not a whole number of at least 3"),
        ({"threads": 0}, "threads is 0"),
        ({"cache_dtype": "int3"}, "The cache dtype 'int3' is unknown; choose one of auto, int4"),
        ({"models": ["nowhere"]}, "'nowhere' is no folder, and the shapes are btlm-3b, llama-7b"),
        ({"models": []}, "There is no model"),
    ],
)
def test_refusals(options, says, monkeypatch):
    monkeypatch.setattr(bench_module, "_child", None)  # errors are found before any measurement
    with pytest.raises(ValueError, match=says) as caught:
        run_bench(**{"models": ["small"], "contexts": [64], "new_tokens": 8, **options})
    assert "\n" not in str(caught.value)


def test_memory_and_disk_are_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(bench_module, "_child", None)
    monkeypatch.setattr(bench_module, "available_memory", lambda: 8_000_000_000)
    with pytest.raises(ValueError, match=r"llama-7b in bfloat16 takes 14\.\d\d GB .* and 8\.00 GB of memory"):
        run_bench(["llama-7b"], dtypes=["bfloat16"], contexts=[2048])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2 * 10**9, 10**9, 10**9))
    with pytest.raises(
        ValueError, match=r"btlm-3b-4bit takes 1\.54 GB, and .* has 1\.00 GB free; make room there, or set TMPDIR"
    ):
        run_bench(["small", "btlm-3b"], contexts=[64, 512])  # before the first is measured


def test_without_matplotlib_nothing_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "_child", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib: pip install"):
        run_bench(["small"], contexts=[64], new_tokens=8, output=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_error_of_a_child_is_one_line(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_random_model(folder, SMALL, "4bit")
    with progress_bars() as progress, pytest.raises(ValueError, match="context of 0"):
        bench_module._child({"folder": str(folder), "context": 0, "new_tokens": 8, "threads": 1}, progress, "title", 1)
