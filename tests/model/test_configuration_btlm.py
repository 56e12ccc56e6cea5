import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import btlm
from btlm.model import BTLMConfig, BTLMLMHeadModel
from tests.model.tiny import TINY, tiny_config, tiny_model, tokens

# The config.json of the released model.
BTLM_3B: dict[str, Any] = {
    "model_type": "btlm",
    "architectures": ["BTLMLMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 8192,
    "n_embd": 2560,
    "n_layer": 32,
    "n_head": 32,
    "n_inner": 6826,
    "activation_function": "swiglu",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.073,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "position_embedding_type": "alibi",
    "mup_width_scale": 0.1,
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True,
    "alibi_scaling": None,
}
MUP_KEYS = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha", "mup_scale_qk_dot_by_d")
STEPS, TOKENS_A_STEP = 159_636, 3_932_160


@pytest.fixture(scope="module")
def released() -> BTLMConfig:
    return BTLMConfig(**BTLM_3B)


def load(folder: Path, config: dict[str, Any]) -> BTLMConfig:
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is btlm.BTLMConfig
    return loaded


def assert_saved_loads_equal(config: BTLMConfig, folder: Path) -> None:
    config.save_pretrained(folder)
    loaded = AutoConfig.from_pretrained(folder)
    origin = {"transformers_version": None, "_name_or_path": None}
    assert {**loaded.to_dict(), **origin} == {**config.to_dict(), **origin}


def test_shape_of_the_released_model(released: BTLMConfig) -> None:
    assert released.num_parameters() == 2_646_255_744
    assert released.num_parameters(embeddings=False) == 2_517_597_824
    assert released.kv_bytes_per_token() == 327_680
    assert released.kv_bytes_per_token(torch.float32) == 655_360
    assert released.weight_bytes() == 2 * 2_646_255_744
    assert released.weight_bytes(torch.float32) == 4 * 2_646_255_744
    assert released.head_dim == 80
    assert released.attention_scale == 1 / 80
    assert released.logits_scale == pytest.approx(0.222)


def test_training_flops_of_the_released_model(released: BTLMConfig) -> None:
    num_tokens = STEPS * TOKENS_A_STEP
    assert 6 * released.num_parameters() * num_tokens == pytest.approx(9.97e21, rel=1e-3)
    stages = 0.75 * released.flops_per_token(2048, training=True) + 0.25 * released.flops_per_token(8192, training=True)
    assert stages * num_tokens == pytest.approx(1.11e22, rel=5e-3)


def test_released_model_on_the_meta_device(released: BTLMConfig) -> None:
    with torch.device("meta"):
        model = BTLMLMHeadModel(released)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_646_255_744


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False},
        {"activation_function": "gelu_new", "n_inner": None},
        {"position_embedding_type": "learned"},
    ],
    ids=repr,
)
def test_estimates_are_what_a_model_takes(overrides: dict[str, Any]) -> None:
    model = tiny_model(**overrides).to(torch.bfloat16)
    config, length = model.config, 16
    parameters = list(model.parameters())
    assert config.num_parameters() == sum(parameter.numel() for parameter in parameters)
    tables = {"wte", "wpe", "lm_head"}
    inner = [p for name, p in model.named_parameters() if name.split(".")[-2] not in tables]
    assert config.num_parameters(embeddings=False) == sum(parameter.numel() for parameter in inner)
    assert config.weight_bytes() == sum(parameter.nbytes for parameter in parameters)

    cache = model(tokens(1, length)).past_key_values
    assert config.kv_bytes_per_token() * length == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )

    eager = tiny_model(attn_implementation="eager", **overrides)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager(tokens(1, length))
    # Eager attention also computes products with hidden later keys, which the estimate leaves out.
    hidden = config.n_layer * 4 * config.n_embd * (length * length - length * (length + 1) / 2)
    assert counter.get_total_flops() - hidden == config.flops_per_token(length) * length
    assert config.flops_per_token(length, training=True) == 3 * config.flops_per_token(length)


def test_defaults_are_standard_parametrization() -> None:
    config = BTLMConfig()
    assert (config.n_embd, config.n_layer, config.n_head, config.activation_function) == (768, 12, 12, "gelu_new")
    assert config.position_embedding_type == "learned"
    assert [getattr(config, key) for key in MUP_KEYS] == [1.0, 1.0, 1.0, False]
    assert config.attention_scale == 64**-0.5
    assert config.logits_scale == 1.0
    assert config.inner_dim == 4 * 768


def test_released_keys_load_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(tmp_path, BTLM_3B)
    assert not caplog.records
    assert {key: getattr(config, key) for key in BTLM_3B} == BTLM_3B


