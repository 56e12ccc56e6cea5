"""Transformers' configuration of BTLM: every key of the released ``config.json``, checked, and what follows from it."""

from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .architecture_btlm import Architecture, attention_scale
from .config_keys_btlm import COMMON_KEYS, MODEL_TYPE, OLDER_KEYS, adopt_older_keys, config_problems, missing_mup_keys

logger = logging.get_logger(__name__)


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

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the class attribute is Transformers' contract
    attribute_map = dict(COMMON_KEYS)  # noqa: RUF012

    vocab_size: int = Architecture.vocab_size
    n_positions: int = Architecture.n_positions
    n_embd: int = Architecture.n_embd
    n_layer: int = Architecture.n_layer
    n_head: int = Architecture.n_head
    n_inner: int | None = Architecture.n_inner
    activation_function: str = Architecture.activation_function
    resid_pdrop: float = Architecture.resid_pdrop
    embd_pdrop: float = Architecture.embd_pdrop
    attn_pdrop: float = Architecture.attn_pdrop
    layer_norm_epsilon: float = Architecture.layer_norm_epsilon
    initializer_range: float = Architecture.initializer_range
    scale_attn_weights: bool = Architecture.scale_attn_weights
    use_cache: bool = True
    bos_token_id: int | None = Architecture.bos_token_id
    eos_token_id: int | list[int] | None = Architecture.eos_token_id
    pad_token_id: int | None = None
    scale_attn_by_inverse_layer_idx: bool = Architecture.scale_attn_by_inverse_layer_idx
    reorder_and_upcast_attn: bool = Architecture.reorder_and_upcast_attn
    tie_word_embeddings: bool = Architecture.tie_word_embeddings
    position_embedding_type: str = Architecture.position_embedding_type
    mup_width_scale: float = Architecture.mup_width_scale
    mup_embeddings_scale: float = Architecture.mup_embeddings_scale
    mup_output_alpha: float = Architecture.mup_output_alpha
    mup_scale_qk_dot_by_d: bool = Architecture.mup_scale_qk_dot_by_d
    alibi_scaling: dict[str, Any] | None = Architecture.alibi_scaling

    def __post_init__(self, **kwargs: Any) -> None:
        older = {key: kwargs.pop(key) for key in OLDER_KEYS if key in kwargs}
        adopted, problems = adopt_older_keys({"mup_width_scale": self.mup_width_scale, **older})
        for key, value in adopted.items():
            setattr(self, key, value)
        super().__post_init__(**kwargs)
        self.raise_problems(problems)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from the contents of a ``config.json``; warn of the muP keys that it lacks."""
        config = super().from_dict(config_dict, **kwargs)
        if warning := missing_mup_keys({**config_dict, **kwargs}):
            logger.warning(warning)
        return config

    def raise_problems(self, problems: list[str] | None = None) -> None:
        """Check every value.

        Args:
            problems: Problems found elsewhere, reported with those found here.

        Raises:
            ValueError: One line that names all problems.
        """
        found = [*(problems or []), *config_problems(self._values())]
        if found:
            raise ValueError(f"Invalid BTLM configuration: {'; '.join(found)}.")

    @property
    def architecture(self) -> Architecture:
        """The same without Transformers; how the weights are stored is not part of it."""
        return Architecture(**self._values())

    # The forward pass reads these, also while it is compiled, so they are not taken from `architecture`.

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before ALiBi and softmax (without the inverse layer index)."""
        return attention_scale(self.head_dim, scaled=self.scale_attn_weights, by_head_dim=self.mup_scale_qk_dot_by_d)

    @property
    def logits_scale(self) -> float:
        """What the output of the head is multiplied by (muP)."""
        return self.mup_output_alpha * self.mup_width_scale

    # These follow from the shape alone; nothing is allocated.

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer."""
        return self.architecture.inner_dim

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trained parameters: see :meth:`.architecture_btlm.Architecture.num_parameters`."""
        return self.architecture.num_parameters(embeddings=embeddings)

    def flops_per_token(self, context: int, *, training: bool = False, adapters: int | None = None) -> float:
        """Operations per token: see :meth:`.architecture_btlm.Architecture.flops_per_token`."""
        return self.architecture.flops_per_token(context, training=training, adapters=adapters)

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that one token adds to the key-value cache; 327,680 for BTLM-3B-8k in bf16."""
        return self.architecture.kv_bytes_per_token(dtype.itemsize)

    def weight_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of all weights in ``dtype``; 5.29 GB for BTLM-3B-8k in bf16."""
        return self.architecture.weight_bytes(8 * dtype.itemsize)

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(Architecture) if field.name != "quantization"}
