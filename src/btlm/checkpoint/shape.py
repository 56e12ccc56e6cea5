"""What the engine needs to know of a checkpoint, read without torch, which takes seconds to import."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from btlm.errors import NotSupported
from btlm.model.architecture_btlm import BTLM_3B, attention_scale, slope_exponents
from btlm.model.config_keys_btlm import BITS, GROUP_SIZES, MODEL_TYPE, QUANT_METHOD

_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_NUMBERS = ("layer_norm_epsilon", "mup_width_scale", "mup_embeddings_scale", "mup_output_alpha")
_KEYS = (*_SIZES, *_NUMBERS, "n_inner", "activation_function", "position_embedding_type", "mup_scale_qk_dot_by_d")
_QUANTIZATION = {"bits": BITS, "group_size": GROUP_SIZES, "table_bits": BITS}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network that the engine runs: SwiGLU and ALiBi, at most with a fixed interpolation.

    Args:
        vocab_size, n_positions, n_embd, n_layer, n_head, n_inner: As in the configuration.
        layer_norm_epsilon: Of all layer normalizations.
        embeddings_scale, attention_scale, logits_scale: Multipliers of muP, those of scores included.
        inverse_layer_idx: Scores of layer i are divided by i + 1 too.
        interpolation: What the slopes of ALiBi are divided by.
        tied: The head is the token table.
        bits, group_size, table_bits: How matrices and tables are stored; ``bits`` is ``None`` where they are plain.
        end_ids: Tokens that end a text.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float
    embeddings_scale: float
    attention_scale: float
    logits_scale: float
    inverse_layer_idx: bool = False
    interpolation: float = 1.0
    tied: bool = True
    bits: int | None = None
    group_size: int = 0
    table_bits: int = 0
    end_ids: frozenset[int] = frozenset()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        names = ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner")
        sizes = {name: getattr(self, name) for name in names}
        return replace(BTLM_3B, **sizes, tie_word_embeddings=self.tied).num_parameters()

    @property
    def slopes(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Slopes of ALiBi (arXiv 2108.12409), interpolation included, fp32 ``[n_head]``.

        The same as :func:`btlm.model.alibi.alibi_slopes`, which needs torch.
        """
        exponents = [
            first + step * np.arange(count, dtype=np.float32) for first, step, count in slope_exponents(self.n_head)
        ]
        return (np.exp2(-np.concatenate(exponents)) / np.float32(self.interpolation)).astype(np.float32)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], end_ids: object = None) -> Self:
        """From the keys of a ``config.json``.

        Args:
            config: With every key of muP.
            end_ids: ``eos_token_id``, which may be a list.

        Raises:
            NotSupported: The engine does not run this network.
            ValueError: A key is missing or impossible.
        """
        if problem := _problem(config):
            raise problem
        scaling = config.get("alibi_scaling") or {}
        by_head_dim, scaled = config["mup_scale_qk_dot_by_d"], config.get("scale_attn_weights", True)
        scale = attention_scale(config["n_embd"] // config["n_head"], scaled=scaled, by_head_dim=by_head_dim)
        quantization = config.get("quantization_config") or {}
        return cls(
            **{name: config[name] for name in _SIZES},
            n_inner=4 * config["n_embd"] if config["n_inner"] is None else config["n_inner"],
            layer_norm_epsilon=config["layer_norm_epsilon"],
            embeddings_scale=config["mup_embeddings_scale"],
            attention_scale=scale,
            logits_scale=config["mup_output_alpha"] * config["mup_width_scale"],
            inverse_layer_idx=config.get("scale_attn_by_inverse_layer_idx", False),
            interpolation=scaling.get("factor", 1.0),
            tied=config.get("tie_word_embeddings", True),
            bits=quantization.get("bits"),
            group_size=quantization.get("group_size", 0),
            table_bits=quantization.get("table_bits", 0),
            end_ids=end_ids_of(end_ids, config["vocab_size"]),
        )


def stored_end(folder: Path, config: Mapping[str, Any]) -> object:
    """``eos_token_id`` of the ``generation_config.json`` of a folder; that of its configuration if it has none."""
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return generation.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return config.get("eos_token_id")


def end_ids_of(eos_token_id: object, vocab_size: int) -> frozenset[int]:
    """The tokens that end a text: ``eos_token_id`` of a configuration, which may be a list or None.

    Raises:
        ValueError: It holds something that is not a token.
    """
    given: list[Any] = (
        [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    )
    if not all(_whole(token) and token < vocab_size for token in given):
        raise ValueError(
            f"eos_token_id is {eos_token_id!r}; it must be a token below {vocab_size:,}, a list of them, or null."
        )
    return frozenset(given)


def _problem(config: Mapping[str, Any]) -> ValueError | None:
    if config.get("model_type") != MODEL_TYPE:
        return ValueError(f"The model_type is {config.get('model_type')!r}, and the engine runs {MODEL_TYPE!r}.")
    if missing := [key for key in _KEYS if key not in config]:
        return ValueError(f"The configuration lacks {', '.join(missing)}.")
    for key in _SIZES:
        if not (_whole(config[key]) and config[key] > 0):
            return ValueError(f"{key} is {config[key]!r}, not a positive whole number.")
    for key in _NUMBERS:
        if not (isinstance(config[key], (int, float)) and 0 < config[key] < math.inf):
            return ValueError(f"{key} is {config[key]!r}, not a positive number.")
    if config["n_inner"] is not None and not (_whole(config["n_inner"]) and config["n_inner"] > 0):
        return ValueError(f"n_inner is {config['n_inner']!r}, neither null nor a positive whole number.")
    if config["n_embd"] % config["n_head"]:
        return ValueError(f"n_head is {config['n_head']}, which does not divide n_embd ({config['n_embd']}).")
    for key, runs in (("activation_function", "swiglu"), ("position_embedding_type", "alibi")):
        if config[key] != runs:
            return NotSupported(f"The engine runs {key} {runs!r}, and this model has {config[key]!r}.")
    scaling = config.get("alibi_scaling")
    if scaling is not None and not (isinstance(scaling, dict) and isinstance(scaling.get("factor"), (int, float))):
        return NotSupported("The engine runs a fixed interpolation, and this one is dynamic.")
    if scaling is not None and not 1 <= scaling["factor"] < math.inf:
        return ValueError(f"The factor of alibi_scaling is {scaling['factor']!r}; it must be at least 1.")
    if problem := _quantization_problem(config.get("quantization_config")):
        return problem
    if config["n_embd"] // config["n_head"] > 256:
        return NotSupported(
            f"The engine runs heads of at most 256, and these have {config['n_embd'] // config['n_head']}."
        )
    return None


def _quantization_problem(quantization: object) -> ValueError | None:
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
        return ValueError(f"The engine runs weights that btlm quantize wrote, and these are quantized by {method!r}.")
    for key, choices in _QUANTIZATION.items():
        if quantization.get(key) not in choices:
            return ValueError(f"{key} of quantization_config is {quantization.get(key)!r}, none of {choices}.")
    return None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
