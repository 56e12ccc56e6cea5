"""The tests read files with the `gguf` library and run them in a second implementation of llama.cpp's `jais`."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from btlm.checkpoint import load_model
from btlm.checkpoint.locate import BUNDLED_MODEL
from btlm.convert import gguf as module
from btlm.convert.gguf import TYPES, export_gguf
from btlm.files import locked
from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.alibi import alibi_slopes
from btlm.model.architecture_btlm import Quantization
from btlm.model.storage_btlm import pack, pack_scale, stored_matrices
from tests.checkpoint.tiny import TINY, change_tensors, cut, pickle_tensors, set_config

END = "<|endoftext|>"
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
ALPHABET = sorted(ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate([*ALPHABET, *("".join(pair) for pair in MERGES), END])}
NUM_UNUSED = 5
SHAPE = {**TINY, "vocab_size": len(VOCABULARY) + NUM_UNUSED, "bos_token_id": 259, "eos_token_id": 259}
TOKENS = torch.tensor([[5, 9, 200, 31, 7, 256, 258, 0, 0, 259, 17, 40]])


def gguf_model(**overrides):
    """A model without zero biases and without norms of one, so that a scale that skips them changes the logits."""
    torch.manual_seed(0)
    model = BTLMLMHeadModel(BTLMConfig(**{**SHAPE, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def gguf_tokenizer(merges=MERGES):
    return GPT2Tokenizer(vocab=VOCABULARY, merges=merges, bos_token=END, eos_token=END, unk_token=END)


def save(folder, **overrides):
    gguf_model(**overrides).save_pretrained(folder)
    gguf_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("gguf"))


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def message(model, output, kind="F16"):
    """The message of an export that fails; it has to be one line, and no file may be left behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests match the message
        export_gguf(str(model), output, type=kind)
    assert "\n" not in str(error.value)
    assert sorted(output.parent.iterdir()) == before
    return str(error.value)


# A second implementation of what llama.cpp does with such a file (src/models/jais.cpp), in fp64


def llama_cpp_slopes(n_head, max_bias):
    """The slopes of llama.cpp's softmax (``ggml_compute_forward_soft_max``)."""
    n_head_log2 = 1 << int(np.floor(np.log2(n_head)))
    m0, m1 = 2.0 ** (-max_bias / n_head_log2), 2.0 ** (-(max_bias / 2.0) / n_head_log2)
    return [m0 ** (h + 1) if h < n_head_log2 else m1 ** (2 * (h - n_head_log2) + 1) for h in range(n_head)]


class Jais:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        assert all(tuple(t.shape[::-1]) == self.tensors[t.name].shape for t in reader.tensors)

    def __getitem__(self, key):
        return self.fields[f"jais.{key}"]

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(variance + self["attention.layer_norm_epsilon"])
        return normed * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def logits(self, tokens):
        n_head = self["attention.head_count"]
        slopes = np.array(llama_cpp_slopes(n_head, self["attention.max_alibi_bias"]))
        x = self.tensors["token_embd.weight"][tokens]
        num_tokens, width = x.shape
        head_dim = width // n_head
        distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
        bias = np.where(distance < 0, -np.inf, -slopes[:, None, None] * np.abs(distance))
        for i in range(self["block_count"]):
            name = f"blk.{i}"
            qkv = self.linear(self.norm(x, f"{name}.attn_norm"), f"{name}.attn_qkv")
            q, k, v = (
                part.reshape(num_tokens, n_head, head_dim).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=-1)
            )
            scores = q @ k.transpose(0, 2, 1) / head_dim + bias
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (weights / weights.sum(-1, keepdims=True)) @ v
            x = x + self.linear(attended.transpose(1, 0, 2).reshape(num_tokens, width), f"{name}.attn_output")
            normed = self.norm(x, f"{name}.ffn_norm")
            gate = self.linear(normed, f"{name}.ffn_gate")
            inner = gate / (1 + np.exp(-gate)) * self.linear(normed, f"{name}.ffn_up")
            x = x + self.linear(inner, f"{name}.ffn_down")
        return self.norm(x, "output_norm") @ self.tensors["output.weight"].T


def ours(model):
    with torch.no_grad():
        return model(TOKENS).logits[0].double().numpy()


def error(path, model):
    """The largest error, relative to the largest logit."""
    expected = ours(model)
    return np.abs(Jais(path).logits(TOKENS[0].numpy()) - expected).max() / np.abs(expected).max()


