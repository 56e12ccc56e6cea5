"""Rounding of the blocks for a text: each matrix sees what the rounded ones before it make of the text.

One block is in memory at a time, beside the hidden states of the text and the inputs of one matrix.

Letters: B rows of text, Q tokens of a row, C width, N outputs, K inputs, G groups of inputs.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from btlm.checkpoint.tensors import Weights
from btlm.devices import multiplies_bf16
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


class TextStates:
    """The hidden states of the calibration text, on their way through the blocks.

    The passes are in bf16 where the processor multiplies it, by autocast, with the states in fp32; what is learned from
    them, and the rounding, are fp32.

    Args:
        config: Of the model.
        weights: Of the checkpoint.
        matrices: Sizes of the stored matrices, by the name of the module.
        hidden_BQC: fp32; changed in place.

    Attributes:
        hidden_BQC: What the next block gets.
    """

    @torch.no_grad()
    def __init__(
        self, config: BTLMConfig, weights: Weights, matrices: Mapping[str, StoredMatrix], hidden_BQC: Tensor
    ) -> None:
        self.hidden_BQC = hidden_BQC
        self._config, self._weights, self._matrices = config, weights, matrices
        self._rows = hidden_BQC.split(1)  # views, which take what the blocks add
        with self._pass():
            self._plan = plan_attention(config, self._rows[0], None, None, output_attentions=False)

    @torch.no_grad()
    def round_block(self, layer: int) -> Iterator[tuple[str, Tensor, Rounded]]:
        """Round the matrices of a block, one after the other, each for its inputs, and pass the text through it.

        Args:
            layer: Number of the block; the blocks before it come first.

        Yields:
            The name of a matrix, its padded weights fp32 ``[N, K]``, and what they are rounded to.
        """
        name, rows = block_name(layer), self._rows
        block = _read_block(self._config, self._weights, layer)
        moments = self._moments(f"{name}.{QUERY_KEY_VALUE}", (block.ln_1(row) for row in rows))
        yield from _round(name, block, (QUERY_KEY_VALUE,), moments, self._matrices)
        with _without_projection(block.attn), self._pass():
            attended_BQC = _stacked((block.attn(block.ln_1(row), self._plan, None)[0] for row in rows), len(rows))
        moments = self._moments(f"{name}.{ATTENTION_OUTPUT}", attended_BQC)
        yield from _round(name, block, (ATTENTION_OUTPUT,), moments, self._matrices)
        self._add(block.attn.c_proj, attended_BQC)
        del attended_BQC
        moments = self._moments(f"{name}.{UP}", (block.ln_2(row) for row in rows))
        yield from _round(name, block, (UP, GATE), moments, self._matrices)
        with _without_projection(block.mlp), self._pass():
            inner_BQK = _stacked((block.mlp(block.ln_2(row)) for row in rows), len(rows))
        moments = self._moments(f"{name}.{DOWN}", inner_BQK)
        yield from _round(name, block, (DOWN,), moments, self._matrices)
        self._add(block.mlp.c_proj, inner_BQK)

    def _pass(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16())

    def _moments(self, matrix: str, inputs: Iterable[Tensor]) -> Moments:
        moments = Moments(self._matrices[matrix].padded_inputs)
        for part in inputs:
            moments.add(part.float())
        return moments

    def _add(self, projection: nn.Module, inputs_BQK: Tensor) -> None:
        """Add what the last matrix of a part of the block makes of its inputs."""
        with self._pass():
            for row, inputs in zip(self._rows, inputs_BQK.split(1), strict=True):
                row += projection(inputs)


def first_states(config: BTLMConfig, weights: Weights, embeds_BQC: Tensor) -> Tensor:
    """What the first block gets, fp32 ``[B, Q, C]``, of embeddings of the text by the rounded table, fp32."""
    hidden_BQC = scale_embeddings(embeds_BQC, config)
    if config.position_embedding_type == "learned":
        hidden_BQC = hidden_BQC + weights.read(f"{POSITION_TABLE}.weight").float()[: hidden_BQC.shape[1]]
    return hidden_BQC


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


def _stacked(parts: Iterable[Tensor], number: int) -> Tensor:
    """Parts of one row each, together; ``torch.cat`` would have them in memory twice."""
    stacked: Tensor | None = None
    for i, part in enumerate(parts):
        if stacked is None:
            stacked = part.new_empty(number, *part.shape[1:])
        stacked[i] = part[0]
    assert stacked is not None
    return stacked


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
