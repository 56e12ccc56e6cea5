"""Configuration of BTLM: every key of the released ``config.json``, validated, with structure-derived estimates."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .alibi import alibi_scaling_problem

logger = logging.get_logger(__name__)

MUP_KEYS = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha", "mup_scale_qk_dot_by_d")
ACTIVATION_FUNCTIONS = ("swiglu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
POSITION_EMBEDDING_TYPES = ("alibi", "learned")


class BTLMConfig(PreTrainedConfig):
    """Shape and parametrization of one model of the BTLM family.

    Defaults are those of the original configuration class, which describe a *standard-parametrization* GPT-2 with
    learned positions: a checkpoint that lacks a key must load as its authors' code would have loaded it. The released
    model sets every key (``recipes/btlm-3b.yaml`` holds its values). Loading a configuration that lacks some of the
    four muP keys logs a warning that names them.

    Key spellings of older converted checkpoints are accepted: ``embeddings_scale``, ``scale_qk_dot_by_d``,
    ``width_scale`` and ``output_logits_scale``, where the logits of those checkpoints are multiplied by
    ``output_logits_scale`` or, where that is absent, by ``width_scale``.

    Args:
        vocab_size: Rows of the token table; 50257 for the GPT-2 vocabulary.
        n_positions: Context length in tokens; the size of the position table when positions are learned.
        n_embd, n_layer, n_head: Width, number of blocks, attention heads a block (any number that divides the width).
        n_inner: Width of the feed-forward layer; ``4 * n_embd`` when ``None``.
        activation_function: ``"swiglu"`` (two up-projections) or one of the pointwise activations.
        resid_pdrop, embd_pdrop, attn_pdrop: Dropout probabilities, in [0, 1).
        layer_norm_epsilon: Added to the variance in every LayerNorm.
        initializer_range: Standard deviation of the initial weights at base width (see :mod:`btlm.model.mup`).
        scale_attn_weights: Divide attention scores by a power of the head dimension.
        scale_attn_by_inverse_layer_idx: Also divide the scores of block ``i`` by ``i + 1``.
        reorder_and_upcast_attn: Kept for compatibility: scores and softmax are always accumulated in fp32 here.
        position_embedding_type: ``"alibi"`` or ``"learned"``.
        mup_width_scale: Base width over width (256 / 2560 = 0.1 for BTLM-3B); 1.0 is standard parametrization.
        mup_embeddings_scale: Multiplier of the token embeddings (14.6 for BTLM-3B).
        mup_output_alpha: Logits are multiplied by ``mup_output_alpha * mup_width_scale`` (2.22 * 0.1 for BTLM-3B).
        mup_scale_qk_dot_by_d: Divide scores by the head dimension instead of by its square root.
        alibi_scaling: ``None``, ``{"type": "linear", "factor": float > 1}`` (fixed position interpolation) or
            ``{"type": "linear", "train_seq_len": int > 1}`` (dynamic), arXiv 2310.13017.

    Raises:
        ValueError: Names every impossible value at once, each with its remedy.
    """

    model_type = "btlm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the class attribute is Transformers' contract
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    position_embedding_type: str = "learned"
    mup_width_scale: float = 1.0
    mup_embeddings_scale: float = 1.0
    mup_output_alpha: float = 1.0
    mup_scale_qk_dot_by_d: bool = False
    alibi_scaling: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        older = {key: kwargs.pop(key) for key in OLDER_KEYS if key in kwargs}
        problems = self._adopt_older_keys(older)
        super().__post_init__(**kwargs)
        self.raise_problems(problems)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from the contents of a ``config.json``; warn of the muP keys that it lacks."""
        given = {*config_dict, *kwargs}
        present = given | {new for old, news in OLDER_KEYS.items() if old in given for new in news}
        missing = [key for key in MUP_KEYS if key not in present]
        config = super().from_dict(config_dict, **kwargs)
        if missing:
            logger.warning(
                f"The configuration lacks the muP keys {', '.join(missing)}: standard parametrization is used for "
                "them. If the model was trained with muP, add them to its config.json."
            )
        return config

    def raise_problems(self, problems: list[str] | None = None) -> None:
        """Check every value.

        Args:
            problems: Problems found elsewhere, reported with those found here.

        Raises:
            ValueError: One line that names all problems.
        """
        found = [*(problems or []), *self._problems()]
        if found:
            raise ValueError(f"Invalid BTLM configuration: {'; '.join(found)}.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before ALiBi and softmax (without the inverse layer index)."""
        if not self.scale_attn_weights:
            return 1.0
        return 1.0 / self.head_dim if self.mup_scale_qk_dot_by_d else 1.0 / math.sqrt(self.head_dim)

    @property
    def logits_scale(self) -> float:
        """What the output of the head is multiplied by (muP)."""
        return self.mup_output_alpha * self.mup_width_scale

    # Estimates. Each follows from the shape alone; nothing is allocated.

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trained parameters; 2,646,255,744 for BTLM-3B-8k.

        Args:
            embeddings: Count the token and position tables and an untied head too.
        """
        width, inner = self.n_embd, self.inner_dim
        up_projections = 2 if self.activation_function == "swiglu" else 1
        attention = width * 3 * width + 3 * width + width * width + width
        feed_forward = up_projections * (width * inner + inner) + inner * width + width
        total = self.n_layer * (attention + feed_forward + 4 * width) + 2 * width
        if embeddings:
            total += self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
            if self.position_embedding_type == "learned":
                total += self.n_positions * width
        return total

    def flops_per_token(self, context: int, *, training: bool = False) -> float:
        """Floating-point operations for one token, the mean over a causal sequence of ``context`` tokens.

        A multiply-add is two operations. Matrices and head take two a weight; query-key products and the weighted sum
        of values take ``4 * n_embd`` a visible key, of which a token of the sequence sees ``(context + 1) / 2``.
        Training takes three times the forward pass (PaLM, arXiv 2204.02311, appendix B, with causality counted).
        """
        width = self.n_embd
        projections = 3 if self.activation_function == "swiglu" else 2
        weights = self.n_layer * (4 * width * width + projections * width * self.inner_dim) + self.vocab_size * width
        attention = self.n_layer * 4 * width * (context + 1) / 2
        return (2 * weights + attention) * (3 if training else 1)

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one token adds to the key-value cache; 327,680 for BTLM-3B-8k in bf16."""
        return 2 * self.n_layer * self.n_embd * dtype.itemsize

    def weight_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of all weights in ``dtype``; 5.29 GB for BTLM-3B-8k in bf16."""
        return self.num_parameters() * dtype.itemsize

    def _adopt_older_keys(self, older: Mapping[str, Any]) -> list[str]:
        problems = []
        for key, value in older.items():
            if key == "scale_qk_dot_by_d":
                if value not in (True, False):
                    problems.append(f"{key} is {value!r}, neither true nor false")
            elif not _is_number(value):
                problems.append(f"{key} is {value!r}, not a number")
        if problems:
            return problems
        if "embeddings_scale" in older:
            self.mup_embeddings_scale = older["embeddings_scale"]
        if "scale_qk_dot_by_d" in older:
            self.mup_scale_qk_dot_by_d = bool(older["scale_qk_dot_by_d"])
        if "width_scale" in older:
            self.mup_width_scale = older["width_scale"]
        if "output_logits_scale" in older and self.mup_width_scale:
            self.mup_output_alpha = older["output_logits_scale"] / self.mup_width_scale
        return problems

    def _problems(self) -> list[str]:
        problems: list[str] = []

        def require(name: str, holds: bool, remedy: str) -> bool:
            if not holds:
                problems.append(f"{name} is {getattr(self, name)!r}, {remedy}")
            return holds

        sizes = {
            name: require(name, _is_int(getattr(self, name)) and getattr(self, name) > 0, "not a positive whole number")
            for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        }
        inner = self.n_inner
        require("n_inner", inner is None or (_is_int(inner) and inner > 0), "neither null nor a positive whole number")
        if sizes["n_embd"] and sizes["n_head"]:
            require("n_head", self.n_embd % self.n_head == 0, f"which does not divide n_embd ({self.n_embd})")
        for name, choices in (
            ("activation_function", ACTIVATION_FUNCTIONS),
            ("position_embedding_type", POSITION_EMBEDDING_TYPES),
        ):
            require(name, getattr(self, name) in choices, f"unknown; choose one of {', '.join(choices)}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            require(name, _is_number(value) and 0 <= value < 1, "not a probability in [0, 1)")
        for name in (
            "layer_norm_epsilon",
            "initializer_range",
            "mup_width_scale",
            "mup_embeddings_scale",
            "mup_output_alpha",
        ):
            value = getattr(self, name)
            require(name, _is_number(value) and 0 < value < float("inf"), "not a positive number")
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "mup_scale_qk_dot_by_d",
            "tie_word_embeddings",
        ):
            require(name, isinstance(getattr(self, name), bool), "neither true nor false")
        if problem := alibi_scaling_problem(self.alibi_scaling):
            problems.append(problem)
        elif self.alibi_scaling is not None and self.position_embedding_type == "learned":
            problems.append("alibi_scaling is set but position_embedding_type is 'learned'; remove one of them")
        return problems


# Older spelling -> the muP keys it stands for.
OLDER_KEYS = {
    "embeddings_scale": ("mup_embeddings_scale",),
    "scale_qk_dot_by_d": ("mup_scale_qk_dot_by_d",),
    "width_scale": ("mup_width_scale", "mup_output_alpha"),
    "output_logits_scale": ("mup_output_alpha",),
}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