# What the file holds


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"mup_scale_qk_dot_by_d": False},
        {"scale_attn_weights": False, "initializer_range": 0.1},
        {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"tie_word_embeddings": False},
        {"n_head": 6, "n_embd": 48},
        {"n_head": 1, "n_inner": 64},
        {"n_embd": 256, "n_head": 2, "n_layer": 1, "initializer_range": 0.1, "layer_norm_epsilon": 1e-2},
    ],
    ids=["mup", "standard-scale", "no-scale", "by-depth", "untied", "six-heads", "one-head", "wide"],
)
def test_f32_files_compute_the_logits_of_the_model(tmp_path, overrides):
    folder = save(tmp_path / "model", **overrides)
    export_gguf(str(folder), tmp_path / "model.gguf", type="F32")
    assert error(tmp_path / "model.gguf", gguf_model(**overrides)) < 2e-6


@pytest.mark.parametrize(("kind", "limit"), [("F16", 1e-3), ("Q8_0", 3e-2), ("Q4_0", 0.5)])
def test_other_types_come_close(checkpoint, tmp_path, kind, limit):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type=kind)
    assert limit / 100 < error(tmp_path / "model.gguf", gguf_model()) < limit


@pytest.mark.parametrize("n_head", range(1, 130))
def test_slopes_are_those_of_llama_cpp_for_any_number_of_heads(n_head):
    np.testing.assert_allclose(alibi_slopes(n_head), llama_cpp_slopes(n_head, 8.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "matrices", "head", "file_type"),
    [("F16", "F16", "F32", 1), ("Q8_0", "Q8_0", "Q8_0", 7), ("Q4_0", "Q4_0", "Q8_0", 2)],
)
def test_matrices_are_of_the_type_and_the_rest_is_f32(checkpoint, tmp_path, kind, matrices, head, file_type):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type=kind)
    file = Jais(tmp_path / "model.gguf")
    for name, stored in file.kinds.items():
        expected = "F32" if name.endswith(".bias") or "norm" in name else head if name == "output.weight" else matrices
        assert stored == expected, name
    assert file.fields["general.file_type"] == file_type
    assert file.fields.get("general.quantization_version") == (2 if kind.startswith("Q") else None)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_weights_are_as_near_as_the_type_allows(checkpoint, tmp_path, kind):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type=kind)
    export_gguf(str(checkpoint), tmp_path / "exact.gguf", type="F32")
    stored, exact = Jais(tmp_path / "model.gguf").tensors, Jais(tmp_path / "exact.gguf").tensors
    assert list(stored) == list(exact)
    for name in (name for name in exact if exact[name].ndim == 2 and name != "output.weight"):
        blocks = exact[name].reshape(-1, 32)
        largest = np.abs(blocks).max(-1, keepdims=True)
        # Half a step, and the rounding of the step to F16. Q4_0 puts the largest weight at -8 steps and has no +8.
        step = {"F16": 2.0**-11, "Q8_0": (0.5 + 127 * 2.0**-11) / 127, "Q4_0": (1 + 8 * 2.0**-11) / 8}[kind] * largest
        assert (np.abs(stored[name].reshape(-1, 32) - blocks) <= step + 1e-7).all(), name


@pytest.mark.parametrize(
    ("overrides", "padded"), [({}, 64), ({"n_inner": 64}, 64), ({"n_embd": 256, "n_inner": 683, "n_layer": 1}, 768)]
)
def test_the_feed_forward_width_is_padded_with_zeros(tmp_path, overrides, padded):
    folder = save(tmp_path / "model", **overrides)
    export_gguf(str(folder), tmp_path / "model.gguf", type="Q4_0")
    file, inner = Jais(tmp_path / "model.gguf"), {**SHAPE, **overrides}["n_inner"]
    assert file["feed_forward_length"] == padded
    for name in ("ffn_up.weight", "ffn_gate.weight", "ffn_up.bias", "ffn_gate.bias"):
        tensor = file.tensors[f"blk.0.{name}"]
        assert len(tensor) == padded
        assert not tensor[inner:].any()
        assert tensor[:inner].any(axis=-1).all()
    assert not file.tensors["blk.0.ffn_down.weight"][:, inner:].any()


def test_sizes_are_those_of_the_configuration(checkpoint, tmp_path):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type="F16")
    file = Jais(tmp_path / "model.gguf")
    assert file.fields["general.architecture"] == "jais"
    assert file.fields["general.name"] == checkpoint.name
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 32, "attention.head_count": 4}
    assert {key: file[key] for key in sizes} == sizes
    assert file["attention.max_alibi_bias"] == 8.0


