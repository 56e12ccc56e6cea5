"""A model small enough to run anywhere, in which every feature still affects the logits."""

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from btlm.model import BTLMConfig, BTLMLMHeadModel

# Twelve heads of size 4 (not a power of two, so bf16 cannot represent the slopes), an inner width that is not a
# multiple of 8, and muP multipliers that all differ.
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


def tiny_model(**overrides: Any) -> Any:
    """A `BTLMLMHeadModel` in evaluation mode, with fixed weights, nonzero biases and norms other than one."""
    torch.manual_seed(0)
    model = BTLMLMHeadModel(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def gpt2_and_ours(attention: str = "sdpa", **variant: Any) -> tuple[Any, Any]:
    """Transformers' GPT-2 with explicit attention, and our model in standard parametrization with its weights."""
    names = ("vocab_size", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    shape: dict[str, Any] = {name: TINY[name] for name in (*names, "bos_token_id", "eos_token_id")}
    shape |= {
        "n_positions": 40,
        "n_inner": None,
        "activation_function": "gelu_new",
        "initializer_range": 0.15,
        **variant,
    }
    torch.manual_seed(0)
    config: Any = GPT2Config(**shape)
    config._attn_implementation = "eager"
    gpt2 = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    standard = {
        "mup_width_scale": 1.0,
        "mup_embeddings_scale": 1.0,
        "mup_output_alpha": 1.0,
        "mup_scale_qk_dot_by_d": False,
    }
    ours = tiny_model(position_embedding_type="learned", attn_implementation=attention, **standard, **shape)
    assert ours.load_state_dict(gpt2.state_dict()) == ([], [])
    return gpt2, ours


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that tensors agree within an absolute tolerance, whatever their dtypes."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)
