"""A second implementation of BTLM's network, written only from its formulas, as a reference for the tests.

It is one function of a state dict, with scores as an explicit matrix. In fp64 its results count as exact. In a shorter
dtype, scores, position bias and probabilities are tensors of that dtype.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """Logits ``[B, Q, vocabulary]``, and for every block attention probabilities ``[B, H, Q, Q]``."""

    logits: Tensor
    probabilities: list[Tensor]


def press_slopes(n_head: int) -> list[float]:
    """Slopes by the recursion of Press et al. (arXiv 2108.12409, the authors' code)."""
    if math.log2(n_head).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n_head) - 3)))
        return [start * start**head for head in range(n_head)]
    below = 2 ** math.floor(math.log2(n_head))
    return press_slopes(below) + press_slopes(2 * below)[0::2][: n_head - below]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm over the last dimension, computed in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, computed in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (1 + (-wide).exp())).to(x.dtype)


def forward(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    input_ids: Tensor,
    *,
    key_mask: Tensor | None = None,
    visible: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Reference:
    """Logits of an ALiBi, muP and SwiGLU model.

    Args:
        state: Tensors under the released names; cast to ``dtype``.
        config: The released ``config.json``, as a dictionary.
        input_ids: ``[B, Q]``.
        key_mask: ``[B, Q]``, zero at padding.
        visible: ``[Q, Q]``, the keys that each query sees, instead of all earlier ones.
        dtype: Dtype of the whole computation.
    """
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    batch, length = input_ids.shape
    n_head, head_dim = config["n_head"], config["n_embd"] // config["n_head"]
    key_mask = torch.ones(batch, length) if key_mask is None else key_mask
    positions = torch.arange(length)
    visible = positions[:, None] >= positions if visible is None else visible
    allowed = visible & key_mask.bool()[:, None, None, :]

    scaling = config.get("alibi_scaling") or {}
    divisor = torch.full((batch,), float(scaling.get("factor") or 1.0), dtype=torch.float64)
    if "train_seq_len" in scaling:
        divisor = (key_mask.double().sum(-1) / scaling["train_seq_len"]).clamp(min=1.0)
    slopes = torch.tensor(press_slopes(n_head), dtype=torch.float64) / divisor[:, None]
    distance = (positions[:, None] - positions).abs().to(dtype)
    bias = -slopes.to(dtype)[:, :, None, None] * distance

    def project(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_epsilon"])

    x = weights["transformer.wte.weight"][input_ids] * config["mup_embeddings_scale"]
    probabilities = []
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}"
        query, key, value = project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config["n_embd"], dim=-1)
        query, key, value = (y.view(batch, length, n_head, head_dim).transpose(1, 2) for y in (query, key, value))
        scores = query @ key.transpose(-1, -2) / (head_dim if config["mup_scale_qk_dot_by_d"] else math.sqrt(head_dim))
        scores = (scores + bias).masked_fill(~allowed, torch.finfo(dtype).min)
        probabilities.append(scores.softmax(-1))
        attended = (probabilities[-1] @ value).transpose(1, 2).reshape(batch, length, -1)
        x = x + project(attended, f"{block}.attn.c_proj")
        hidden = norm(x, f"{block}.ln_2")
        gated = project(hidden, f"{block}.mlp.c_fc") * silu(project(hidden, f"{block}.mlp.c_fc2"))
        x = x + project(gated, f"{block}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T
    return Reference(logits * (config["mup_output_alpha"] * config["mup_width_scale"]), probabilities)


def logits_of(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Expected logits of a model, in fp64 whatever its own dtype; the arguments are those of :func:`forward`."""
    with torch.no_grad():
        return forward(model.state_dict(), model.config.to_dict(), input_ids, **kwargs).logits


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, each given the tokens before it; labels of -100 are left out."""
    log_probabilities = logits[:, :-1] - logits[:, :-1].logsumexp(-1, keepdim=True)
    counted = labels[:, 1:] != -100
    chosen = log_probabilities.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return -chosen[counted].mean()