@pytest.mark.parametrize(("folder", "name"), [("runs/tiny/model", "tiny"), ("btlm-4bit", "btlm-4bit")])
def test_the_model_is_called_by_its_run(checkpoint, tmp_path, folder, name):
    shutil.copytree(checkpoint, tmp_path / folder)
    export_gguf(str(tmp_path / folder), tmp_path / "model.gguf", type="Q8_0")
    assert Jais(tmp_path / "model.gguf").fields["general.name"] == name


def test_the_vocabulary_is_that_of_the_tokenizer(checkpoint, tmp_path):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type="F16")
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in Jais(tmp_path / "model.gguf").fields.items()}
    assert (fields["model"], fields["pre"]) == ("gpt2", "gpt-2")
    assert fields["token_type"] == [1] * (len(VOCABULARY) - 1) + [3] + [5] * NUM_UNUSED
    assert len(set(fields["tokens"])) == SHAPE["vocab_size"]
    assert fields["bos_token_id"] == fields["eos_token_id"] == VOCABULARY[END]
    assert not fields["add_bos_token"]
    assert not fields["add_eos_token"]
    vocabulary = {token: i for i, token in enumerate(fields["tokens"][: len(VOCABULARY)])}
    rebuilt = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in fields["merges"]]))
    rebuilt.pre_tokenizer = ByteLevel(add_prefix_space=False)
    text = "the theatre, he said: été\n\n  the end 東"
    assert rebuilt.encode(text).ids == load_model(checkpoint)[1](text).input_ids
    assert VOCABULARY["Ġthe"] in rebuilt.encode(text).ids


def test_tokens_that_are_not_special_are_the_users(copy, tmp_path):
    tokenizer = gguf_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.save_pretrained(copy)
    export_gguf(str(copy), tmp_path / "model.gguf", type="F16")
    fields = Jais(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"][260] == "<tool>"
    assert fields["tokenizer.ggml.token_type"][259:262] == [3, 4, 5]


def test_several_ends_are_named_the_tokenizers_first(copy, tmp_path):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 259, 10]}))
    export_gguf(str(copy), tmp_path / "model.gguf", type="F16")
    fields = Jais(tmp_path / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [259, 3, 10]


def test_a_beginning_of_its_own_is_named(copy, tmp_path):
    set_config(copy, bos_token_id=5)
    export_gguf(str(copy), tmp_path / "model.gguf", type="F16")
    fields = Jais(tmp_path / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")] == [5, 259]


def test_a_note_tells_size_and_padding(checkpoint, tmp_path, capsys):
    export_gguf(str(checkpoint), tmp_path / "new" / "model.gguf", type="Q8_0")
    size = (tmp_path / "new" / "model.gguf").stat().st_size
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{size / 1e6:,.1f} MB, matrices in Q8_0, feed-forward width 36 padded to 64" in told.err


# Kinds of checkpoints


def shards(folder):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def as_stored(folder):
    """Also store the head of a tied model, as in the released checkpoint, and the buffers of old code."""
    head = {"lm_head.weight": gguf_model().lm_head.weight.detach().clone()}
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    change_tensors(folder, lambda tensors: {**tensors, **head, **buffers})


@pytest.mark.parametrize("change", [lambda _: None, shards, pickle_tensors, as_stored])
def test_plain_checkpoints_are_read_tensor_by_tensor(copy, checkpoint, tmp_path, monkeypatch, change):
    change(copy)
    monkeypatch.setattr(module, "load_model", None)
    export_gguf(str(copy), tmp_path / "model.gguf", type="F32")
    assert error(tmp_path / "model.gguf", gguf_model()) < 2e-6


def without_prefix(folder):
    change_tensors(
        folder, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    )


@pytest.mark.parametrize(
    "change", [without_prefix, lambda folder: pickle_tensors(folder, _use_new_zipfile_serialization=False)]
)
def test_other_checkpoints_are_what_they_load_as(copy, tmp_path, change):
    change(copy)
    export_gguf(str(copy), tmp_path / "model.gguf", type="F32")
    assert error(tmp_path / "model.gguf", load_model(copy)[0]) < 2e-6


def test_a_head_that_contradicts_the_configuration_is_refused(copy, tmp_path):
    change_tensors(copy, lambda tensors: {**tensors, "lm_head.weight": torch.ones(SHAPE["vocab_size"], 32)})
    assert "lm_head.weight differs from transformer.wte.weight" in message(copy, tmp_path / "model.gguf")


def quantize(folder):
    """Quantize a model of width 64 to eight bits in groups of 64."""
    model = gguf_model(n_embd=64)
    storage: dict[str, Any] = {"quant_method": "btlm", "bits": 8, "group_size": 64, "table_bits": 8}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, stored in stored_matrices(model.config.architecture, Quantization(8, 64, 8)).items():
        weight = state[f"{name}.weight"]
        weight = weight if "wte" in name else weight.T
        padded = torch.zeros(stored.padded_outputs, stored.padded_inputs)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        groups = padded.view(len(padded), -1, 64)
        scale = (groups.abs().amax(-1) / 127).bfloat16().float()
        q = (groups / scale.clamp(min=1e-9)[..., None]).round().clamp(-127, 127) + 128
        state[f"{name}.weight"] = torch.from_numpy(pack(q.to(torch.uint8).view(padded.shape).numpy(), 8))
        state[f"{name}.weight_scale"] = torch.from_numpy(pack_scale(scale.numpy())).view(torch.bfloat16)
        if f"{name}.bias" in state:
            bias = state[f"{name}.bias"]
            state[f"{name}.bias"] = torch.nn.functional.pad(bias, (0, stored.padded_outputs - len(bias)))
    model.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=storage)


def test_quantized_folders_are_decoded_and_a_note_says_so(copy, tmp_path, capsys):
    quantize(copy)
    export_gguf(str(copy), tmp_path / "model.gguf", type="F32")
    assert "decoded" in capsys.readouterr().err
    assert error(tmp_path / "model.gguf", load_model(copy)[0]) < 2e-6
    assert 1e-4 < error(tmp_path / "model.gguf", gguf_model(n_embd=64)) < 5e-2


# Errors


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "llama"}, ["not a BTLM checkpoint", "'llama'"]),
        ({"model_type": "gpt2"}, ["GPT-2 has no mup_width_scale", "'btlm': change it in config.json"]),
        ({"position_embedding_type": "learned"}, ["position_embedding_type is 'learned'", "ALiBi"]),
        ({"activation_function": "gelu"}, ["activation_function is 'gelu'", "swiglu"]),
        ({"alibi_scaling": {"type": "linear", "factor": 2.0}}, ["'factor': 2.0", "null in config.json"]),
        ({"alibi_scaling": {"type": "linear", "train_seq_len": 64}}, ["'train_seq_len': 64", "null in config.json"]),
        ({"n_layer": 3}, ["transformer.h.2.", "is missing"]),
        ({"n_inner": 40}, ["c_fc.bias is [36] where config.json makes it [40]"]),
        ({"vocab_size": 259, "eos_token_id": 0, "bos_token_id": 0}, ["260 tokens", "259"]),
    ],
)
def test_models_that_cannot_be_exported(copy, tmp_path, values, expected):
    set_config(copy, **values)
    told = message(copy, tmp_path / "model.gguf")
    assert all(part in told for part in expected), told


