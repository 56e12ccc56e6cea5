"""A model small enough to run anywhere, whose every feature still shows in its logits."""

from typing import Any

import torch
from torch import Tensor

from btlm.model import BTLMConfig, BTLMLMHeadModel

# Twelve heads (no power of two, and slopes that bf16 cannot hold) of size 4, an inner width that is no multiple of 8,
# and muP multipliers all different.
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 12,
    "n_inner": 52,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.4,
    "mup_width_scale": 0.5,
    "mup_embeddings_scale": 3.0,
    "mup_output_alpha": 1.2,
    "mup_scale_qk_dot_by_d": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_config(**overrides: Any) -> BTLMConfig:
    return BTLMConfig(**{**TINY, **overrides})


def tiny_model(**overrides: Any) -> BTLMLMHeadModel:
    """In evaluation mode, always the same weights, with biases and norms that are not neutral."""
    torch.manual_seed(0)
    model = BTLMLMHeadModel(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
