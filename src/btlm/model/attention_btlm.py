"""Attention of BTLM, with ALiBi and padding but without a bias tensor.

Letters: B batch, H heads, Q queries, K keys, D head dimension, C width (``n_embd``), F folded features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from .alibi import alibi_slopes, attention_bias, fold_attention_bias, interpolated_slopes
from .configuration_btlm import BTLMConfig

# Number of queries per attention call when new tokens follow cached ones: bounds the [queries, keys] causal mask.
QUERY_BLOCK = 512


class AttentionPlan(NamedTuple):
    """Inputs that the attention of all blocks shares, made once per pass: a bias, folded features, or neither."""

    num_keys: int
    query_positions_Q: Tensor
    scale: float
    is_causal: bool
    slopes_BH: Tensor | None = None
    key_mask_BK: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    features: tuple[Tensor, Tensor] | None = None
    output_attentions: bool = False

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Features for queries and keys in ``dtype``; recomputed if a block computes in another dtype than the plan."""
        if self.features is not None and self.features[0].dtype == dtype:
            return self.features
        return fold_attention_bias(
            self.slopes_BH,
            self.query_positions_Q,
            self.num_keys,
            self.key_mask_BK,
            scale=self.scale,
            dtype=dtype,
        )


def plan_attention(
    config: BTLMConfig,
    embeds_BQC: Tensor,
    cache: Cache | None,
    attention_mask: Tensor | None,
    *,
    output_attentions: bool,
) -> AttentionPlan:
    """Make the plan of one forward pass.

    Args:
        config: Configuration of the model.
        embeds_BQC: Input of the first block; gives the number, device and dtype of the queries.
        cache: Cache, before any block has added to it.
        attention_mask: Mask ``[B, K]`` or ``[B, 1, Q, K]``, as :class:`btlm.BTLMModel` takes it.
        output_attentions: Whether to plan for explicit probabilities.

    Raises:
        ValueError: The mask has neither two nor four dimensions, is for another batch, or covers fewer tokens than are
            attended to.
    """
    if attention_mask is not None and attention_mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; give [batch, keys] or "
            "[batch, 1, queries, keys]."
        )
    if attention_mask is not None and attention_mask.shape[0] not in (1, embeds_BQC.shape[0]):
        raise ValueError(
            f"attention_mask is for a batch of {attention_mask.shape[0]}, and the input for one of "
            f"{embeds_BQC.shape[0]}; give a row of the mask for each text."
        )
    num_queries = embeds_BQC.shape[1]
    device = embeds_BQC.device
    past = cache.get_seq_length() if cache is not None else 0
    # A static cache counts its tokens in a tensor, once it holds any; then all its slots are keys.
    static = isinstance(past, Tensor)
    num_keys = cache.get_max_length() if static and cache is not None else past + num_queries
    query_positions_Q = torch.arange(num_queries, device=device) + past
    full_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
    key_mask_BK = None
    if attention_mask is not None and full_mask is None:
        key_mask_BK = attention_mask.to(device=device, dtype=torch.bool)
        if not static and key_mask_BK.shape[-1] < num_keys:
            raise ValueError(
                f"attention_mask covers {key_mask_BK.shape[-1]} tokens but {num_keys} are attended to; "
                "include the cached ones."
            )
        key_mask_BK = F.pad(key_mask_BK[:, :num_keys], (0, max(0, num_keys - key_mask_BK.shape[-1])))

    slopes_BH = None
    if config.position_embedding_type == "alibi":
        if key_mask_BK is not None:
            visible_BK = key_mask_BK & (torch.arange(num_keys, device=device) <= query_positions_Q[-1])
            key_lengths_B = visible_BK.sum(dim=-1)
        else:
            key_lengths_B = query_positions_Q[-1:] + 1
        slopes_BH = interpolated_slopes(alibi_slopes(config.n_head, device), config.alibi_scaling, key_lengths_B)

    plan = AttentionPlan(
        num_keys,
        query_positions_Q,
        scale=config.attention_scale,
        is_causal=not static and past == 0 and full_mask is None,
        slopes_BH=slopes_BH,
        key_mask_BK=key_mask_BK,
        output_attentions=output_attentions,
    )
    if num_queries == 1 or output_attentions or config._attn_implementation == "eager":
        bias = attention_bias(slopes_BH, query_positions_Q, num_keys, key_mask_BK)
        return plan._replace(bias=bias if full_mask is None else bias + _additive(full_mask[..., :num_keys]))
    if slopes_BH is not None or key_mask_BK is not None:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else embeds_BQC.dtype
        plan = plan._replace(features=plan.folded(dtype))
    if full_mask is not None:
        visible_QK = query_positions_Q[:, None] >= torch.arange(num_keys, device=device)
        mask = full_mask[..., :num_keys]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        plan = plan._replace(mask=mask.masked_fill(~visible_QK, hidden))
    return plan