@pytest.mark.parametrize("missing", [MUP_KEYS, *((key,) for key in MUP_KEYS)], ids=" ".join)
def test_missing_mup_keys_are_named(missing: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(tmp_path, {key: value for key, value in BTLM_3B.items() if key not in missing})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [key for key in MUP_KEYS if key in record.getMessage()] == list(missing)
    assert [getattr(config, key) for key in missing] == [getattr(BTLMConfig(), key) for key in missing]


@pytest.mark.parametrize("values", [BTLM_3B, {**BTLM_3B, **dict.fromkeys(MUP_KEYS[:3], 1.0)}, {"model_type": "btlm"}])
def test_saved_configuration_loads_equal(
    values: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BTLMConfig(**values)
    assert_saved_loads_equal(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.items() >= {key: getattr(config, key) for key in MUP_KEYS}.items()
    assert not caplog.records


@pytest.mark.parametrize(
    ("older", "expected"),
    [
        ({"width_scale": 0.1, "embeddings_scale": 14.6, "scale_qk_dot_by_d": True}, (0.1, 14.6, 1.0, True)),
        (
            {"width_scale": 0.1, "embeddings_scale": 14.6, "output_logits_scale": 0.222, "scale_qk_dot_by_d": 1},
            (0.1, 14.6, 2.22, True),
        ),
        (
            {"mup_width_scale": 0.1, "embeddings_scale": 2, "output_logits_scale": 0.3, "scale_qk_dot_by_d": False},
            (0.1, 2, 3.0, False),
        ),
    ],
)
def test_older_spellings(
    older: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load(tmp_path, {**{key: value for key, value in BTLM_3B.items() if key not in MUP_KEYS}, **older})
    assert not caplog.records
    assert [getattr(config, key) for key in MUP_KEYS] == pytest.approx(list(expected))
    assert config.logits_scale == pytest.approx(older.get("output_logits_scale", older.get("width_scale")))
    assert_saved_loads_equal(config, tmp_path / "saved")
    assert not {"width_scale", "embeddings_scale"} & json.loads((tmp_path / "saved/config.json").read_text()).keys()


def test_older_output_scale_says_nothing_of_the_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = {"output_logits_scale": 0.222, "embeddings_scale": 14.6, "scale_qk_dot_by_d": True}
    config = load(tmp_path, {**{key: value for key, value in BTLM_3B.items() if key not in MUP_KEYS}, **older})
    assert config.logits_scale == pytest.approx(0.222)
    (record,) = caplog.records
    assert [key for key in MUP_KEYS if key in record.getMessage()] == ["mup_width_scale"]


PROBLEMS: list[tuple[str, Any]] = [
    ("n_head", 5),
    ("n_head", 0),
    ("n_layer", -1),
    ("vocab_size", 0),
    ("n_positions", True),
    ("n_inner", 0),
    ("activation_function", "swish"),
    ("position_embedding_type", "rotary"),
    ("resid_pdrop", 1.0),
    ("embd_pdrop", -0.1),
    ("attn_pdrop", float("nan")),
    ("layer_norm_epsilon", 0.0),
    ("initializer_range", float("inf")),
    ("mup_width_scale", 0.0),
    ("mup_embeddings_scale", -1.0),
    ("mup_output_alpha", float("nan")),
    ("width_scale", "wide"),
    ("embeddings_scale", None),
    ("alibi_scaling", {"type": "linear", "factor": 0.5}),
]


@pytest.mark.parametrize(("key", "value"), PROBLEMS)
def test_impossible_value_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key} is ") as error:
        tiny_config(**{key: value})
    assert repr(value) in str(error.value)


def test_all_problems_are_reported_at_once_in_one_line() -> None:
    wrong = dict(PROBLEMS[4:])  # one value per key, so that no problem hides another
    with pytest.raises(ValueError, match="Invalid BTLM configuration") as error:
        tiny_config(**{**wrong, "n_head": 5})
    message = str(error.value)
    assert "\n" not in message
    assert [key for key in [*wrong, "n_head"] if f"{key} is " not in message] == []


def test_interpolation_without_alibi_is_an_error() -> None:
    with pytest.raises(ValueError, match="alibi_scaling is set but position_embedding_type is 'learned'"):
        tiny_config(position_embedding_type="learned", alibi_scaling={"type": "linear", "factor": 2.0})


def test_value_set_later_is_checked_before_a_model_is_built() -> None:
    config = tiny_config()
    config.alibi_scaling = {"type": "linear", "factor": 1.0}
    config.n_head = 7
    with pytest.raises(ValueError, match=r"n_head is 7.*alibi_scaling is"):
        BTLMLMHeadModel(config)


def test_names_that_transformers_asks_for() -> None:
    config = tiny_config()
    assert config.hidden_size == TINY["n_embd"]
    assert config.num_attention_heads == TINY["n_head"]
    assert config.num_hidden_layers == TINY["n_layer"]
    assert config.max_position_embeddings == TINY["n_positions"]


@pytest.mark.parametrize(
    ("key", "value"), [("scale_qk_dot_by_d", 3.7), ("embeddings_scale", True), ("width_scale", "x")]
)
def test_impossible_older_keys_are_an_error(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} is {value!r}"):
        BTLMConfig(**{key: value})
