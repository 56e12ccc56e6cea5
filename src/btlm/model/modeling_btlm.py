"""The BTLM network: GPT-2 blocks with SwiGLU, ALiBi and maximal update parametrization.

Module and tensor names, and the ``[in, out]`` layout of projections, are those of the released checkpoints.

Letters: B batch, H heads, Q queries, K keys, C width (``n_embd``).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .alibi import alibi_slopes, train_seq_len
from .architecture_btlm import TOKENIZER_FOLDER, VOCAB_SIZE
from .attention_btlm import AttentionPlan, BTLMAttention, plan_attention
from .configuration_btlm import BTLMConfig
from .mup import init_weights, mup_param_groups, name_layers, scale_embeddings, scale_logits
from .quantization_btlm import BTLMQuantizer  # noqa: F401 - importing it lets eight-bit folders load
from .tokenization_btlm import load_tokenizer

logger = logging.get_logger(__name__)


class BTLMMLP(nn.Module):
    """Feed-forward layer: ``c_proj(c_fc(x) * silu(c_fc2(x)))`` for SwiGLU (arXiv 2002.05202), else one activation."""

    def __init__(self, config: BTLMConfig) -> None:
        super().__init__()
        self.swiglu = config.activation_function == "swiglu"
        self.c_fc = Conv1D(config.inner_dim, config.n_embd)
        if self.swiglu:
            self.c_fc2 = Conv1D(config.inner_dim, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner_dim)
        self.act = ACT2FN["silu" if self.swiglu else config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, Q, C]`` to ``[B, Q, C]``."""
        if self.swiglu:
            inner = self.c_fc(hidden_states) * self.act(self.c_fc2(hidden_states))
        else:
            inner = self.act(self.c_fc(hidden_states))
        output: Tensor = self.dropout(self.c_proj(inner))
        return output


class BTLMBlock(GradientCheckpointingLayer):
    """Pre-LayerNorm transformer block."""

    def __init__(self, config: BTLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = BTLMAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = BTLMMLP(config)

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``[B, Q, C]`` to ``[B, Q, C]``; also return attention probabilities if the plan asks for them."""
        attended, probabilities = self.attn(self.ln_1(hidden_states), plan, past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states)), probabilities


class RelativePositions(nn.Module):
    """Holds the ALiBi slopes under their name in the released checkpoints.

    Checkpoints store them in bf16, whose rounding moves scores by several tenths at long distance. The slopes depend
    only on the number of heads, so attention computes them in fp32, and this copy is only for the original code.
    """

    slopes: Tensor

    def __init__(self, config: BTLMConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.register_buffer("slopes", alibi_slopes(config.n_head))


class BTLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization shared by the classes below."""

    config: BTLMConfig
    config_class = BTLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BTLMBlock"]  # noqa: RUF012 - the class attributes are Transformers' contract
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    # Causality buffers of checkpoints written by old versions of the original code.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]  # noqa: RUF012
    # Some converted checkpoints leave out the slopes; they follow from the number of heads.
    _keys_to_ignore_on_load_missing = [r"relative_pe\.slopes$"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.config)
        if isinstance(module, RelativePositions):
            with torch.no_grad():
                module.slopes.copy_(alibi_slopes(module.n_head, module.slopes.device))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, save_code: bool = False, **kwargs: Any
    ) -> None:
        """Write a checkpoint folder that the original code loads too, with the tokenizer if it fits the vocabulary.

        Args:
            save_directory: Folder to write.
            *args: Arguments of :meth:`transformers.PreTrainedModel.save_pretrained`.
            save_code: Whether to put the network's code beside the weights, so that the folder loads with
                ``trust_remote_code=True`` where btlm is not installed.
            **kwargs: Arguments of :meth:`transformers.PreTrainedModel.save_pretrained`.
        """
        with _carry_code(self) if save_code else nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)
        fits = self.config.vocab_size == VOCAB_SIZE and TOKENIZER_FOLDER.exists()
        if fits and not (Path(save_directory) / "tokenizer_config.json").exists():
            load_tokenizer().save_pretrained(save_directory)

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: Tensor | None, past_key_values: Cache | None = None, **_: Any
    ) -> Tensor | None:
        """Keep the two-dimensional padding mask: causality and ALiBi need no mask tensor here.

        It gets the length of the static cache for which this is called, so that every step of decoding has the same
        shapes: on a GPU, each new shape would record another CUDA graph.
        """
        if attention_mask is None or past_key_values is None:
            return attention_mask
        return F.pad(attention_mask, (0, max(0, past_key_values.get_max_length() - attention_mask.shape[-1])))


