"""Folders of adapters in every command, and merged."""

import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btlm.checkpoint import Checkpoint, load_model
from btlm.checkpoint.adapter import merge, num_adapter_weights, open_checkpoint
from btlm.cli import main
from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.evaluate.bench import run_bench
from btlm.generate import TextGenerator
from btlm.generate.continue_prompt import run_generate
from btlm.model.architecture_btlm import END_OF_TEXT_ID, VOCAB_SIZE
from btlm.plan.info import run_info
from tests.checkpoint.tiny import TINY, save_tiny, tiny_model

peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
SHORT = GenerationOptions(max_new_tokens=6)
IDS = torch.arange(30)[None]


def save_adapter(folder: Path, base: Path, name: str | None = None, **lora: Any) -> Any:
    """Save random adapters; returns the adapted model."""
    model, _ = load_model(base)
    config = peft.LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **lora})
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name_, parameter in adapted.named_parameters():
            if "lora_B" in name_:
                parameter.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), n_embd=64, n_inner=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory, base):
    """A folder of adapters that names its base, and the adapted model."""
    folder = tmp_path_factory.mktemp("run") / "model"
    return folder, save_adapter(folder, base, str(base))


@pytest.fixture
def adapter(made):
    return made[0]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, in which nothing must stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    gc.collect()
    assert list(folder.iterdir()) == []


@torch.no_grad()
def test_a_merged_model_is_plain_and_computes_as_the_adapted_one(made, tmp_path, capsys):
    adapter, adapted = made
    merge(adapter, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    model, tokenizer = load_model(tmp_path / "merged")
    torch.testing.assert_close(model(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5)
    assert len(tokenizer) == TINY["vocab_size"]
    assert f"with the adapters of {adapter}\n" in capsys.readouterr().err


@torch.no_grad()
def test_adapters_of_a_quantized_model(base, tmp_path):
    quantize(base, tmp_path / "few", group_size=64)
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "few", str(tmp_path / "few"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert Checkpoint.open(tmp_path / "merged").architecture.quantization is None
    torch.testing.assert_close(
        load_model(tmp_path / "merged")[0](IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-5
    )
    quantize(tmp_path / "adapter", tmp_path / "again", group_size=64)
    assert Checkpoint.open(tmp_path / "again").architecture.quantization is not None


def test_every_command_takes_adapters(made, base, tmp_path, temporary, capsys):
    adapter, adapted = made
    merge(adapter, tmp_path / "merged")
    capsys.readouterr()
    run_generate(["Once"], model=tmp_path / "merged", options=SHORT)
    expected = capsys.readouterr().out
    run_generate(["Once"], model=base, options=SHORT)
    assert capsys.readouterr().out != expected
    for engine in ("btlm", "transformers"):
        run_generate(["Once"], model=adapter, options=SHORT, engine=engine)
        out, err = capsys.readouterr()
        assert out == expected
        assert f"merging the adapters of {adapter}" in err
    assert "Once" + TextGenerator.open(adapter).generate("Once", SHORT) + "\n" == expected

    run_info(adapter, as_json=True)
    info = json.loads(capsys.readouterr().out)
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert info["parameters"]["adapters"] == num_adapter_weights(adapter) == adapters
    assert info["flops_per_token"][0]["training"] < 3 * info["flops_per_token"][0]["forward"]
    run_info(adapter)
    assert f"{adapters:,} in adapters" in capsys.readouterr().out

    for model, name in ((adapter, "a"), (tmp_path / "merged", "b")):
        quantize(model, tmp_path / name, group_size=64)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    (row,) = run_bench([str(adapter)], contexts=[32], new_tokens=8, threads=1)
    assert (row["model"], row["dtype"]) == (adapter.parent.name, "float32")
    assert "in adapters" not in capsys.readouterr().out


def test_llama_cpp_gets_adapters(tmp_path):
    pytest.importorskip("gguf")
    adapter, vocabulary = tmp_path / "adapter", {"vocab_size": VOCAB_SIZE, "eos_token_id": END_OF_TEXT_ID}
    tiny_model(**vocabulary).save_pretrained(tmp_path / "base")  # with GPT-2's tokenizer
    save_adapter(adapter, tmp_path / "base", str(tmp_path / "base"))
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    contents = []
    for model in ("base", "adapter", "merged"):
        assert main(["export-gguf", str(tmp_path / model), str(tmp_path / f"{model}.gguf"), "--type", "F32"]) == 0
        contents.append((tmp_path / f"{model}.gguf").read_bytes()[-100_000:])  # matrices
    assert contents[0] != contents[1] == contents[2]


def test_the_engine_runs_on_the_merged_weights_as_long_as_the_checkpoint_is_there(made, temporary):
    adapter, adapted = made
    checkpoint = open_checkpoint(adapter)
    (folder,) = temporary.iterdir()
    engine = Engine.open(checkpoint, kernels="torch")
    with torch.no_grad():
        expected = adapted(IDS).logits[0].log_softmax(-1)
    scores = engine.score(IDS[0].tolist())
    assert scores == pytest.approx(expected[range(29), IDS[0, 1:]].numpy(), abs=2e-4)
    del checkpoint, engine
    gc.collect()
    assert not folder.exists()


def test_another_base_can_be_named(base, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", base)
    run_generate(["Once"], model=tmp_path / "adapter", base=base, options=SHORT)
    text = capsys.readouterr().out
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "./gone"}))
    run_generate(["Once"], model=tmp_path / "adapter", base=base, options=SHORT)
    assert capsys.readouterr().out == text


# Mistakes


@pytest.mark.parametrize("command", ["generate x --model", "info", "quantize", "export-gguf", "bench", "merge"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_model_name_or_path": None}, "does not name the model that the adapters change; give it as --base."),
        ({"base_model_name_or_path": "./gone"}, "holds adapters of './gone', which cannot be used (There is no folder"),
        (None, "adapter_config.json cannot be read ("),
    ],
)
def test_a_base_that_is_not_there_is_one_line(command, change, says, adapter, tmp_path, capsys):
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text("{" if change is None else json.dumps({**stored, **change}))
    outputs = [str(tmp_path / "out")] if command.split()[0] in ("quantize", "export-gguf", "merge") else []
    assert (
        main([*command.split(), str(folder), *outputs, *(["--group-size", "64"] if command == "quantize" else [])]) == 2
    )
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("btlm: error: ")
    assert says in last
    assert not (tmp_path / "out").exists()


def damage(adapter: Path, how: str) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name in tensors if "lora_A" in name)
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif how == "nan":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100])
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["missing", "shape", "nan", "cut", "gone"])
def test_adapters_that_do_not_fit_are_one_line_and_leave_nothing(adapter, tmp_path, how):
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    damage(folder, how)
    for use in (lambda: merge(folder, tmp_path / "out"), lambda: open_checkpoint(folder)):
        with pytest.raises(ValueError, match=r"The adapters of .*copy cannot be merged into .* \(") as error:
            use()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter(base, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json, so it holds no adapters"):
        merge(base, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists; give a new folder"):
        merge(adapter, tmp_path / "there")
    for model in (base, Checkpoint.open(base)):
        with pytest.raises(ValueError, match=r"base is for folders of adapters, and .* is not one"):
            open_checkpoint(model, base)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_without_weights_to_merge(base, tmp_path, kind):
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_model(base)[0], config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(tmp_path / "adapter", tmp_path / "out")
