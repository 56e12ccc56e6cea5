import json
import math

import numpy as np
import pytest
import torch

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.shape import _QUANTIZATION, Shape
from btlm.errors import NotSupported
from btlm.model import BTLMConfig
from btlm.model.alibi import alibi_slopes
from btlm.model.config_keys_btlm import BITS, GROUP_SIZES
from tests.checkpoint.tiny import END, TINY, set_config, tiny_model

QUANTIZED = {"quant_method": "btlm", "bits": 4, "group_size": 64, "table_bits": 8}


def config(**values):
    return {**BTLMConfig(**TINY).to_dict(), **values}


@pytest.fixture
def no_slow_path(monkeypatch):
    def refuse(*_):
        raise AssertionError("the configuration class was needed")

    monkeypatch.setattr("btlm.checkpoint.config.read_config", refuse)


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_the_model(heads):
    shape = Shape.from_config(config(n_embd=heads * 8, n_head=heads))
    assert torch.equal(torch.from_numpy(shape.slopes), alibi_slopes(heads))
    halved = Shape.from_config(config(n_embd=heads * 8, n_head=heads, alibi_scaling={"type": "linear", "factor": 2.0}))
    assert np.array_equal(halved.slopes, shape.slopes / 2)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": None},
        {"n_layer": 5, "vocab_size": 300, "n_embd": 48},
        {"mup_scale_qk_dot_by_d": False},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_embd": 80, "n_head": 5},
    ],
)
@pytest.mark.usefixtures("no_slow_path")
def test_the_fast_path_reads_what_the_model_has(tmp_path, values):
    model = tiny_model(**values)
    model.save_pretrained(tmp_path)
    shape, full = Checkpoint.open(tmp_path).shape(), model.config
    assert shape.num_parameters == full.num_parameters() == sum(p.numel() for p in model.parameters())
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"):
        assert getattr(shape, name) == getattr(full, name)
    assert shape.embeddings_scale == full.mup_embeddings_scale
    assert shape.logits_scale == pytest.approx(full.mup_output_alpha * full.mup_width_scale)
    head_dim = full.n_embd // full.n_head
    scale = 1 / head_dim if full.mup_scale_qk_dot_by_d else 1 / math.sqrt(head_dim)
    assert shape.attention_scale == (scale if full.scale_attn_weights else 1)
    assert shape.inverse_layer_idx == full.scale_attn_by_inverse_layer_idx
    assert shape.tied == full.tie_word_embeddings
    assert (shape.bits, shape.end_ids) == (None, frozenset({END}))


def test_older_keys_take_the_slow_path(copy):
    stored = json.loads((copy / "config.json").read_text())
    older = {
        "mup_embeddings_scale": "embeddings_scale",
        "mup_scale_qk_dot_by_d": "scale_qk_dot_by_d",
    }
    expected = Checkpoint.open(copy).shape()
    set_config(copy, **dict.fromkeys(older, ...), **{old: stored[new] for new, old in older.items()})
    assert Checkpoint.open(copy).shape() == expected


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            {"position_embedding_type": "learned"},
            "position_embedding_type 'alibi'.*'learned'",
        ),
        ({"activation_function": "gelu"}, "activation_function 'swiglu'.*'gelu'"),
        ({"alibi_scaling": {"type": "linear", "train_seq_len": 64}}, "dynamic"),
        ({"n_embd": 1040, "n_head": 4}, "heads of at most 256, and these have 260"),
    ],
)
def test_what_the_engine_does_not_run(copy, values, what):
    set_config(copy, **values)
    with pytest.raises(NotSupported, match=what) as error:
        Checkpoint.open(copy).shape()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("n_embd", "32"),
        ("n_embd", 0),
        ("n_head", 5),
        ("n_layer", True),
        ("n_inner", -1),
        ("vocab_size", 1.5),
        ("mup_width_scale", 0),
        ("mup_output_alpha", math.inf),
        ("layer_norm_epsilon", None),
        ("eos_token_id", "end"),
        ("eos_token_id", 300),
        ("alibi_scaling", {"type": "linear", "factor": 0}),
        ("alibi_scaling", {"type": "linear", "factor": -2.0}),
        ("alibi_scaling", {"type": "linear", "factor": math.nan}),
        ("alibi_scaling", {"type": "linear", "factor": math.inf}),
        ("quantized by 8", 8),
        ("bits", {**QUANTIZED, "bits": 3}),
        ("group_size", {**QUANTIZED, "group_size": 0}),
        ("table_bits", {**QUANTIZED, "table_bits": None}),
        ("gptq", {**QUANTIZED, "quant_method": "gptq"}),
    ],
)
def test_impossible_values_are_one_line_that_names_them(key, value):
    given = config(**{key if key in config() else "quantization_config": value})
    with pytest.raises(ValueError, match=key) as error:
        Shape.from_config(given, given["eos_token_id"])
    assert "\n" not in str(error.value)


def test_storage_is_that_of_the_model():
    assert tuple(BITS) == _QUANTIZATION["bits"] == _QUANTIZATION["table_bits"]
    assert tuple(GROUP_SIZES) == _QUANTIZATION["group_size"]


def test_folders_of_an_older_version(copy):
    set_config(copy, quantization_config={"quant_method": "btlm", "bits": 8})
    with pytest.raises(ValueError, match="older version") as error:
        Checkpoint.open(copy).shape()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_configuration_that_is_broken(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        Checkpoint.open(copy).shape()
    assert "\n" not in str(error.value)


def test_a_given_factor_replaces_the_stored_one(copy):
    plain = Checkpoint.open(copy).shape()
    set_config(copy, alibi_scaling={"type": "linear", "factor": 4.0})
    assert Checkpoint.open(copy).shape().interpolation == 4
    assert Checkpoint.open(copy).shape(2.0).interpolation == 2
    assert Checkpoint.open(copy).shape(1.0) == plain
    set_config(copy, alibi_scaling={"type": "linear", "train_seq_len": 64})
    assert Checkpoint.open(copy).shape(2.0).interpolation == 2


def test_end_ids(copy):
    for stored, ends in ((None, set()), (7, {7}), ([7, END], {7, END})):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert Checkpoint.open(copy).shape().end_ids == ends
    (copy / "generation_config.json").unlink()
    assert Checkpoint.open(copy).shape().end_ids == {END}