class BTLMModel(BTLMPreTrainedModel):
    """Maps token ids to final hidden states."""

    def __init__(self, config: BTLMConfig) -> None:
        config.raise_problems()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position_embedding_type == "alibi":
            self.relative_pe = RelativePositions(config)
        else:
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([BTLMBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        name_layers(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the blocks.

        Args:
            input_ids: Tokens that are not in the cache, int64 ``[B, Q]``.
            past_key_values: Cache with the keys and values of the tokens before them.
            attention_mask: Mask ``[B, K]`` with 0 at padding, anywhere in the row; or ``[B, 1, Q, K]``, boolean or
                additive, to hide more, for example the other documents of a packed row. Later keys are hidden in any
                case.
            position_ids: Positions, int64 ``[B, Q]``, used by learned positions. ALiBi is relative to the slots of the
                tokens.
            inputs_embeds: Embeddings ``[B, Q, C]`` instead of ``input_ids``, before the embedding multiplier.
            use_cache: Whether to return a cache; by default ``config.use_cache``. Gradient checkpointing returns none.
            output_attentions: Whether to return fp32 probabilities ``[B, H, Q, K]`` per block (explicit attention).
            output_hidden_states: Whether to return the input of every block and the final output.
            return_dict: Whether to return an output object, not a tuple.
            **kwargs: Further arguments that generation passes; they are ignored.

        Raises:
            ValueError: Neither or both of ``input_ids`` and ``inputs_embeds`` are given, the mask does not fit, the
                text is longer than a learned position table, or keys are cached while gradients are checkpointed.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("Gradient checkpointing cannot use cached keys; turn it off, or pass the whole text.")
            use_cache = False
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=config)

        embeds_BQC = scale_embeddings(inputs_embeds, config)
        if config.position_embedding_type == "learned":
            embeds_BQC = embeds_BQC + self._position_embeddings(embeds_BQC, cache, attention_mask, position_ids)
        num_new = embeds_BQC.shape[1]
        if cache is not None and train_seq_len(config.alibi_scaling) is not None:
            embeds_BQC = self._recompute_if_rescaled(embeds_BQC, cache, attention_mask)

        plan = plan_attention(config, embeds_BQC, cache, attention_mask, output_attentions=bool(output_attentions))
        hidden_states = self.drop(embeds_BQC)
        all_hidden_states: tuple[Tensor, ...] = ()
        all_attentions: tuple[Tensor | None, ...] = ()
        for block in self.h:
            all_hidden_states += (hidden_states[:, -num_new:],) if output_hidden_states else ()
            hidden_states, probabilities = block(hidden_states, plan, past_key_values=cache)
            all_attentions += (probabilities[:, :, -num_new:],) if output_attentions else ()
        hidden_states = self.ln_f(hidden_states[:, -num_new:])
        all_hidden_states += (hidden_states,) if output_hidden_states else ()

        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=all_hidden_states or None,  # type: ignore[arg-type]  # annotated with legacy tensor types
            attentions=all_attentions or None,  # type: ignore[arg-type]
        )
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _position_embeddings(
        self, embeds_BQC: Tensor, cache: Cache | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        past = cache.get_seq_length() if cache is not None else 0
        num_queries = embeds_BQC.shape[1]
        if not isinstance(past, Tensor) and past + num_queries > self.config.n_positions:
            raise ValueError(
                f"{past + num_queries} tokens do not fit the {self.config.n_positions} learned positions (n_positions)."
            )
        if position_ids is None:
            position_ids = (torch.arange(num_queries, device=embeds_BQC.device) + past)[None]
            if attention_mask is not None and attention_mask.ndim == 2:
                counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
                position_ids = counted.gather(1, position_ids.expand(len(counted), -1))
        positions: Tensor = self.wpe(position_ids)
        return positions

    def _recompute_if_rescaled(self, embeds_BQC: Tensor, cache: Cache, attention_mask: Tensor | None) -> Tensor:
        """Under dynamic interpolation, replay the whole text once its length changes the slopes.

        The slopes depend on the total length, so past the training length every token changes the keys and values that
        deeper blocks hold for *all* tokens. To give the logits of an uncached forward, the cache carries the embeddings
        of its tokens as one more layer (which beam search reorders with the others), and beyond the training length
        the blocks run again over all of them.

        Returns:
            The embeddings that the blocks have to process: the new ones, or those of the whole text.

        Raises:
            ValueError: The mask has rows only for the new tokens.
        """
        trained = train_seq_len(self.config.alibi_scaling)
        assert trained is not None
        past = int(cache.get_seq_length())
        total = past + embeds_BQC.shape[1]
        replay = past > 0 and total > trained
        if replay and attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError(
                f"attention_mask has rows only for the new tokens, but past train_seq_len ({trained}) dynamic "
                "interpolation runs over the whole text; give a mask [batch, keys], or no cache."
            )
        layers: list[Any] = cache.layers
        n_layer = self.config.n_layer
        if len(layers) < n_layer:  # a dynamic cache adds its layers on first use
            layers.extend(DynamicLayer() for _ in range(n_layer - len(layers)))
        if len(layers) == n_layer:
            static = isinstance(layers[0], StaticLayer)
            layers.append(StaticLayer(max_cache_len=layers[0].max_cache_len) if static else DynamicLayer())
        all_embeds, _ = layers[n_layer].update(embeds_BQC[:, None], embeds_BQC[:, None, :, :0])
        if not replay:
            return embeds_BQC
        logger.warning_once(
            f"The text exceeds train_seq_len ({trained}): dynamic interpolation changes with every token, so each "
            'step runs over the whole text. A fixed {"type": "linear", "factor": ...} keeps the cache.'
        )
        for layer in layers[:n_layer]:
            layer.reset()
            layer.is_initialized = layer.is_initialized and not isinstance(layer, DynamicLayer)
        replayed: Tensor = all_embeds[:, 0, :total]
        return replayed


class BTLMLMHeadModel(BTLMPreTrainedModel, GenerationMixin):
    """BTLM with its language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: BTLMConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = BTLMModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        name_layers(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and the loss if ``labels`` are given; the other arguments are those of :class:`BTLMModel`.

        Args:
            labels: Token ids, int64 ``[B, Q]``, usually ``input_ids``: they are shifted inside, and -100 is ignored.
            logits_to_keep: Number of last tokens to compute logits for (0 for all), or their indices.

        Returns:
            ``logits`` ``[B, Q, vocab_size]`` with the muP output multiplier applied, ``loss`` the mean cross-entropy in
            nats per token, and what :class:`BTLMModel` returns.
        """
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(scale_logits(outputs.last_hidden_state[:, kept], self.config))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def get_mup_param_groups(
        self, lr: float, weight_decay: float = 0.0, decoupled_wd: bool = True
    ) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: see :func:`btlm.model.mup.mup_param_groups`."""
        return mup_param_groups(self.named_parameters(), self.config, lr, weight_decay, decoupled_wd)


@contextmanager
def _carry_code(model: BTLMPreTrainedModel) -> Iterator[None]:
    """In this context, saving also copies the code: Transformers does so for classes that name their Auto class."""
    model_class, config_class = type(model), type(model.config)
    before = model_class._auto_class, config_class._auto_class
    task = model_class.__name__.partition("For")[2] if not isinstance(model, GenerationMixin) else "CausalLM"
    model_class._auto_class = f"AutoModelFor{task}" if task else "AutoModel"
    config_class._auto_class = "AutoConfig"
    try:
        yield
    finally:
        model_class._auto_class, config_class._auto_class = before
        model.config.__dict__.pop("auto_map", None)
