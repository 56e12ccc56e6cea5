"""The facts of BTLM, against the released model, the network itself and PEFT."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import btlm
from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.architecture_btlm import (
    BTLM_3B,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    MATRIX_NAMES,
    MUP_TABLE,
    TOKENIZER_FOLDER,
    VOCAB_SIZE,
    Architecture,
    Quantization,
    slope_exponents,
)
from tests.model.reference import press_slopes
from tests.model.test_configuration_btlm import BTLM_3B as RELEASED
from tests.model.tiny import TINY, tiny_config

QUANTIZED = {"quant_method": "btlm", "bits": 4, "group_size": 64, "table_bits": 8}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"activation_function": "gelu_new", "n_inner": None},
    {"position_embedding_type": "learned"},
    {"scale_attn_weights": False},
    {"mup_scale_qk_dot_by_d": False},
]


def test_it_imports_the_standard_library_alone() -> None:
    program = """
import sys
before = set(sys.modules)
import btlm.model.architecture_btlm
roots = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(roots - set(sys.stdlib_module_names)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(btlm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['btlm']"


# The released model


def test_btlm_3b_is_the_released_model() -> None:
    # Its config.json, as the tests of the configuration have it.
    assert Architecture.from_config(RELEASED) == BTLM_3B


def test_counts_of_btlm_3b() -> None:
    # Counted in the released checkpoint; FLOPs by 6 N D and by PaLM's appendix B for its 627.7 billion tokens.
    assert BTLM_3B.num_parameters() == 2_646_255_744
    assert BTLM_3B.num_parameters(embeddings=False) == 2_517_597_824
    assert BTLM_3B.kv_bytes_per_token() == 327_680
    assert BTLM_3B.weight_bytes() == 5_292_511_488
    assert BTLM_3B.weight_bytes(4) == 1_323_127_872
    tokens = 159_636 * 3_932_160
    assert 6 * BTLM_3B.num_parameters() * tokens == pytest.approx(9.97e21, rel=1e-3)
    flops = [BTLM_3B.flops_per_token(context, training=True) for context in (2048, 8192)]
    assert tokens * (0.75 * flops[0] + 0.25 * flops[1]) == pytest.approx(1.11e22, rel=5e-3)


def test_training_adapters_of_btlm_3b_skips_the_gradient_of_frozen_weights() -> None:
    # Rank 16 on every projection, in 32 blocks; two thirds of the frozen weights' share, all of attention's and theirs.
    adapters = 32 * 16 * (2560 + 7680 + 2 * 2560 + 3 * (2560 + 6826))
    assert BTLM_3B.num_adapter_parameters(16, ["c_attn", "c_proj", "c_fc", "c_fc2"]) == adapters
    frozen, attention = 2 * (32 * (4 * 2560**2 + 3 * 2560 * 6826) + 50257 * 2560), 32 * 4 * 2560 * 2049 / 2
    training = BTLM_3B.flops_per_token(2048, training=True, adapters=adapters)
    assert training == pytest.approx(2 * frozen + 3 * attention + 3 * 2 * adapters)
    assert BTLM_3B.flops_per_token(2048, adapters=adapters) == pytest.approx(frozen + attention + 2 * adapters)


def test_scales_of_btlm_3b() -> None:
    assert BTLM_3B.head_dim == 80
    assert BTLM_3B.attention_scale == 1 / 80
    assert BTLM_3B.logits_scale == pytest.approx(0.222)


def test_the_vocabulary_is_that_of_the_files() -> None:
    vocabulary = json.loads((TOKENIZER_FOLDER / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == VOCAB_SIZE == 50257
    assert vocabulary[END_OF_TEXT] == END_OF_TEXT_ID == 50256
    assert END_OF_TEXT == "<|endoftext|>"


# The network


@pytest.mark.parametrize("values", VARIANTS, ids=repr)
def test_tensors_are_those_of_the_network(values: dict[str, Any]) -> None:
    config = tiny_config(**values)
    with torch.device("meta"):
        state = BTLMLMHeadModel(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = config.architecture.tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == {k: tuple(v.shape) for k, v in state.items()}
    assert list(tensors) == list(state)


@pytest.mark.parametrize("values", VARIANTS, ids=repr)
def test_kinds_and_rows_are_those_that_the_modules_have(values: dict[str, Any]) -> None:
    config = tiny_config(**values)
    with torch.device("meta"):
        model = BTLMLMHeadModel(config)
    groups = {
        id(parameter): group["name"] for group in model.get_mup_param_groups(1.0) for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    for name, tensor in config.architecture.tensors.items():
        module = type(model.get_submodule(name.rpartition(".")[0])).__name__
        part = name.rpartition(".")[2]
        expected = {"LayerNorm": "norm", "RelativePositions": "slopes", "Linear": "token table"}.get(module)
        if module == "Conv1D":
            expected = "matrix" if part == "weight" else "bias"
        if module == "Embedding":
            expected = "token table" if "wte" in name else "position table"
        assert tensor.kind == expected, name
        if tensor.row is None:
            assert tensor.kind == "slopes"
        else:
            assert tensor.row.group == groups[id(parameters[name])], name


def test_the_rows_of_layers() -> None:
    # The table of the muP paper for BTLM: arXiv 2309.11568, section 2.2, and Cerebras modelzoo.
    groups = {layer: row.group for layer, row in MUP_TABLE.items()}
    assert groups.pop("wte") == groups.pop("wpe") == groups.pop("lm_head") == "embeddings"
    assert set(groups.values()) == {"matrices"}
    assert [layer for layer, row in MUP_TABLE.items() if row.residual] == ["c_proj"]
    assert sorted(MATRIX_NAMES) == sorted(groups)


@pytest.mark.parametrize("n_head", [*range(1, 21), 32, 40, 64, 96])
def test_slopes_are_those_of_press(n_head: int) -> None:
    exponents = [first + step * i for first, step, count in slope_exponents(n_head) for i in range(count)]
    assert [2**-exponent for exponent in exponents] == pytest.approx(press_slopes(n_head), rel=1e-12)
    assert torch.tensor(exponents, dtype=torch.float32).double().tolist() == exponents


# From a config.json


@pytest.mark.parametrize("values", VARIANTS, ids=repr)
def test_the_configuration_class_reads_the_same(values: dict[str, Any]) -> None:
    config = tiny_config(**values)
    read = Architecture.from_config(config.to_dict())
    assert read == config.architecture
    for name in ("head_dim", "inner_dim", "attention_scale", "logits_scale"):
        assert getattr(read, name) == getattr(config, name)
    assert read.num_parameters() == config.num_parameters()
    assert read.quantization is None


def test_missing_keys_have_the_defaults_of_the_configuration_class() -> None:
    assert Architecture.from_config({"model_type": "btlm"}) == BTLMConfig().architecture
    assert {field.name for field in fields(Architecture)} - {"quantization"} <= set(BTLMConfig().to_dict())


def test_older_and_common_spellings() -> None:
    older: dict[str, Any] = {
        "width_scale": 0.5,
        "embeddings_scale": 3.0,
        "output_logits_scale": 0.6,
        "scale_qk_dot_by_d": True,
    }
    older |= {"hidden_size": 48, "num_attention_heads": 12, "num_hidden_layers": 3, "max_position_embeddings": 64}
    kept = {key: value for key, value in TINY.items() if not key.startswith("mup_")}
    for key in ("n_embd", "n_head", "n_layer", "n_positions"):
        del kept[key]
    read = Architecture.from_config({**kept, **older})
    assert read == BTLMConfig(**{**TINY, "mup_output_alpha": 0.6 / 0.5}).architecture
    assert read == BTLMConfig(**kept, **older).architecture


def test_quantization() -> None:
    read = Architecture.from_config({**TINY, "quantization_config": QUANTIZED})
    assert read.quantization == Quantization(bits=4, group_size=64, table_bits=8)
    assert Architecture.from_config({**TINY, "quantization": {"bits": 4}}).quantization is None  # a key of others


def test_all_problems_are_one_line() -> None:
    wrong = {
        "n_head": 5,
        "n_layer": True,
        "vocab_size": 1.5,
        "activation_function": "swish",
        "layer_norm_epsilon": None,
        "mup_output_alpha": math.inf,
        "width_scale": "wide",
        "alibi_scaling": {"type": "linear", "factor": 0.5},
        "quantization_config": {"quant_method": "gptq"},
    }
    with pytest.raises(ValueError, match="Invalid BTLM configuration") as error:
        Architecture.from_config({**TINY, **wrong})
    assert [key for key in wrong if f"{key} is " not in str(error.value)] == []
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
        ("alibi_scaling", {"type": "linear", "factor": 0}),
        ("alibi_scaling", {"type": "linear", "factor": -2.0}),
        ("alibi_scaling", {"type": "linear", "factor": math.nan}),
        ("alibi_scaling", {"type": "linear", "factor": math.inf}),
        ("alibi_scaling", {"type": "linear", "factor": 1.0}),
        ("quantization_config", 8),
        ("bits", {**QUANTIZED, "bits": 3}),
        ("group_size", {**QUANTIZED, "group_size": 0}),
        ("table_bits", {**QUANTIZED, "table_bits": None}),
        ("gptq", {**QUANTIZED, "quant_method": "gptq"}),
    ],
    ids=str,
)
def test_impossible_values_are_one_line_that_names_them(key: str, value: object) -> None:
    given = {**TINY, key if key in {*TINY, *BTLMConfig().to_dict()} else "quantization_config": value}
    with pytest.raises(ValueError, match=key) as error:
        Architecture.from_config(given)
    assert "\n" not in str(error.value)


def test_an_impossible_scale_beside_an_older_key() -> None:
    with pytest.raises(ValueError, match="mup_width_scale is 'x'"):
        Architecture.from_config({**TINY, "mup_width_scale": "x", "output_logits_scale": 0.5})


def test_another_type_of_model() -> None:
    with pytest.raises(ValueError, match="'gpt2'"):
        Architecture.from_config({**TINY, "model_type": "gpt2"})
