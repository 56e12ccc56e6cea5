"""`btlm export-gguf`: a checkpoint as one file for llama.cpp, in its `jais` architecture.

That architecture computes what BTLM does, with fixed scales: scores are divided by the head dimension, embeddings and
logits are not scaled. The scales of BTLM are therefore folded into weights. Tensors are read, converted and written one
at a time; of the model no more than the largest of them is in memory.

Letters: C width (``n_embd``), F feed-forward width, V vocabulary.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import DownloadColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensors import Weights
from btlm.checkpoint.to_transformers import load_model
from btlm.console import gigabytes, note, progress_bars
from btlm.files import locked, require_space, whole_file
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import (
    ATTENTION_OUTPUT,
    DOWN,
    FINAL_NORM,
    GATE,
    HEAD,
    QUERY_KEY_VALUE,
    TOKEN_TABLE,
    UP,
    block_name,
)

from .options import GGUF

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# The largest magnitude that a matrix can hold: the scale of a block is fp16 too.
TYPES = {"F32": float(np.finfo(np.float32).max), "F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
# The head has a type of its own, since its errors are those of the logits: llama.cpp rounds what it multiplies with F16
# to F16 too, which makes most of the error of such a file.
HEAD_TYPES = {"F32": "F32", "F16": "F32", "Q8_0": "Q8_0", "Q4_0": "Q8_0"}
# Weights of a block of Q8_0 and Q4_0; rows of matrices are cut into them.
BLOCK = 32
# Weights of a block of the K types, which `llama-quantize` makes of an F16 file.
K_BLOCK = 256

_TABLE, _HEAD = f"{TOKEN_TABLE}.weight", f"{HEAD}.weight"
# Bytes that a token and its merge may take in the file, generously: for the check of disk space alone.
_TOKEN_BYTES = 100


def export_gguf(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    type: str,  # noqa: A002 - as on the command line
    base: Path | str | None = None,
) -> None:
    """Write a checkpoint, tokenizer included, as a GGUF file that stock llama.cpp runs.

    Vectors are stored in F32, and the head in more bits than other matrices (``HEAD_TYPES``).

    Args:
        model: An open checkpoint, its folder, or its id on the Hugging Face Hub; quantized weights are decoded.
        output: New file; appears when it is complete.
        type: Of the matrices, one of ``TYPES``.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Raises:
        ModuleNotFoundError: The library ``gguf`` is not installed.
        ValueError: One line: the type is unknown, ``output`` exists or does not fit on the disk, the checkpoint cannot
            be loaded, or it is one that llama.cpp's architecture cannot compute.
    """
    output = Path(output)
    GGUF(type)  # type: ignore[arg-type]  # it checks the type
    if output.exists():
        raise ValueError(f"{output} exists; give a new file or remove it.")
    import gguf

    checkpoint = open_checkpoint(model, base)
    config = checkpoint.config()
    if problem := architecture_problem(config, type):
        raise ValueError(f"{checkpoint.name} cannot be exported: {problem}")
    vocabulary = _vocabulary(checkpoint, config)
    ends = _ends(checkpoint)
    targets = list(_targets(config))
    types = [_type_of(target, type) for target in targets]
    sizes = [_num_bytes(target.shape, kind) for target, kind in zip(targets, types, strict=True)]
    needed = sum(sizes) + _TOKEN_BYTES * config.vocab_size
    require_space(output, needed, "choose another place or a smaller type")
    read = _reader(checkpoint, config)

    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output), whole_file(output) as partial, progress_bars(DownloadColumn()) as progress:
        writer = gguf.GGUFWriter(partial, "jais")
        try:
            _describe(writer, config, checkpoint.title.rpartition("/")[2], type)
            _add_vocabulary(writer, vocabulary, ends, config)
            for target, kind, size in zip(targets, types, sizes, strict=True):
                writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            task = progress.add_task("export", total=sum(sizes))
            for target, kind, size in zip(targets, types, sizes, strict=True):
                writer.write_tensor_data(_encode(target, read, kind))
                progress.advance(task, size)
        finally:
            writer.close()
    padded = padded_inner_dim(config)
    padding = f", feed-forward width {config.inner_dim:,} padded to {padded:,}" if padded != config.inner_dim else ""
    note(f"wrote {output}: {gigabytes(output.stat().st_size)}, matrices in {type}{padding}")


def architecture_problem(config: BTLMConfig, type: str) -> str | None:  # noqa: A002
    """Why llama.cpp's `jais` cannot compute this model, in one sentence with the remedy; ``None`` if it can."""
    if config.position_embedding_type != "alibi":
        return f"position_embedding_type is {config.position_embedding_type!r}, and llama.cpp's jais knows only ALiBi."
    if config.activation_function != "swiglu":
        return f"activation_function is {config.activation_function!r}, and llama.cpp's jais knows swiglu alone."
    if config.alibi_scaling is not None:
        # Slopes there are 2 ** (-max_alibi_bias * (i + 1) / heads): a quotient of all slopes is none of that form.
        return (
            f"alibi_scaling is {config.alibi_scaling}, and llama.cpp cannot divide the slopes of ALiBi; set it to null "
            "in config.json to export the model without interpolation."
        )
    if type in ("Q8_0", "Q4_0") and config.n_embd % BLOCK:
        return (
            f"n_embd is {config.n_embd}, and {type} stores rows in blocks of {BLOCK} weights, so it has to be a "
            f"multiple of {BLOCK}; choose F16."
        )
    return None


