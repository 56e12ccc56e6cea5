import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from btlm.checkpoint import load_config, load_model
from btlm.model.tokenization_btlm import load_tokenizer
from tests.checkpoint.tiny import END, TINY, change_tensors, cut, pickle_tensors, set_config, tiny_model

WTE = "transformer.wte.weight"
TOKENS = torch.tensor([[5, 9, 200, 31, 7]])


def logits(model):
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.float()


def message(call, *args, **options):
    """The message of the ValueError that a call raises; it has to be one line."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests match the message
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Checkpoints that load


def test_every_tensor_is_that_of_the_checkpoint(checkpoint):
    model, tokenizer = load_model(checkpoint, device="cpu")
    assert not model.training
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=0, atol=0)
    assert tokenizer("aé").input_ids == AutoTokenizer.from_pretrained(checkpoint)("aé").input_ids
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END


def shard(folder):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "change",
    [
        pickle_tensors,
        lambda folder: pickle_tensors(folder, _use_new_zipfile_serialization=False),
        shard,
        lambda folder: change_tensors(folder, lambda t: {**t, "lm_head.weight": t[WTE].clone()}),
        lambda folder: change_tensors(
            folder, lambda t: {n: v for n, v in t.items() if n != "transformer.relative_pe.slopes"}
        ),
        lambda folder: change_tensors(
            folder,
            lambda t: {
                **t,
                "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
                "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
            },
        ),
        lambda folder: set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel"}),
        lambda folder: (folder / "generation_config.json").unlink(),
    ],
    ids=["pickle", "old-pickle", "shards", "tied-head-stored", "no-slopes", "causality-buffers", "auto-map", "no-gen"],
)
def test_other_forms_of_the_same_checkpoint_load(copy, change):
    change(copy)
    torch.testing.assert_close(logits(load_model(copy)[0]), logits(tiny_model()), rtol=0, atol=0)


def test_dtype_is_that_of_the_checkpoint_unless_given(copy):
    tiny_model().bfloat16().save_pretrained(copy)
    assert load_model(copy)[0].dtype == torch.bfloat16
    assert load_model(copy, dtype="float32")[0].dtype == torch.float32
    assert load_model(copy, dtype="float16")[0].dtype == torch.float16


def test_load_config_needs_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert load_config(copy).n_embd == TINY["n_embd"]


# Configurations that do not load


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "llama"}, ["not a BTLM checkpoint", "'llama'"]),
        ({"model_type": ...}, ["not a BTLM checkpoint", "no model_type"]),
        ({"n_head": 5, "mup_width_scale": -1}, ["config.json", "n_head is 5", "mup_width_scale is -1"]),
        ({"n_embd": "wide"}, ["n_embd is 'wide'", "whole number"]),
        ({"alibi_scaling": {"type": "linear"}}, ["alibi_scaling", "train_seq_len"]),
        ({"dtype": "float7"}, ["config.json", "float7"]),
        ({"id2label": 4}, ["config.json cannot be used"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["config.json", "quantization_config", "gptq"]),
        ({"quantization_config": {"quant_method": "btlm", "bits": 5}}, ["config.json", "'bits': 5"]),
        ({"vocab_size": 10**12}, ["32,000,000,015,888 parameters", "do not belong together"]),
        ({"vocab_size": 256, "eos_token_id": 0, "bos_token_id": 0}, ["tokenizer", "257 tokens", "256"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight is missing"]),
        ({"n_layer": 3}, ["transformer.h.2.", "is missing", "more"]),
        ({"n_layer": 1}, ["transformer.h.1.", "is not a tensor of BTLM", "more"]),
        ({"n_inner": 40}, ["transformer.h.0.mlp.c_fc.bias is [36] where config.json makes it [40]", "more"]),
        ({"position_embedding_type": "learned"}, ["transformer.wpe.weight is missing"]),
    ],
)
def test_a_configuration_that_cannot_be(copy, values, expected):
    set_config(copy, **values)
    told = message(load_model, copy)
    assert str(copy) in told
    for part in expected:
        assert part in told


@pytest.mark.parametrize("content", ['{"model_type": "btlm",}', "", "\x00", "{" * 100_000])
def test_a_configuration_that_is_no_json(copy, content):
    (copy / "config.json").write_text(content)
    assert f"{copy / 'config.json'} cannot be read as JSON" in message(load_model, copy)


def test_a_configuration_that_is_no_object(copy):
    (copy / "config.json").write_text("[1]")
    assert "not a BTLM checkpoint" in message(load_config, copy)


@pytest.mark.parametrize("end", ["x", [1.5], 257, -1])
def test_an_end_that_is_no_token(copy, end):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert f"eos_token_id is {end!r}" in message(load_model, copy)


@pytest.mark.parametrize("missing", ["mup_width_scale", "mup_output_alpha"])
def test_missing_mup_keys_are_told_once(copy, caplog, missing):
    set_config(copy, **{missing: ...})
    load_model(copy)
    assert [missing in record.getMessage() for record in caplog.records if record.name.startswith("btlm")] == [True]


# Weights that do not load


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in message(load_model, copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: cut(path, 0.5),
        lambda path: cut(path, 0.99),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 1000),
    ],
    ids=["half", "tail", "empty", "garbage"],
)
def test_damaged_safetensors(copy, change):
    change(copy / "model.safetensors")
    assert f"{copy / 'model.safetensors'} is damaged or cut short" in message(load_model, copy)


def test_a_pointer_of_git_lfs(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in message(load_model, copy)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_cut_pickles(copy, zipped, keep):
    cut(pickle_tensors(copy, _use_new_zipfile_serialization=zipped), keep)
    told = message(load_model, copy)
    assert str(copy) in told
    assert "damaged" in told


def test_damaged_pickles(copy):
    file = pickle_tensors(copy)
    file.write_bytes(b"x" * file.stat().st_size)
    assert "damaged" in message(load_model, copy)


class Malicious:
    """Creates a file if it is unpickled without precautions."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def as_torch_file(value, file):
    torch.save({WTE: value, "padding": torch.zeros(40_000)}, file)


