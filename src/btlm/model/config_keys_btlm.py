"""The keys of a ``config.json``: what they may hold, and their older spellings. Standard library only."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MODEL_TYPE = "btlm"
ACTIVATION_FUNCTIONS = ("swiglu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
POSITION_EMBEDDING_TYPES = ("alibi", "learned")
MUP_KEYS = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha", "mup_scale_qk_dot_by_d")
# Older spelling -> the muP keys it stands for.
OLDER_KEYS = {
    "embeddings_scale": ("mup_embeddings_scale",),
    "scale_qk_dot_by_d": ("mup_scale_qk_dot_by_d",),
    "width_scale": ("mup_width_scale", "mup_output_alpha"),
    "output_logits_scale": ("mup_output_alpha",),
}
# The names that Transformers has for keys of every model -> BTLM's.
COMMON_KEYS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Weights stored in few bits; storage_btlm.py has the layout.
QUANT_METHOD = "btlm"
BITS = (4, 8)
GROUP_SIZES = (64, 128)


def config_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys of a configuration, each with its remedy; empty where nothing is.

    Args:
        values: Every field of :class:`.architecture_btlm.Architecture` by its name.
    """
    problems: list[str] = []

    def require(name: str, holds: bool, remedy: str) -> bool:
        if not holds:
            problems.append(f"{name} is {values[name]!r}, {remedy}")
        return holds

    sizes = {
        name: require(name, _is_int(values[name]) and values[name] > 0, "not a positive whole number")
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    }
    inner = values["n_inner"]
    require("n_inner", inner is None or (_is_int(inner) and inner > 0), "neither null nor a positive whole number")
    if sizes["n_embd"] and sizes["n_head"]:
        width = values["n_embd"]
        require("n_head", width % values["n_head"] == 0, f"which does not divide n_embd ({width})")
    for name, choices in (
        ("activation_function", ACTIVATION_FUNCTIONS),
        ("position_embedding_type", POSITION_EMBEDDING_TYPES),
    ):
        require(name, values[name] in choices, f"unknown; choose one of {', '.join(choices)}")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        require(name, _is_number(values[name]) and 0 <= values[name] < 1, "not a probability in [0, 1)")
    for name in (
        "layer_norm_epsilon",
        "initializer_range",
        "mup_width_scale",
        "mup_embeddings_scale",
        "mup_output_alpha",
    ):
        require(name, _is_number(values[name]) and 0 < values[name] < math.inf, "not a positive number")
    for name in (
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "mup_scale_qk_dot_by_d",
        "tie_word_embeddings",
    ):
        require(name, isinstance(values[name], bool), "neither true nor false")
    if problem := alibi_scaling_problem(values["alibi_scaling"]):
        problems.append(problem)
    elif values["alibi_scaling"] is not None and values["position_embedding_type"] == "learned":
        problems.append("alibi_scaling is set but position_embedding_type is 'learned'; remove one of them")
    return problems


def alibi_scaling_problem(alibi_scaling: object) -> str | None:
    """What is wrong with a value of ``alibi_scaling`` (arXiv 2310.13017), or None where it is valid."""
    remedy = (
        'use null, {"type": "linear", "factor": float > 1} or {"type": "linear", "train_seq_len": int > 1} '
        "(exactly one of factor and train_seq_len)"
    )
    if alibi_scaling is None:
        return None
    if not isinstance(alibi_scaling, dict):
        return f"alibi_scaling is {alibi_scaling!r}; {remedy}"
    factor, train_seq_len = alibi_scaling.get("factor"), alibi_scaling.get("train_seq_len")
    fixed = _is_number(factor) and 1 < factor < math.inf
    dynamic = _is_int(train_seq_len) and train_seq_len > 1
    known = {key for key, value in alibi_scaling.items() if value is not None}
    valid = (fixed and known == {"type", "factor"}) or (dynamic and known == {"type", "train_seq_len"})
    if alibi_scaling.get("type") != "linear" or not valid:
        return f"alibi_scaling is {alibi_scaling!r}; {remedy}"
    return None


def quantization_problem(quantization: object) -> str | None:
    """What is wrong with a ``quantization_config``, or None where this version reads it."""
    if not isinstance(quantization, Mapping):
        return f"quantization_config is {quantization!r}, not a mapping; make the folder again with `btlm quantize`"
    choices = {"bits": BITS, "group_size": GROUP_SIZES, "table_bits": BITS}
    if (
        quantization.get("quant_method") == QUANT_METHOD
        and quantization.keys() <= {"quant_method", *choices}
        and all(_is_int(quantization.get(key)) and quantization[key] in values for key, values in choices.items())
    ):
        return None
    given = {key: value for key, value in quantization.items() if value is not None}
    older = given == {"quant_method": QUANT_METHOD, "bits": 8}
    return (
        f'quantization_config is {given}; this version reads {{"quant_method": "{QUANT_METHOD}", "bits": 4 or 8, '
        '"group_size": 64 or 128, "table_bits": 4 or 8}; '
        + ("that is the form of an older version, " if older else "")
        + "make the folder again with `btlm quantize`"
    )


def adopt_older_keys(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the keys that older spellings stand for, and what is wrong with their values.

    The logits of such checkpoints are multiplied by ``output_logits_scale`` or, where that is absent, by
    ``width_scale``.
    """
    problems = []
    older = {key: config[key] for key in OLDER_KEYS if key in config}
    current = {key: value for key, value in config.items() if key not in older}
    for key, value in older.items():
        if key == "scale_qk_dot_by_d":
            if value not in (True, False):
                problems.append(f"{key} is {value!r}, neither true nor false")
        elif not _is_number(value):
            problems.append(f"{key} is {value!r}, not a number")
    if problems:
        return current, problems
    if "embeddings_scale" in older:
        current["mup_embeddings_scale"] = older["embeddings_scale"]
    if "scale_qk_dot_by_d" in older:
        current["mup_scale_qk_dot_by_d"] = bool(older["scale_qk_dot_by_d"])
    if "width_scale" in older:
        current["mup_width_scale"] = older["width_scale"]
    width_scale = current.get("mup_width_scale", 1.0)
    if "output_logits_scale" in older and _is_number(width_scale) and width_scale:
        current["mup_output_alpha"] = older["output_logits_scale"] / width_scale
    return current, problems


def missing_mup_keys(config: Mapping[str, Any]) -> str | None:
    """A warning that names the muP keys that a ``config.json`` lacks, or None where it has them all."""
    present = {*config, *(new for old, news in OLDER_KEYS.items() if old in config for new in news)}
    missing = [key for key in MUP_KEYS if key not in present]
    if not missing:
        return None
    return (
        f"The configuration lacks the muP keys {', '.join(missing)}: standard parametrization is used for them. If the "
        "model was trained with muP, add them to its config.json."
    )


def end_ids(eos_token_id: object, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text: ``eos_token_id`` of a configuration, which may be a list or None.

    Raises:
        ValueError: It holds something that is not a token.
    """
    given = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    if not all(_is_int(token) and 0 <= token < vocab_size for token in given):
        raise ValueError(
            f"eos_token_id is {eos_token_id!r}; it must be a token below {vocab_size:,}, a list of them, or null."
        )
    return frozenset(given)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
