"""BTLM in vLLM's layers: paged attention with ALiBi, tensor and pipeline parallelism.

The modules have the names of the checkpoint, except that the two up-projections of SwiGLU are one matrix.

Letters: T tokens of all requests of a step, C width (``n_embd``), V vocabulary.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul, get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from btlm.checkpoint.tensors import check_fit
from btlm.model import BTLMConfig
from btlm.model.alibi import alibi_slopes, interpolated_slopes
from btlm.model.architecture_btlm import HEAD, SLOPES

from .limits import check_backend, check_config
from .weights import padded_inner, pieces


class BTLMAttention(nn.Module):
    """Multi-head attention over the paged cache; each device has its share of the heads."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config: BTLMConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        width, num_heads = config.n_embd, config.n_head // get_tensor_model_parallel_world_size()
        self.c_attn = QKVParallelLinear(
            width, config.head_dim, config.n_head, bias=True, quant_config=quant_config, prefix=f"{prefix}.c_attn"
        )
        self.c_proj = RowParallelLinear(width, width, bias=True, quant_config=quant_config, prefix=f"{prefix}.c_proj")
        slopes = None
        if config.position_embedding_type == "alibi":
            first = get_tensor_model_parallel_rank() * num_heads
            slopes = _slopes(config)[first : first + num_heads]
        self.attn = Attention(
            num_heads,
            config.head_dim,
            config.attention_scale / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1),
            alibi_slopes=slopes,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        if slopes is not None:
            check_backend(self.attn.attn_backend.get_name())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[T, C]`` to ``[T, C]``."""
        qkv, _ = self.c_attn(hidden_states)
        query, key, value = qkv.chunk(3, dim=-1)
        output: Tensor = self.c_proj(self.attn(query, key, value))[0]
        return output


class BTLMMLP(nn.Module):
    """Feed-forward layer, padded with zeros so that the devices share it evenly."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: BTLMConfig = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        width = config.n_embd
        inner = padded_inner(config.inner_dim, get_tensor_model_parallel_world_size())
        self.swiglu = config.activation_function == "swiglu"
        if self.swiglu:
            self.gate_up = MergedColumnParallelLinear(
                width, [inner, inner], bias=True, quant_config=quant_config, prefix=f"{prefix}.gate_up"
            )
        else:
            self.c_fc = ColumnParallelLinear(
                width, inner, bias=True, quant_config=quant_config, prefix=f"{prefix}.c_fc"
            )
        self.c_proj = RowParallelLinear(inner, width, bias=True, quant_config=quant_config, prefix=f"{prefix}.c_proj")
        self.act = SiluAndMul() if self.swiglu else get_act_fn(config.activation_function)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[T, C]`` to ``[T, C]``."""
        inner, _ = (self.gate_up if self.swiglu else self.c_fc)(hidden_states)
        output: Tensor = self.c_proj(self.act(inner))[0]
        return output


class BTLMBlock(nn.Module):
    """Pre-LayerNorm transformer block."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: BTLMConfig = vllm_config.model_config.hf_config
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = BTLMAttention(vllm_config, int(prefix.rpartition(".")[2]), f"{prefix}.attn")
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = BTLMMLP(vllm_config, f"{prefix}.mlp")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[T, C]`` to ``[T, C]``."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        output: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return output