def as_plain_pickle(value, file):
    file.write_bytes(pickle.dumps(value) + bytes(40_000))


@pytest.mark.parametrize("write", [as_torch_file, as_plain_pickle])
def test_malicious_pickles_are_not_run(copy, tmp_path, write):
    target = tmp_path / "ran"
    write(Malicious(target), pickle_tensors(copy))
    assert "never run" in message(load_model, copy)
    assert not target.exists()
    # Plain unpickling does run the command.
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()


@pytest.mark.parametrize("value", [[torch.zeros(40_000)], {"a": 1, "padding": torch.zeros(40_000)}])
def test_a_pickle_of_something_else(copy, value):
    torch.save(value, pickle_tensors(copy))
    assert str(copy) in message(load_model, copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.bias"}, "transformer.ln_f.bias is missing"),
        (lambda t: {**t, "transformer.rotary": torch.zeros(3)}, "transformer.rotary is not a tensor of BTLM"),
        (lambda t: {**t, "transformer.ln_f.bias": torch.zeros(3)}, "transformer.ln_f.bias is [3] where"),
    ],
)
def test_tensors_that_do_not_fit(copy, change, expected):
    change_tensors(copy, change)
    told = message(load_model, copy)
    assert "do not fit its config.json" in told
    assert expected in told


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002-of-00002"),
        (lambda folder: cut(folder / "model-00002-of-00002.safetensors", 0.5), "model-00002-of-00002.safetensors is"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json is not a valid index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "'weight_map' is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "index.json is not a valid index"),
    ],
)
def test_shards_that_do_not_load(copy, change, expected):
    shard(copy)
    change(copy)
    assert expected in message(load_model, copy)


# Tokenizers


def test_vocabulary_and_merges_are_a_tokenizer(copy, tmp_path):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (copy / "merges.txt").write_text("")
    (copy / "tokenizer.json").unlink()
    assert load_model(copy)[1]("aé").input_ids == AutoTokenizer.from_pretrained(tmp_path / "copy")("aé").input_ids


def test_a_tokenizer_without_special_tokens_ends_as_the_model_does(copy):
    (copy / "tokenizer_config.json").unlink()
    tokenizer = load_model(copy)[1]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_tokenizer(copy, content):
    (copy / "tokenizer.json").write_text(content)
    assert f"{copy}: its tokenizer cannot be loaded" in message(load_model, copy)


def test_a_folder_without_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    told = message(load_model, copy)
    assert "there is no tokenizer.json" in told
    assert "257" in told


def test_gpt2s_tokenizer_stands_in_for_a_vocabulary_of_its_size(tmp_path):
    tiny_model(vocab_size=50257, bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    tokenizer = load_model(tmp_path)[1]
    assert tokenizer("Hello world").input_ids == load_tokenizer()("Hello world").input_ids
    assert tokenizer.pad_token_id == 50256


# Devices, formats, scaling


@pytest.mark.parametrize("dtype", ["float8", "fp32", "", "torch.float32"])
def test_an_unknown_dtype(checkpoint, dtype):
    told = message(load_model, checkpoint, dtype=dtype)
    assert repr(dtype) in told
    assert "bfloat16" in told


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cpu:x"])
def test_an_unknown_device(checkpoint, device):
    told = message(load_model, checkpoint, device=device)
    assert f"The device {device!r} is unknown" in told


def test_a_device_that_is_not_here(checkpoint):
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    told = message(load_model, checkpoint, device=absent)
    assert f"The device {absent} is not available here" in told
    assert "use cpu" in told


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", None),
        ("dynamic", {"type": "linear", "train_seq_len": 64}),
        ("2", {"type": "linear", "factor": 2.0}),
        (1.5, {"type": "linear", "factor": 1.5}),
    ],
)
def test_context_scaling(checkpoint, scaling, expected):
    assert load_model(checkpoint, context_scaling=scaling)[0].config.alibi_scaling == expected


def test_no_context_scaling_leaves_that_of_the_checkpoint(copy):
    stored = {"type": "linear", "factor": 3.0}
    set_config(copy, alibi_scaling=stored)
    assert load_model(copy)[0].config.alibi_scaling == stored


@pytest.mark.parametrize("scaling", ["1", "0.5", "-2", "nan", "inf", "twice", 1.0])
def test_an_impossible_context_scaling(checkpoint, scaling):
    told = message(load_model, checkpoint, context_scaling=scaling)
    assert f"The context scaling is {scaling}" in told
    assert "dynamic" in told


def test_learned_positions_are_not_scaled(tmp_path, checkpoint):
    tiny_model(position_embedding_type="learned").save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    load_model(tmp_path)
    assert "learned positions" in message(load_model, tmp_path, context_scaling="dynamic")
