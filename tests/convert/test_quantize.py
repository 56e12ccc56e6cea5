"""From a checkpoint to a quantized folder, and back through Transformers and the engine."""

import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from btlm.checkpoint import load_model
from btlm.checkpoint.tensor_file import read_header
from btlm.convert.calibrate import calibration_rows
from btlm.convert.quantize import quantize
from btlm.engine import Engine
from btlm.files import locked, whole_folder
from tests.checkpoint.tiny import byte_tokenizer, change_tensors, cut, pickle_tensors, save_tiny, set_config, tiny_model
from tests.convert.runs import WIDE, start_slow_run

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [5, 9, 200, 31, 7, 100, 42, 3]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint folder that tests must not change."""
    return save_tiny(tmp_path_factory.mktemp("wide"), **WIDE)


def relative(model, original):
    """Size of the difference of the matrices, relative to the size of the matrices."""
    pairs = zip(model.named_parameters(), original.parameters(), strict=True)
    return {name: ((a - b).norm() / b.norm()).item() for (name, a), b in pairs if b.ndim == 2}


@pytest.mark.parametrize(("bits", "group_size", "most"), [(4, 64, 0.12), (4, 128, 0.13), (8, 64, 0.008)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_is_close_and_small(tmp_path, bits, group_size, most, tied):
    source = save_tiny(tmp_path / "source", **WIDE, tie_word_embeddings=tied)
    errors = quantize(source, tmp_path / "copy", bits=bits, group_size=group_size)
    copy, tokenizer = load_model(tmp_path / "copy", dtype="float32")
    assert tokenizer("Hi").input_ids == byte_tokenizer()("Hi").input_ids
    original = tiny_model(**WIDE, tie_word_embeddings=tied)
    for name, error in relative(copy, original).items():
        table = "wte" in name or "lm_head" in name
        assert error < (0.008 if table else most), name
        assert error == pytest.approx(errors[name.removesuffix(".weight")].weights, rel=0.01)
    for name, ours in copy.named_parameters():
        if ours.ndim == 1:
            assert torch.equal(ours, original.state_dict()[name]), name
    stored = read_header(tmp_path / "copy" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert all(tensor.start % 64 == 0 for tensor in stored.values() if (tensor.end - tensor.start) % 64 == 0)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_the_engine_runs_what_transformers_decodes(wide, tmp_path, cache_dtype):
    quantize(wide, tmp_path / "copy")
    model, _ = load_model(tmp_path / "copy", dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()
    scores = Engine.open(tmp_path / "copy", cache_dtype=cache_dtype).score(IDS)
    assert np.abs(scores - expected).max() < 0.06  # 8-bit activations cause 0.03; logits deviate by 0.67


def test_calibration_keeps_outputs_better(wide, text, tmp_path, capsys):
    plain = quantize(wide, tmp_path / "plain")
    quantize(wide, tmp_path / "calibrated", calibration=text, calibration_tokens=2048)
    err = capsys.readouterr().err
    assert "Relative error of the weights" in err
    assert "/ of the outputs for the text" in err
    assert "bits per weight" in err
    assert all(error.outputs is None for error in plain.values())
    ids = torch.tensor([byte_tokenizer()(text.read_text()[:400])["input_ids"]])
    with torch.no_grad():
        exact = tiny_model(**WIDE).transformer(ids).last_hidden_state
        outputs = [load_model(tmp_path / name, dtype="float32")[0].transformer(ids) for name in ("plain", "calibrated")]
    rounded, better = ((output.last_hidden_state - exact).norm() for output in outputs)
    assert better < 0.9 * rounded


@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_every_matrix_is_calibrated_on_what_the_rounded_ones_before_it_give(text, tmp_path, positions):
    """In the finished copy, the inputs of a matrix are those that it was rounded for."""
    source = save_tiny(tmp_path / "source", **WIDE, position_embedding_type=positions)
    errors = quantize(source, tmp_path / "copy", calibration=text, calibration_tokens=1024)
    original = dict(tiny_model(**WIDE, position_embedding_type=positions).named_modules())
    copy, _ = load_model(tmp_path / "copy", dtype="float32", device="cpu")
    inputs: dict[str, torch.Tensor] = {}
    for name, module in copy.named_modules():
        if name in errors and ".h." in name:
            module.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        copy(calibration_rows(text, byte_tokenizer(), copy.config, 1024))
    assert len(inputs) == 10
    for name, x in inputs.items():
        before, after = original[name].weight, copy.get_submodule(name).weight
        measured = ((x @ (after - before)).norm() / (x @ before).norm()).item()
        assert errors[name].outputs == pytest.approx(measured, rel=0.01), name


def test_what_surrounds_the_weights_is_kept(wide, tmp_path):
    shutil.copytree(wide, tmp_path / "wide")
    change_tensors(tmp_path / "wide", lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    set_config(tmp_path / "wide", auto_map={"AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel"}, dtype="bfloat16")
    (tmp_path / "wide/generation_config.json").write_text('{"eos_token_id": 7}')
    quantize(tmp_path / "wide", tmp_path / "copy")
    assert (tmp_path / "copy/generation_config.json").read_text() == '{"eos_token_id": 7}'
    config = json.loads((tmp_path / "copy/config.json").read_text())
    assert "auto_map" not in config  # names code that does not come along
    assert (config["dtype"], config["n_inner"]) == ("bfloat16", 150)
    stored = read_header(tmp_path / "copy/model.safetensors")
    assert stored["transformer.relative_pe.slopes"].dtype == "BF16"  # as released
    assert stored["transformer.ln_f.weight"].dtype == "F32"


def test_forms_of_a_checkpoint_give_the_same(wide, tmp_path):
    quantize(wide, tmp_path / "one")
    expected = (tmp_path / "one" / "model.safetensors").read_bytes()
    shutil.copytree(wide, tmp_path / "pickled")
    pickle_tensors(tmp_path / "pickled")
    tiny_model(**WIDE).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path / "sharded")
    for name in ("pickled", "sharded"):
        quantize(tmp_path / name, tmp_path / f"{name}-4")
        assert (tmp_path / f"{name}-4" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 3}, "bits is 3, not one of 4, 8"),
        ({"group_size": 32}, "group_size is 32, not one of 64, 128"),
        ({"table_bits": 2}, "table_bits is 2, not one of 4, 8"),
        ({"calibration": "missing.txt"}, "missing.txt cannot be read"),
    ],
)
def test_impossible_options_are_refused(wide, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem) as error:
        quantize(wide, tmp_path / "copy", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_calibration_rows_are_of_all_of_a_text(tmp_path):
    """Rows come from all parts of the text even if one piece of it has many rows (short rows or long tokens)."""
    lines = [f"line {number}\n" for number in range(20_000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    config = tiny_model(n_positions=256).config
    rows = calibration_rows(tmp_path / "text.txt", byte_tokenizer(), config, 8 * 256)
    assert rows.shape == (8, 256)
    numbers = [int(re.findall(r"line (\d+)\n", str(byte_tokenizer().decode(row)))[0]) for row in rows.tolist()]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 18_000
    steps = np.diff(numbers)
    assert steps.min() > 1_000


@pytest.mark.slow
def test_two_runs_to_one_place_do_not_mix(wide, tmp_path):
    """The slower run finds the folder of the other and does not change it."""
    slower = whole_folder(tmp_path / "copy")
    partial = slower.__enter__()
    (partial / "half").touch()
    assert subprocess.run([sys.executable, "-m", "btlm", "quantize", wide, tmp_path / "copy"]).returncode == 0
    assert partial.exists()
    with pytest.raises(OSError, match="not empty"):
        slower.__exit__(None, None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert not (tmp_path / "copy" / "half").exists()


@pytest.mark.parametrize("names", [("transformer.relative_pe.slopes",), None])
def test_fp64_is_rounded_too(wide, tmp_path, names):
    shutil.copytree(wide, tmp_path / "wide")
    quantize(wide, tmp_path / "expected")
    change_tensors(
        tmp_path / "wide",
        lambda tensors: {name: t.double() if names is None or name in names else t for name, t in tensors.items()},
    )
    quantize(tmp_path / "wide", tmp_path / "copy")
    expected, copied = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "copy"))
    assert all(torch.equal(tensor.float(), copied[name].float()) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_causality_buffers_of_old_checkpoints_are_passed_over(wide, tmp_path, dtype):
    shutil.copytree(wide, tmp_path / "old")
    quantize(wide, tmp_path / "expected")
    buffer = torch.ones(1, 1, 8, 8).to(dtype)
    change_tensors(tmp_path / "old", lambda tensors: {**tensors, "transformer.h.0.attn.bias": buffer})
    quantize(tmp_path / "old", tmp_path / "copy")
    expected, copied = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "copy"))
    assert expected == copied
    scores = [Engine.open(folder, kernels="torch").score(IDS) for folder in (wide, tmp_path / "old")]
    assert np.array_equal(scores[0], scores[1])


def test_what_cannot_be_quantized_is_refused_before_any_work(wide, checkpoint, tmp_path):
    def refusal(source, **options):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            quantize(source, tmp_path / "copy", **options)
        assert not (tmp_path / "copy").exists()
        return str(error.value)

    assert "n_embd, which is 32" in refusal(checkpoint)
    quantize(wide, tmp_path / "once")
    assert "is quantized already (4 bits, groups of 128)" in refusal(tmp_path / "once")
    shutil.copytree(wide, tmp_path / "cut")
    cut(tmp_path / "cut" / "model.safetensors", 0.9)
    assert "damaged or cut short" in refusal(tmp_path / "cut")
    shutil.copytree(wide, tmp_path / "other")
    set_config(tmp_path / "other", model_type="llama")
    assert "'llama'" in refusal(tmp_path / "other")
    shutil.copytree(wide, tmp_path / "both")
    set_config(tmp_path / "both", model_type="gpt2")
    assert "GPT-2 has no mup_width_scale" in refusal(tmp_path / "both")
    shutil.copytree(wide, tmp_path / "shape")
    set_config(tmp_path / "shape", n_inner=140)
    assert "do not fit its config.json" in refusal(tmp_path / "shape")


def test_a_power_cut_leaves_the_whole_folder_or_none(wide, tmp_path, power_cut):
    quantize(wide, tmp_path / "copy")
    assert power_cut.renamed == [tmp_path / "copy"]
    assert power_cut.lost == []


def test_a_folder_that_exists_is_left_alone(wide, tmp_path):
    (tmp_path / "kept").write_text("something")
    with pytest.raises(ValueError, match="kept exists"):
        quantize(wide, tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "something"


def test_a_folder_that_another_command_writes_is_left_alone(wide, tmp_path):
    with locked(tmp_path / "copy"), pytest.raises(ValueError, match="copy is being written by process"):
        quantize(wide, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_refused_with_the_numbers(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match=r"copy takes 8\.\d MB, and .* has 1\.0 MB free; make room"):
        quantize(wide, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("btlm.convert.quantize.pack_scale", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        quantize(wide, tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("sent", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_run_that_is_told_to_stop_takes_its_files_away(wide, tmp_path, sent, status):
    with start_slow_run(tmp_path / "copy", wide) as run:
        assert any(tmp_path.iterdir())
        run.send_signal(sent)
        assert run.wait(60) == status
    assert not any(tmp_path.iterdir())


def test_a_killed_run_leaves_no_folder_and_the_next_one_ends_well(wide, tmp_path):
    with start_slow_run(tmp_path / "copy", wide) as run:
        run.kill()
    assert not (tmp_path / "copy").exists()
    quantize(wide, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]["bits"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