def test_what_the_architecture_cannot_compute_is_told_before_weights_are_looked_at(copy, tmp_path):
    set_config(copy, activation_function="relu")
    (copy / "model.safetensors").unlink()
    assert "relu" in message(copy, tmp_path / "model.gguf")


def test_a_width_that_is_no_whole_blocks(tmp_path):
    folder = save(tmp_path / "model", n_embd=40)
    for kind in ("Q8_0", "Q4_0"):
        told = message(folder, tmp_path / "model.gguf", kind)
        assert "n_embd is 40" in told
        assert f"{kind} stores rows in blocks of 32" in told
    export_gguf(str(folder), tmp_path / "model.gguf", type="F16")


@pytest.mark.parametrize("kind", ["q4_0", "Q4_K_M", ""])
def test_unknown_types(checkpoint, tmp_path, kind):
    told = message(checkpoint, tmp_path / "model.gguf", kind)
    assert repr(kind) in told
    assert ", ".join(TYPES) in told


def test_a_file_that_exists_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "model.gguf").write_text("kept")
    assert "model.gguf exists" in message(checkpoint, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "kept"


def test_a_file_that_another_command_writes_is_left_alone(checkpoint, tmp_path):
    with locked(tmp_path / "model.gguf"):
        assert "model.gguf is being written by process" in message(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0.5, 0.99])
@pytest.mark.parametrize("pickled", [False, True])
def test_files_that_are_cut_short(copy, tmp_path, keep, pickled):
    file = pickle_tensors(copy) if pickled else copy / "model.safetensors"
    cut(file, keep)
    assert "damaged" in message(copy, tmp_path / "model.gguf")


def test_a_missing_shard(copy, tmp_path):
    shards(copy)
    (copy / "model-1.safetensors").unlink()
    assert "lacks model-1.safetensors" in message(copy, tmp_path / "model.gguf")


