"""Rounding of the blocks for a text: each matrix sees what the rounded ones before it make of the text.

One block is in memory at a time, beside the hidden states of the text.

Letters: B rows of text, Q tokens of a row, C width, N outputs, K inputs, G groups of inputs.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from btlm.checkpoint.tensors import Weights
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import (
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    POSITION_TABLE,
    QUERY_KEY_VALUE,
    UP,
    block_name,
)
from btlm.model.attention_btlm import BTLMAttention, plan_attention
from btlm.model.modeling_btlm import BTLMMLP, BTLMBlock
from btlm.model.mup import scale_embeddings
from btlm.model.storage_btlm import StoredMatrix

from .gptq import Moments, gptq, inverse_factor, output_error
from .rounding import padded, values_of

CALIBRATION_TOKENS = 32768
# Tokens of a row, where the model takes so many, and the fewest of a text that are worth to be used.
_ROW, _FEWEST = 2048, 256
# Bytes of text that a row is cut from: more than its tokens need, in any language but few tables.
_ROW_BYTES = 8 * _ROW


class Rounded(NamedTuple):
    """One matrix, padded, as it will be stored."""

    q_NK: Tensor
    """uint8."""
    scale_NG: Tensor
    """fp32, values of bf16."""
    bias_N: Tensor | None
    """fp32; None for tables."""
    output_error: float | None
    """Relative, for the calibration text."""


def calibration_rows(path: Path | str, tokenizer: PreTrainedTokenizerBase, config: BTLMConfig, tokens: int) -> Tensor:
    """Rows of tokens from all over a text, int64 ``[B, Q]``.

    Args:
        path: A file of plain text in UTF-8.
        tokenizer: Of the model.
        config: Of the model.
        tokens: To be taken, at most.

    Raises:
        ValueError: There is no such file, it is not UTF-8, or it is too short.
    """
    path = Path(path)
    if tokens < _FEWEST:
        raise ValueError(f"Calibration with {tokens:,} tokens says nothing; give at least {_FEWEST}.")
    length = min(_ROW, config.n_positions, tokens)
    wanted = tokens // length
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size <= wanted * _ROW_BYTES:
                starts, piece = [0], size
            else:
                starts, piece = [(size - _ROW_BYTES) * i // max(1, wanted - 1) for i in range(wanted)], _ROW_BYTES
            texts = []
            for start in starts:
                file.seek(start)
                texts.append(_decode(file.read(piece), whole=piece == size))
    except OSError as error:
        raise ValueError(f"The calibration text {path} cannot be read ({error.strerror}); give a text file.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The calibration text {path} is not UTF-8; convert it, or give another one.") from error
    rows, found = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += len(ids)
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not rows and found >= _FEWEST:  # a short text is one short row
        rows = [tokenizer(texts[0], add_special_tokens=False, verbose=False)["input_ids"][:length]]
    if not rows:
        raise ValueError(
            f"The calibration text {path} has {found:,} tokens; give one of at least {_FEWEST}, better {tokens:,}."
        )
    taken = min(wanted, len(rows))
    return torch.tensor([rows[len(rows) * i // taken] for i in range(taken)])


@torch.no_grad()
def round_blocks(
    config: BTLMConfig, weights: Weights, matrices: Mapping[str, StoredMatrix], embeds_BQC: Tensor
) -> Iterator[tuple[str, Tensor, Rounded]]:
    """The matrices of all blocks, one after the other, each rounded for its inputs.

    Args:
        config: Of the model.
        weights: Of the checkpoint.
        matrices: Their sizes, by the name of the module.
        embeds_BQC: Embeddings of the text by the rounded table, fp32.

    Yields:
        The name of a matrix, its padded weights fp32 ``[N, K]``, and what they are rounded to.
    """
    hidden_BQC = scale_embeddings(embeds_BQC, config)
    if config.position_embedding_type == "learned":
        hidden_BQC = hidden_BQC + weights.read(f"{POSITION_TABLE}.weight").float()[: hidden_BQC.shape[1]]
    rows = hidden_BQC.split(1)  # views, which take what the blocks add
    plan = plan_attention(config, rows[0], None, None, output_attentions=False)
    for layer in range(config.n_layer):
        name = block_name(layer)
        block = _read_block(config, weights, layer)
        moments = _moments(matrices[f"{name}.{QUERY_KEY_VALUE}"], (block.ln_1(row) for row in rows))
        yield from _round(name, block, (QUERY_KEY_VALUE,), moments, matrices)
        with _without_projection(block.attn):
            attended_BQC = torch.cat([block.attn(block.ln_1(row), plan, None)[0] for row in rows])
        moments = _moments(matrices[f"{name}.{ATTENTION_OUTPUT}"], attended_BQC)
        yield from _round(name, block, (ATTENTION_OUTPUT,), moments, matrices)
        for row, attended in zip(rows, attended_BQC.split(1), strict=True):
            row += block.attn.c_proj(attended)
        del attended, attended_BQC
        moments = _moments(matrices[f"{name}.{UP}"], (block.ln_2(row) for row in rows))
        yield from _round(name, block, (UP, GATE), moments, matrices)
        with _without_projection(block.mlp):
            moments = _moments(matrices[f"{name}.{DOWN}"], (block.mlp(block.ln_2(row)) for row in rows))
        yield from _round(name, block, (DOWN,), moments, matrices)
        for row in rows:
            row += block.mlp(block.ln_2(row))


def _read_block(config: BTLMConfig, weights: Weights, layer: int) -> BTLMBlock:
    with torch.device("meta"):
        block = BTLMBlock(config, layer)
    state = {key: weights.read(f"{block_name(layer)}.{key}").float() for key in block.state_dict()}
    block.load_state_dict(state, assign=True)
    block.eval()
    return block


@contextmanager
def _without_projection(module: BTLMAttention | BTLMMLP) -> Iterator[None]:
    """While it is open, the output of the module is what its last matrix gets."""
    projection = module.c_proj
    module.c_proj = nn.Identity()  # type: ignore[assignment]
    try:
        yield
    finally:
        module.c_proj = projection


def _moments(matrix: StoredMatrix, inputs: Iterable[Tensor]) -> Moments:
    moments = Moments(matrix.padded_inputs)
    for part in inputs:
        moments.add(part)
    return moments


def _round(
    block_name: str, block: BTLMBlock, names: Sequence[str], moments: Moments, matrices: Mapping[str, StoredMatrix]
) -> Iterator[tuple[str, Tensor, Rounded]]:
    """Round matrices that have the same inputs, in the block too."""
    hessian_KK = moments.hessian()
    factor_KK, damping = inverse_factor(hessian_KK)
    for name in names:
        matrix = matrices.get(f"{block_name}.{name}")
        if matrix is None:  # the gate without SwiGLU
            continue
        module = block.get_submodule(name)
        assert isinstance(module, Conv1D)
        weight_NK = padded(module.weight.T, matrix.padded_outputs, matrix.padded_inputs)
        q_NK, scale_NG = gptq(weight_NK, hessian_KK, factor_KK, matrix.bits, matrix.group_size)
        values_NK = values_of(q_NK, scale_NG, matrix.bits)
        error = output_error(weight_NK, values_NK, hessian_KK, damping)
        module.weight.copy_(values_NK[: matrix.outputs, : matrix.inputs].T)
        bias_N = F.pad(module.bias, (0, matrix.padded_outputs - matrix.outputs))
        del values_NK
        yield f"{block_name}.{name}", weight_NK, Rounded(q_NK, scale_NG, bias_N, error)


def _decode(content: bytes, whole: bool) -> str:
    """Text of a piece of a file; the parts of characters at its ends are left out."""
    if not whole:
        start = next((i for i, byte in enumerate(content[:4]) if byte & 0xC0 != 0x80), 0)
        content = content[start:]
    return codecs.getincrementaldecoder("utf-8")().decode(content, final=whole)