class BTLMAttention(nn.Module):
    """Multi-head attention, with ALiBi and padding folded into head dimensions (see :mod:`btlm.model.alibi`)."""

    def __init__(self, config: BTLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.query_scale = 1.0 / (layer_idx + 1) if config.scale_attn_by_inverse_layer_idx else 1.0
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """Map ``[B, Q, C]`` to ``[B, Q, C]``; also return probabilities ``[B, H, Q, K]`` if the plan asks for them."""
        heads = (*hidden_states.shape[:-1], self.n_head, self.head_dim)
        query, key, value = (x.view(heads).transpose(1, 2) for x in self.c_attn(hidden_states).chunk(3, dim=-1))
        if self.query_scale != 1.0:
            query = query * self.query_scale
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            key, value = key[:, :, : plan.num_keys], value[:, :, : plan.num_keys]
        if plan.bias is not None:
            output, probabilities = self._attend_with_bias(query, key, value, plan)
        else:
            output, probabilities = self._attend_folded(query, key, value, plan), None
        output = output.transpose(1, 2).reshape(hidden_states.shape)
        return self.resid_dropout(self.c_proj(output)), probabilities

    def _attend_with_bias(
        self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with explicit scores: the fastest form for a single query, and needed to return probabilities."""
        assert plan.bias is not None
        if query.shape[2] > 1:  # in fp32, except while decoding, where that would copy the whole cache
            query, key = query.float(), key.float()
        scores_BHQK = torch.matmul(query * self.scale, key.transpose(-1, -2)).float() + plan.bias
        probabilities = scores_BHQK.softmax(dim=-1)
        weights = self.attn_dropout(probabilities).to(value.dtype)
        return torch.matmul(weights, value), probabilities if plan.output_attentions else None

    def _attend_folded(self, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        """Fused attention over queries and keys that carry ALiBi and padding in extra head dimensions."""
        if plan.features is not None:
            query_features, key_features = plan.folded(query.dtype)
            batch = query.shape[0]
            query_features = query_features.expand(batch, self.n_head, -1, -1)
            key_features = key_features.expand(batch, self.n_head, -1, -1)
            # Fused kernels need the same head size, a multiple of 8, for queries, keys and values.
            width = self.head_dim + query_features.shape[-1]
            padding = -width % 8
            query = F.pad(torch.cat((query_features, query), dim=-1), (0, padding))
            key = F.pad(torch.cat((key_features, key), dim=-1), (0, padding))
            value = F.pad(value, (0, width - self.head_dim + padding))
        dropout = self.attn_dropout.p if self.training else 0.0

        def attend(query: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
            )

        if plan.mask is not None:
            output = attend(query, plan.mask if plan.mask.dtype == torch.bool else plan.mask.to(query.dtype), False)
        elif plan.is_causal:
            output = attend(query, None, True)
        else:
            key_positions_K = torch.arange(plan.num_keys, device=key.device)
            blocks = zip(query.split(QUERY_BLOCK, dim=2), plan.query_positions_Q.split(QUERY_BLOCK), strict=True)
            outputs = [attend(block, positions[:, None] >= key_positions_K, False) for block, positions in blocks]
            output = torch.cat(outputs, dim=2)
        return output[..., : self.head_dim]


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