def test_a_disk_that_is_full(checkpoint, tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**6, used=9 * 10**5, free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = message(checkpoint, tmp_path / "model.gguf")
    assert f"{tmp_path} has 0.1 MB free" in told
    assert "make room" in told


def test_the_space_that_is_asked_for_is_enough(checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "require_space", lambda _, needed, remedy: asked.append(needed))
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type="Q8_0")
    size = (tmp_path / "model.gguf").stat().st_size
    assert size <= asked[0] < size + 100 * SHAPE["vocab_size"]


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(1e5, "F16", ["reaches 100000", "at most 65504", "another type"]), (np.nan, "Q8_0", ["holds NaN"])],
)
def test_values_that_the_type_cannot_hold(copy, tmp_path, value, kind, expected):
    name = "transformer.h.1.mlp.c_fc.weight"

    def change(tensors):
        tensors[name][3, 4] = value
        return tensors

    change_tensors(copy, change)
    told = message(copy, tmp_path / "model.gguf", kind)
    assert all(part in told for part in [name, *expected]), told


@pytest.mark.parametrize("ends", [[1, 2, 3, 4]])
def test_more_ends_than_the_format_names(copy, tmp_path, ends):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "4 tokens that end a text" in message(copy, tmp_path / "model.gguf")


def words():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, END: 1}, unk_token="a"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.mark.parametrize(
    ("tokenizer", "expected"), [(words, "WordLevel"), (lambda: gguf_tokenizer([]), "has no merges")]
)
def test_tokenizers_that_llama_cpp_would_not_follow(copy, tmp_path, tokenizer, expected):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    tokenizer().save_pretrained(copy)
    told = message(copy, tmp_path / "model.gguf")
    assert expected in told
    assert "GPT-2" in told


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda t: t["pre_tokenizer"].update(use_regex=False), "pre-tokenizer"),
        (lambda t: t["model"]["vocab"].update({"new": 400}), "id 400"),
    ],
)
def test_tokenizers_that_are_almost_right(checkpoint, change, expected):
    tokenizer = load_model(checkpoint)[1]
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    assert module._tokenizer_problem(described, tokenizer, SHAPE["vocab_size"]) is None
    change(described)
    problem = module._tokenizer_problem(described, tokenizer, SHAPE["vocab_size"])
    assert problem is not None
    assert expected in problem


def test_the_library_is_missed_by_its_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as error:
        export_gguf(str(checkpoint), tmp_path / "model.gguf", type="F16")
    assert error.value.name == "gguf"


@pytest.mark.parametrize("problem", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_no_file(checkpoint, tmp_path, monkeypatch, problem):
    encode, calls = module._encode, []

    def fail(*arguments):
        calls.append(arguments)
        assert any(tmp_path.iterdir())  # the output is partly written
        if len(calls) == 7:
            raise problem
        return encode(*arguments)

    monkeypatch.setattr(module, "_encode", fail)
    with pytest.raises(type(problem)):
        export_gguf(str(checkpoint), tmp_path / "model.gguf", type="F16")
    assert not any(tmp_path.iterdir())


def test_a_power_cut_leaves_the_whole_file_or_none(checkpoint, tmp_path, power_cut):
    export_gguf(str(checkpoint), tmp_path / "model.gguf", type="F16")
    assert power_cut.renamed == [tmp_path / "model.gguf"]
    assert power_cut.lost == []


# Comparison with llama.cpp itself


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model in llama.cpp, in F16."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("llama") / "btlm-tiny.gguf"
    export_gguf(str(BUNDLED_MODEL), path, type="F16")
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)


PARAGRAPHS = [path.read_text()[:1500] for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("text", [*PARAGRAPHS, "Être  ou\n\n\tne pas être'll 東京 123 🙂   "])
def test_llama_cpp_gives_our_tokens_and_logits(bundled, text):
    model, tokenizer = load_model(BUNDLED_MODEL, dtype="float32", device="cpu")
    tokens = tokenizer(text).input_ids
    assert bundled.tokenize(text.encode(), add_bos=True, special=True) == tokens
    bundled.reset()
    bundled.eval(tokens)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(bundled.scores[: len(tokens)] - expected).max() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["She looked at him and", "The capital of", "fn main() {"])
def test_llama_cpp_writes_our_greedy_text(bundled, prompt):
    loaded, tokenizer = load_model(BUNDLED_MODEL, dtype="float32", device="cpu")
    model: Any = loaded
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(tokens, max_new_tokens=64, do_sample=False)[0].tolist()
    bundled.reset()
    written = tokens[0].tolist()
    for seen, upto in pairwise([0, *range(len(written), len(written) + 64)]):
        bundled.eval(written[seen:upto])
        written.append(int(bundled.scores[upto - 1].argmax()))
    assert written[: len(expected)] == expected