@support_torch_compile
class BTLMModel(nn.Module):
    """Maps token ids to final hidden states; with pipeline parallelism, the blocks of this device."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: BTLMConfig = vllm_config.model_config.hf_config
        self.embeddings_scale = config.mup_embeddings_scale
        group = get_pp_group()
        if group.is_first_rank or (group.is_last_rank and config.tie_word_embeddings):
            self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, prefix=f"{prefix}.wte")
        else:
            self.wte = PPMissingLayer()
        self.wpe = None
        if config.position_embedding_type == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd) if group.is_first_rank else PPMissingLayer()
        self.start_layer, self.end_layer, self.h = make_layers(
            config.n_layer, lambda prefix: BTLMBlock(vllm_config, prefix), prefix=f"{prefix}.h"
        )
        norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon) if group.is_last_rank else PPMissingLayer()
        self.ln_f = norm
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(["hidden_states"], config.n_embd)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run the blocks of this device; the arguments are those of :meth:`BTLMForVLLM.forward`."""
        if get_pp_group().is_first_rank:
            embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
            hidden_states = embeds * self.embeddings_scale
            if self.wpe is not None:
                hidden_states = hidden_states + self.wpe(positions)
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        for block in islice(self.h, self.start_layer, self.end_layer):
            hidden_states = block(hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        output: Tensor = self.ln_f(hidden_states)
        return output


class BTLMForVLLM(nn.Module, SupportsPP):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """BTLM with its language-modeling head, as vLLM runs it.

    Args:
        vllm_config: vLLM's configuration, with the checkpoint's ``config.json`` in it.
        prefix: Name of this module in a larger one.

    Raises:
        NotSupported: vLLM cannot run the network (:func:`.limits.check_config`), or its attention backend has no ALiBi.
    """

    packed_modules_mapping = {"gate_up": ["c_fc2", "c_fc"]}  # noqa: RUF012 - the class attribute is vLLM's contract

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: BTLMConfig = vllm_config.model_config.hf_config
        check_config(self.config)
        config = self.config
        self.transformer = BTLMModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "transformer"))
        if not get_pp_group().is_last_rank:
            self.lm_head = PPMissingLayer()
        else:
            self.lm_head = ParallelLMHead(config.vocab_size, config.n_embd, prefix=maybe_prefix(prefix, HEAD))
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.transformer.make_empty_intermediate_tensors
        self._is_loaded = False

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings ``[T, C]`` of token ids ``[T]``, before the embedding multiplier."""
        embeds: Tensor = self.transformer.wte(input_ids)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Final hidden states ``[T, C]``, or what the next device of pipeline parallelism continues from.

        Args:
            input_ids: Token ids, int ``[T]``.
            positions: Positions in their texts, int64 ``[T]``; read by learned positions.
            intermediate_tensors: What the previous device of pipeline parallelism gave.
            inputs_embeds: Embeddings ``[T, C]`` instead of ``input_ids``, before the embedding multiplier.
        """
        output: Tensor | IntermediateTensors = self.transformer(
            input_ids, positions, intermediate_tensors, inputs_embeds
        )
        return output

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits ``[T, V]`` of final hidden states, with muP's multiplier; None where another device has them."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states * self.config.logits_scale)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the tensors of a checkpoint, or some of them when all have been loaded before.

        Args:
            weights: Names and tensors as the checkpoint has them.

        Returns:
            Names of the parameters that were set.

        Raises:
            ValueError: A tensor is missing, of another shape, or not one of the network.
        """
        parameters = dict(self.named_parameters())
        architecture = self.config.architecture
        stored, loaded = set(), set()
        for piece in pieces(weights, architecture, get_tensor_model_parallel_world_size()):
            stored.add(piece.stored)
            if is_pp_missing_parameter(piece.parameter, self):
                continue
            parameter = parameters[piece.parameter]
            arguments = () if piece.part is None else (piece.part,)
            getattr(parameter, "weight_loader", _copy)(parameter, piece.tensor, *arguments)
            loaded.add(piece.parameter)
        if not self._is_loaded:
            missing = architecture.tensors.keys() - stored - {SLOPES}
            check_fit("the checkpoint", missing=missing, unexpected=[], shapes=[])
            self._is_loaded = True
        return loaded


def _slopes(config: BTLMConfig) -> list[float]:
    slopes_H = alibi_slopes(config.n_head, "cpu")  # not vLLM's default device
    no_length = torch.ones(1, device="cpu")  # which only dynamic interpolation reads
    slopes: list[float] = interpolated_slopes(slopes_H, config.alibi_scaling, no_length)[0].tolist()
    return slopes


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(tensor)
