"""Memory of one device in a step, by what it is for, from the numbers of a recipe alone."""

import math
from typing import Any

from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import ATTENTION_OUTPUT, DOWN, GATE, UP
from btlm.train.cost import num_adapter_parameters
from btlm.train.loss import CHUNK_TOKENS
from btlm.train.recipe import Recipe

_FP32 = 4


def memory_per_device(
    recipe: Recipe, shards: int, config: BTLMConfig | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """Bytes of one device by what they are for, at the moment of a step when they are most.

    Not counted: the CUDA context, buffers of NCCL, what the allocator loses to fragments, and what compilation saves.

    Args:
        recipe: The run.
        shards: Devices that one copy of the state is cut over; 1 is a single process, without FSDP.
        config: Of the model, where it is at hand.
        tokens: Of a forward pass; the recipe's micro-batch by default.

    Returns:
        - ``shards``: as given.
        - ``moment``: ``loss``, or ``backward`` (of a block), which is never less than its forward pass.
        - ``weights``: fp32, over the shards; with LoRA the frozen ones and the adapters.
        - ``gradients``: fp32, over the shards; with LoRA those of the adapters.
        - ``optimizer``: both moments of AdamW in fp32, for what has gradients, over the shards.
        - ``gathered``: weights in use, and gradients that are not reduced or summed yet; see :func:`_gathered_bytes`.
        - ``activations``: of one forward pass in the graph, :func:`block_bytes_per_token` for each block; with
          checkpointing the input of every block, in fp32 whatever the weights are gathered in, and all of one block.
          Then the final norm, masks of documents, and gradients within a block.
        - ``head``: buffers of :mod:`btlm.train.loss`, in its forward or backward pass, whichever are more.
        - ``total``.
    """
    config = config or recipe.config
    tokens = tokens or recipe.micro_batch_tokens
    adapters = num_adapter_parameters(recipe, config)
    parameters = config.num_parameters()
    trained = parameters if recipe.lora is None else adapters
    state = {
        "weights": math.ceil(_FP32 * (parameters + adapters) / shards),
        "gradients": math.ceil(_FP32 * trained / shards),
        "optimizer": math.ceil(2 * _FP32 * trained / shards),
    }
    gathered = _gathered_bytes(recipe, config, shards)
    activations = _activation_bytes(recipe, config, tokens)
    head = {"loss": _head_bytes(recipe, config, shards, tokens), "backward": 0}
    moment = max(head, key=lambda moment: gathered[moment] + activations[moment] + head[moment])
    parts = {
        **state,
        "gathered": gathered[moment],
        "activations": activations[moment],
        "head": head[moment],
    }
    return {"shards": shards, "moment": moment, **parts, "total": sum(parts.values())}


def _gathered_bytes(recipe: Recipe, config: BTLMConfig, shards: int) -> dict[str, int]:
    """Bytes at each moment of weights as they are used, and of gradients before they are reduced.

    FSDP2 (``torch.distributed.fsdp.fully_shard``, and ``foreach_reduce`` behind it) keeps what is outside the blocks
    gathered during forward and backward, with its gradient. It gathers the blocks one by one, fetching one ahead; the
    gradient of a block is copied to fp32 to be reduced. All else is in ``gather_dtype``.

    Products in bf16 of fp32 weights add bf16 copies, which the graph keeps for the blocks that it holds: all of them,
    or with checkpointing the one that is run again. Autocast keeps none besides: its cache is off in
    :class:`btlm.train.step.LossModel`. The gradient of the head waits for that of the token table, the same weight.
    """
    layers, size, products = config.n_layer, _weight_bytes(recipe, shards), _product_bytes(recipe)
    adapters = num_adapter_parameters(recipe, config) // layers
    weights = sum(math.prod(matrix) for matrix in config.architecture.matrices.values())
    block = sum(math.prod(tensor.shape) for tensor in config.architecture.block_tensors.values())
    outside = config.num_parameters() - layers * block

    one_block = products * weights if products < size else 0
    checkpointing = recipe.precision.activation_checkpointing
    copies = {
        "loss": one_block * (0 if checkpointing else layers),
        "backward": one_block * (1 if checkpointing else layers),
    }
    if shards == 1:
        if recipe.lora is None and config.tie_word_embeddings:
            copies["backward"] += _FP32 * config.vocab_size * config.n_embd
        return copies
    trained_block, trained_outside = (block, outside) if recipe.lora is None else (adapters, 0)
    blocks = 2 * size * (block + adapters)
    reduced = max(blocks + (size + _FP32) * trained_block, _FP32 * trained_outside)
    return {
        "loss": size * outside + copies["loss"],
        "backward": size * (outside + trained_outside) + reduced + copies["backward"],
    }


def _activation_bytes(recipe: Recipe, config: BTLMConfig, tokens: int) -> dict[str, int]:
    """Bytes of activations at each moment of a forward and backward pass, those of the head apart."""
    width, inner, size, layers = config.n_embd, config.inner_dim, _product_bytes(recipe), config.n_layer
    block = block_bytes_per_token(recipe, config)
    final_norm = _FP32 * width + 2 * _FP32
    # With checkpointing, the input of the block that is run again is among those that are kept.
    graph, again = layers * block, 0
    if recipe.precision.activation_checkpointing:
        graph, again = layers * _FP32 * width, block - _FP32 * width
    graph += width if config.embd_pdrop else 0
    # Masks of one byte: of documents, while the loss is computed; of documents and causality, while blocks are run.
    mask = _longest(recipe) if recipe.data.mask_documents else 0
    # Gradients of the residual stream, of the output of the feed-forward layer, and of what its activation gives. Then
    # of what it takes, or of the last matrix.
    at_once = tokens * (_FP32 * width + size * width + size * inner)
    at_once += max(tokens * size * inner, _FP32 * width * inner if recipe.lora is None else 0)
    if recipe.lora is not None and size != _FP32 and DOWN in adapted_matrices(recipe, config):
        # PEFT casts the input of this matrix to fp32: beside it, its output twice, and what the norm gave, while the
        # gradient of the residual stream waits.
        at_once = max(at_once, tokens * (2 * _FP32 * width + 2 * size * width + (size + _FP32) * inner))
    return {
        "loss": tokens * (graph + final_norm + 2 * mask),
        "backward": tokens * (graph + again + (mask if recipe.precision.activation_checkpointing else 0)) + at_once,
    }


def block_bytes_per_token(recipe: Recipe, config: BTLMConfig) -> int:
    """Bytes a token that the graph of one block keeps for the backward pass, its input among them.

    Read off :class:`btlm.model.modeling_btlm.BTLMBlock` under autocast, and measured in ``tests/plan/test_memory.py``:
    each norm keeps its fp32 input and two statistics; each trained or adapted matrix its input in the dtype of
    products, cast anew for each; attention its queries, keys, values and output, which ALiBi makes wider, and one sum a
    head in fp32; the feed-forward layer what its activation is computed from. ``gelu_new`` is counted as on a CPU;
    autocast on a GPU runs its power in fp32. Dropout keeps a mask of one byte a value. ``mask_documents`` keeps a mask
    in the dtype of products.
    """
    width, inner, heads = config.n_embd, config.inner_dim, config.n_head
    size, lora = _product_bytes(recipe), recipe.lora
    alibi = config.position_embedding_type == "alibi"
    # Features of btlm.model.alibi.fold_attention_bias, and head dimensions rounded up to a multiple of 8.
    features = 8 if _longest(recipe) <= 2**16 else 10
    attended = heads * math.ceil((config.head_dim + features) / 8) * 8 if alibi else width
    kept = 2 * (_FP32 * width + 2 * _FP32) + 4 * size * attended + _FP32 * heads
    kept += size * inner * {"swiglu": 3, "gelu_new": 4}.get(config.activation_function, 1)
    kept += 2 * width if config.resid_pdrop else 0
    kept += size * _longest(recipe) if recipe.data.mask_documents else 0

    matrices = config.architecture.matrices
    used = list(matrices) if lora is None else adapted_matrices(recipe, config)
    # An input that is kept already: fp32 products read what the norm wrote, and some layers what the one before keeps.
    # Adapters cast theirs twice, to fp32 and back, or drop some of it: a copy of its own.
    kept_already = set()
    if lora is None or (size == _FP32 and not lora.dropout):
        kept_already |= {GATE} if size == _FP32 and UP in used else set()
        kept_already |= set() if alibi else {ATTENTION_OUTPUT}
        kept_already |= {DOWN} if config.activation_function == "relu" else set()
    kept += sum(size * matrices[name][0] for name in used if name not in kept_already)
    if lora is not None:
        kept += sum(size * lora.rank + (matrices[name][0] if lora.dropout else 0) for name in used)
    return kept


def adapted_matrices(recipe: Recipe, config: BTLMConfig) -> list[str]:
    """Names of the matrices of a block that have adapters; none without LoRA."""
    return [] if recipe.lora is None else config.architecture.adapted_matrices(recipe.lora.target_modules)


def _head_bytes(recipe: Recipe, config: BTLMConfig, shards: int, tokens: int) -> int:
    size, weight = _product_bytes(recipe), _weight_bytes(recipe, shards)
    head = config.vocab_size * config.n_embd
    chunk = min(CHUNK_TOKENS["cuda"], tokens) * config.vocab_size
    # Logits and their probabilities, and a copy of the head in the dtype of products.
    forward, backward = 2 * size * chunk + (head * size if size != weight else 0), 0
    if recipe.lora is None:
        # The gradient of the head and that of a chunk; before and after it is scaled, and in the dtype of the weight.
        forward += head * (_FP32 + size)
        backward = head * (2 * _FP32 + (weight if weight != _FP32 else 0))
    # Hidden states and their gradient.
    hidden = 2 * size * tokens * config.n_embd
    return max(forward, backward) + hidden


def _weight_bytes(recipe: Recipe, shards: int) -> int:
    """Bytes of a weight as modules see it; nothing is gathered for a single process."""
    return 2 if shards > 1 and recipe.parallelism.gather_dtype == "bfloat16" else _FP32


def _product_bytes(recipe: Recipe) -> int:
    return 2 if recipe.precision.dtype == "bfloat16" else _FP32


def _longest(recipe: Recipe) -> int:
    return max(stage.sequence_length for stage in recipe.stages)