def padded_inner_dim(config: BTLMConfig) -> int:
    """Feed-forward width in the file: rows of the down-projection have to be whole blocks.

    Where the width of the model is whole K blocks, so is this, so that `llama-quantize` can make any type of an F16
    file (6826 becomes 6912); else it is whole blocks of Q8_0 and Q4_0. The neurons that are added have zero weights and
    biases, and put out zero.
    """
    block = BLOCK if config.n_embd % K_BLOCK else K_BLOCK
    return -(-config.inner_dim // block) * block


# Tensors


class _Target(NamedTuple):
    """A tensor of the file: matrices are ``[out, in]``."""

    name: str
    source: str
    shape: tuple[int, ...]
    convert: Callable[[Tensor], Tensor]


def _targets(config: BTLMConfig) -> Iterator[_Target]:
    """Every tensor of the architecture, and how it is made of one of the checkpoint in fp32, which may be changed."""
    width, inner, vocabulary = config.n_embd, padded_inner_dim(config), config.vocab_size
    missing = inner - config.inner_dim

    def same(tensor: Tensor) -> Tensor:
        return tensor

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.mul_(factor)

    def pad(tensor: Tensor) -> Tensor:
        """Zero neurons, which are the first dimension."""
        return torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, missing))

    def query(factor: float) -> Callable[[Tensor], Tensor]:
        def convert(tensor: Tensor) -> Tensor:
            tensor[:width].mul_(factor)
            return tensor

        return convert

    def layer(
        name: str, source: str, outputs: int, inputs: int, convert: Callable[[Tensor], Tensor]
    ) -> Iterator[_Target]:
        yield _Target(f"{name}.weight", f"{source}.weight", (outputs, inputs), lambda tensor: convert(tensor.T))
        yield _Target(f"{name}.bias", f"{source}.bias", (outputs,), convert)

    def norm(name: str, source: str, factor: float = 1.0) -> Iterator[_Target]:
        for part in ("weight", "bias"):
            yield _Target(f"{name}.{part}", f"{source}.{part}", (width,), times(factor))

    yield _Target("token_embd.weight", _TABLE, (vocabulary, width), times(config.mup_embeddings_scale))
    # The head is linear, so that the scale of logits can stand before it, where it is exact in any type.
    yield from norm("output_norm", FINAL_NORM, config.logits_scale)
    yield _Target("output.weight", _HEAD, (vocabulary, width), same)
    for i in range(config.n_layer):
        block, source = f"blk.{i}", block_name(i)
        depth = i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        yield from norm(f"{block}.attn_norm", f"{source}.ln_1")
        score_factor = config.attention_scale * config.head_dim / depth  # jais divides scores by the head dimension
        yield from layer(f"{block}.attn_qkv", f"{source}.{QUERY_KEY_VALUE}", 3 * width, width, query(score_factor))
        yield from layer(f"{block}.attn_output", f"{source}.{ATTENTION_OUTPUT}", width, width, same)
        yield from norm(f"{block}.ffn_norm", f"{source}.ln_2")
        yield from layer(f"{block}.ffn_up", f"{source}.{UP}", inner, width, pad)
        yield from layer(f"{block}.ffn_gate", f"{source}.{GATE}", inner, width, pad)
        down, bias = layer(f"{block}.ffn_down", f"{source}.{DOWN}", width, inner, same)
        yield down._replace(convert=lambda tensor: pad(tensor).T)
        yield bias


