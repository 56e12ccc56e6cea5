"""The models that `btlm coord-check` trains, one parametrization at several widths, and what is observed in them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.architecture_btlm import EMBEDDING, HIDDEN, MUP_TABLE, RESIDUAL
from btlm.train.recipe import Optimizer

from .options import HIDDEN_MATRICES, RESIDUAL_MATRICES, CoordCheck

# Fraction of the peak learning rate, since the check is early in warm-up. Smaller steps are closer to the theory of the
# first steps. With 0.1, 0.3 and 1, muP passed and the ablations matrix-lr and scores failed.
LR_FACTOR = 0.1

QUANTITIES = {EMBEDDING: "embedding weights", HIDDEN: HIDDEN_MATRICES, RESIDUAL: RESIDUAL_MATRICES}


def is_mup(config: BTLMConfig) -> bool:
    """Whether a configuration uses muP, and so scales with its width."""
    return config.mup_scale_qk_dot_by_d or config.mup_width_scale != 1.0


def build_model(check: CoordCheck, config: BTLMConfig, width: int, vocab_size: int) -> BTLMLMHeadModel:
    """The model at one width, without the rows of ``check.ablate``. At base width, only ``scores`` matters."""
    scale = config.mup_width_scale * config.n_embd / width if is_mup(config) else 1.0
    values = config.to_dict() | {
        "mup_width_scale": scale,
        "vocab_size": vocab_size,
        "n_positions": check.row_length,
        "n_embd": width,
        "n_layer": check.layers,
        "n_head": check.heads,
        "n_inner": max(1, round(width * config.inner_dim / config.n_embd)),
        "alibi_scaling": None,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
    }
    if "scores" in check.ablations:
        values["mup_scale_qk_dot_by_d"] = False
    if "logits" in check.ablations:
        values["mup_output_alpha"] /= scale
    if "embedding-multiplier" in check.ablations:
        values["mup_embeddings_scale"] *= math.sqrt(scale)
    model = BTLMLMHeadModel(BTLMConfig(**values))
    rescaled = {
        "hidden-init": (HIDDEN_MATRICES, 1 / math.sqrt(scale)),
        "residual-init": (RESIDUAL_MATRICES, 1 / math.sqrt(scale)),
        "embedding-init": ("embedding weights", math.sqrt(scale)),
    }
    factors = dict(rescaled[name] for name in check.ablations if name in rescaled)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (kind := _weight_kind(name)) in factors:
                parameter.mul_(factors[kind])
    model.train()
    return model


def build_optimizer(check: CoordCheck, model: BTLMLMHeadModel, options: Optimizer) -> torch.optim.AdamW:
    """AdamW on the parameter groups of muP, without the rows of ``check.ablate``."""
    groups = model.get_mup_param_groups(LR_FACTOR * options.lr, options.weight_decay)
    scale = model.config.mup_width_scale
    factors = {"matrix-lr": ("matrices", 1 / scale), "embedding-lr": ("embeddings", scale)}
    factors["bias-lr"] = ("biases_and_norms", scale)
    changed = dict(factors[name] for name in check.ablations if name in factors)
    for group in groups:
        group["lr"] *= changed.get(group["name"], 1.0)
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)


@torch.no_grad()
def observe(model: BTLMLMHeadModel, input_ids: Tensor) -> dict[str, list[Tensor]]:
    """Activations for a batch, and copies of the parameters, by quantity: one tensor per layer or parameter."""
    seen: dict[str, list[Tensor]] = {}

    def keep(module: torch.nn.Module, name: str, of: Callable[[Any], Tensor] = lambda output: output) -> None:
        hooks.append(module.register_forward_hook(lambda *call: seen.setdefault(name, []).append(of(call[-1]))))

    hooks: list[Any] = []
    keep(model.transformer.drop, "embeddings")
    for block in model.transformer.h:
        keep(block.attn.c_attn, "queries, keys, values")  # type: ignore[arg-type, union-attr]
        keep(block.attn.c_attn, "scores", lambda output: _scores(output, model.config))  # type: ignore[arg-type, union-attr]
        keep(block.attn.c_proj, "attention output")  # type: ignore[arg-type, union-attr]
        keep(block.mlp.c_fc, "MLP inner")  # type: ignore[arg-type, union-attr]
        keep(block.mlp.c_proj, "MLP output")  # type: ignore[arg-type, union-attr]
        keep(block, "residual stream", lambda output: output[0])
    seen["logits"] = [model(input_ids, use_cache=False).logits]
    for hook in hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        seen.setdefault(_weight_kind(name), []).append(parameter.clone())
    return seen


def _scores(projected: Tensor, config: BTLMConfig) -> Tensor:
    """Scaled query-key products of all queries and the keys visible to them, without ALiBi."""
    heads = (*projected.shape[:-1], config.n_head, config.head_dim)
    query, key, _ = (x.view(heads).transpose(1, 2) for x in projected.chunk(3, dim=-1))
    length = projected.shape[1]
    visible_QK = torch.ones(length, length, dtype=torch.bool, device=projected.device).tril()
    return (config.attention_scale * query @ key.transpose(-1, -2))[..., visible_QK]


def _weight_kind(name: str) -> str:
    """The quantity that a parameter belongs to. Its name decides, not the muP table, since the table is under test."""
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if kind != "weight" or layer.startswith("ln_"):
        return "biases and norms"
    return QUANTITIES[MUP_TABLE[layer]]
