import json
import math

import numpy as np
import pytest
import torch

from btlm.checkpoint.open import Checkpoint
from btlm.engine import Engine
from btlm.engine.supported import interpolation, slopes, supported
from btlm.errors import NotSupported
from btlm.model.alibi import alibi_slopes, interpolated_slopes
from btlm.model.architecture_btlm import Architecture
from tests.checkpoint.tiny import END, TINY, set_config, tiny_model


def read(folder, factor=None):
    return supported(Checkpoint.open(folder).architecture, factor)


@pytest.fixture
def no_configuration_class(monkeypatch):
    def refuse(*_):
        raise AssertionError("the configuration class was needed")

    monkeypatch.setattr("btlm.checkpoint.open.read_config", refuse)


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_the_model(heads):
    sizes = {**TINY, "n_embd": heads * 8, "n_head": heads}
    plain = slopes(Architecture.from_config(sizes))
    assert plain.dtype == np.float32
    assert torch.equal(torch.from_numpy(plain), alibi_slopes(heads))
    for factor in (2.0, 3.0):
        scaling = {"type": "linear", "factor": factor}
        divided = slopes(Architecture.from_config({**sizes, "alibi_scaling": scaling}))
        expected = interpolated_slopes(alibi_slopes(heads), scaling, torch.tensor([1]))[0]
        assert torch.equal(torch.from_numpy(divided), expected)
        assert np.array_equal(divided, plain / np.float32(factor))


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
@pytest.mark.usefixtures("no_configuration_class")
def test_it_reads_what_the_model_has(tmp_path, values):
    model = tiny_model(**values)
    model.save_pretrained(tmp_path)
    architecture, full = read(tmp_path), model.config
    assert architecture.num_parameters() == full.num_parameters() == sum(p.numel() for p in model.parameters())
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon"):
        assert getattr(architecture, name) == getattr(full, name)
    assert architecture.mup_embeddings_scale == full.mup_embeddings_scale
    assert architecture.logits_scale == pytest.approx(full.mup_output_alpha * full.mup_width_scale)
    head_dim = full.n_embd // full.n_head
    scale = 1 / head_dim if full.mup_scale_qk_dot_by_d else 1 / math.sqrt(head_dim)
    assert architecture.attention_scale == (scale if full.scale_attn_weights else 1)
    assert architecture.scale_attn_by_inverse_layer_idx == full.scale_attn_by_inverse_layer_idx
    assert architecture.tie_word_embeddings == full.tie_word_embeddings
    assert (architecture.quantization, Checkpoint.open(tmp_path).end_ids) == (None, frozenset({END}))


@pytest.mark.usefixtures("no_configuration_class")
def test_older_keys_are_read(copy):
    stored = json.loads((copy / "config.json").read_text())
    older = {
        "mup_embeddings_scale": "embeddings_scale",
        "mup_scale_qk_dot_by_d": "scale_qk_dot_by_d",
    }
    expected = read(copy)
    set_config(copy, **dict.fromkeys(older, ...), **{old: stored[new] for new, old in older.items()})
    assert read(copy) == expected


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"alibi_scaling": {"type": "linear", "train_seq_len": 64}}, "dynamic"),
        ({"n_embd": 1040, "n_head": 4}, "heads of at most 256, and these have 260"),
    ],
)
def test_what_the_engine_does_not_run(copy, values, what):
    set_config(copy, **values)
    for use in (read, Engine.open):
        with pytest.raises(NotSupported, match=what) as error:
            use(copy)
        assert "\n" not in str(error.value)


def test_a_given_factor_replaces_the_stored_one(copy):
    plain = read(copy)
    assert interpolation(plain) == 1
    set_config(copy, alibi_scaling={"type": "linear", "factor": 4.0})
    assert interpolation(read(copy)) == 4
    assert interpolation(read(copy, 2.0)) == 2
    assert read(copy, 1.0) == plain
    set_config(copy, alibi_scaling={"type": "linear", "train_seq_len": 64})
    assert interpolation(read(copy, 2.0)) == 2


@pytest.mark.parametrize("factor", [0.5, 0, -2.0, math.nan, math.inf])
def test_an_impossible_factor(checkpoint, factor):
    with pytest.raises(ValueError, match=f"interpolation factor is {factor}; it must be at least 1"):
        read(checkpoint, factor)