def _type_of(target: _Target, type: str) -> "GGMLQuantizationType":  # noqa: A002
    from gguf import GGMLQuantizationType

    if len(target.shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType[HEAD_TYPES[type] if target.name == "output.weight" else type]


def _num_bytes(shape: tuple[int, ...], kind: "GGMLQuantizationType") -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes


def _encode(target: _Target, read: Callable[[str], Tensor], kind: "GGMLQuantizationType") -> NDArray[Any]:
    from gguf.quants import quantize

    tensor = target.convert(read(target.source).to(torch.float32, copy=True)).contiguous()
    assert tuple(tensor.shape) == target.shape
    largest, limit = float(tensor.abs().max()), TYPES[kind.name]
    if largest > limit:
        raise ValueError(
            f"{target.source} reaches {largest:.6g}, and {kind.name} holds at most {limit:.6g}; choose another type."
        )
    if kind.name == "F16":
        return tensor.half().numpy()  # several times as fast as numpy's conversion
    encoded: NDArray[Any] = quantize(tensor.numpy(), kind)
    return encoded


# Reading


def _reader(checkpoint: Checkpoint, config: BTLMConfig) -> Callable[[str], Tensor]:
    """A function that gives tensors of the checkpoint by their names, one at a time where they are not quantized."""
    name = checkpoint.name
    if getattr(config, "quantization_config", None) is not None:
        note(f"the weights of {name} are quantized and are decoded first; an export of the original loses less")
        state = load_model(checkpoint, device="cpu")[0].state_dict()
        return lambda key: state[key]
    weights = Weights(checkpoint)
    tied = {_HEAD: _TABLE} if config.tie_word_embeddings else {}
    return lambda key: weights.read(tied.get(key, key))


# Vocabulary


class _Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    merges: list[str]


def _vocabulary(checkpoint: Checkpoint, config: BTLMConfig) -> _Vocabulary:
    """Tokens by id, their types in llama.cpp, and the merges in the order of their ranks."""
    from gguf import TokenType

    tokenizer = checkpoint.transformers_tokenizer
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if problem := _tokenizer_problem(described, tokenizer, config.vocab_size):
        raise ValueError(
            f"The tokenizer of {checkpoint.name} cannot be exported: {problem}, where GPT-2's byte-level BPE belongs."
        )
    model = described["model"]
    # Rows of the table that are no token of the tokenizer, as in vocabularies that are rounded up, are never written.
    tokens = [f"[UNUSED{i}]" for i in range(config.vocab_size)]
    types = [int(TokenType.UNUSED)] * config.vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return _Vocabulary(tokens, types, [" ".join(pair) for pair in model["merges"]])


def _tokenizer_problem(described: dict[str, Any], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    model, splitter = described["model"], described["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        return f"it is of the type {model['type']}"
    changes = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "dropout")
    if used := [key for key in changes if model.get(key)]:
        return f"it uses {', '.join(used)}"
    if described["normalizer"] is not None:
        return f"it has the normalizer {described['normalizer'].get('type')}"
    if splitter.get("type") != "ByteLevel" or splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
        return f"its pre-tokenizer is {splitter}"
    if added := tokenizer("").input_ids:
        return f"it adds the tokens {added} to every text"
    highest = max([*model["vocab"].values(), *(added["id"] for added in described["added_tokens"])])
    if highest >= vocab_size:
        return f"it has the id {highest:,} in a vocabulary of {vocab_size:,}"
    if not model["merges"]:
        return "it has no merges, without which llama.cpp loads no tokenizer"
    return None


def _ends(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end a text, the first of them the tokenizer's if it is one."""
    preferred = checkpoint.transformers_tokenizer.eos_token_id
    ends = sorted(checkpoint.end_ids, key=lambda token: (token != preferred, token))
    if not ends and isinstance(preferred, int):
        ends = [preferred]
    if not 1 <= len(ends) <= len(_END_KEYS):
        raise ValueError(
            f"{checkpoint.name} has {len(ends)} tokens that end a text, and GGUF names 1 to {len(_END_KEYS)}, without "
            "which llama.cpp would end at one of its own; set eos_token_id in generation_config.json."
        )
    return ends


_END_KEYS = ("eos", "eot", "eom")


def _add_vocabulary(writer: "GGUFWriter", vocabulary: _Vocabulary, ends: list[int], config: BTLMConfig) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(config.bos_token_id if config.bos_token_id is not None else ends[0])
    for key, token in zip(_END_KEYS, ends, strict=False):
        getattr(writer, f"add_{key}_token_id")(token)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _describe(writer: "GGUFWriter", config: BTLMConfig, name: str, type: str) -> None:  # noqa: A002
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(padded_inner_dim(config))
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(8.0)  # slopes are those of btlm.model.alibi, for any number of heads
    writer.add_file_type(LlamaFileType.ALL_F32 if type == "F32" else LlamaFileType[f"MOSTLY_{type}"])
    if type in ("Q8_0", "Q4_0"):
        writer.add_quantization_version(GGML_QUANT_VERSION)
