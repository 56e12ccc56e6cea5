"""Weights packed in four or eight bits, with one scale per group of inputs: the layout in a file. Needs numpy only.

A matrix has N outputs and K inputs, both padded with zeros (:func:`stored_matrices`). It is stored in the order in
which kernels read it: a row of blocks holds 16 outputs, and a block has 64 bytes.

- ``weight``, 4 bits: uint8 ``[N/16, K/8, 64]``; byte ``4 n + i`` of block ``[r, c]`` holds two values of the output
  ``16 r + n``: input ``8 c + i`` in its low and input ``8 c + 4 + i`` in its high nibble. A value is ``(q - 8) scale``.
- ``weight``, 8 bits: uint8 ``[N/16, K/4, 64]``; byte ``4 n + i`` of block ``[r, c]`` is input ``4 c + i`` of the output
  ``16 r + n``. A value is ``(q - 128) scale``.
- ``weight_scale``: bf16 ``[N/16, K/group_size, 16]``: the scale of output ``16 r + n`` and group ``g`` of inputs at
  ``[r, g, n]``; of either sign, and 0 for a group of zeros.
- ``bias``: fp32 ``[N]``.

bf16 numbers are uint16 arrays here. Letters: N outputs, K inputs, G groups of inputs, g inputs of a group.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .architecture_btlm import Architecture, Quantization
from .config_keys_btlm import GROUP_SIZES

BLOCK_ROWS = 16  # outputs per block
BLOCK_BYTES = 64


class StoredMatrix(NamedTuple):
    """Sizes of one matrix in a file."""

    bits: int
    group_size: int
    outputs: int
    inputs: int
    padded_outputs: int
    padded_inputs: int

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """``[N/16, K/8 or K/4, 64]``."""
        return packed_shape(self.bits, self.padded_outputs, self.padded_inputs)

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        """``[N/16, G, 16]``."""
        return scale_shape(self.group_size, self.padded_outputs, self.padded_inputs)


def packed_shape(bits: int, outputs: int, inputs: int) -> tuple[int, int, int]:
    """Shape of the packed weights of a matrix whose sizes are padded: ``[N/16, K/8 or K/4, 64]``."""
    return outputs // BLOCK_ROWS, inputs // (BLOCK_BYTES // BLOCK_ROWS * 8 // bits), BLOCK_BYTES


def scale_shape(group_size: int, outputs: int, inputs: int) -> tuple[int, int, int]:
    """Shape of the scales of a matrix whose sizes are padded: ``[N/16, G, 16]``."""
    return outputs // BLOCK_ROWS, inputs // group_size, BLOCK_ROWS


def stored_matrices(architecture: Architecture, quantization: Quantization) -> dict[str, StoredMatrix]:
    """The matrices that are stored in few bits, by the name of their module; a tied head is not one of them.

    Outputs are padded to a multiple of 16, and the feed-forward width, as outputs and as inputs, to a multiple of the
    group size.

    Raises:
        ValueError: The group size does not divide the width of the model.
    """
    group_size = quantization.group_size
    if problem := group_size_problem(architecture.n_embd, group_size):
        raise ValueError(problem)
    found = {}
    for name, tensor in architecture.tensors.items():
        module = name.removesuffix(".weight")
        if tensor.kind == "matrix":
            inputs, outputs = tensor.shape
            padded = padded_size(outputs, group_size), padded_size(inputs, group_size)
            found[module] = StoredMatrix(quantization.bits, group_size, outputs, inputs, *padded)
        elif tensor.kind == "token table":
            outputs, inputs = tensor.shape
            padded = padded_size(outputs, BLOCK_ROWS), inputs
            found[module] = StoredMatrix(quantization.table_bits, group_size, outputs, inputs, *padded)
    return found


def group_size_problem(width: int, group_size: int) -> str | None:
    """Why matrices of a model of this width cannot be cut into groups of ``group_size`` inputs; None if they can."""
    if width % group_size == 0:
        return None
    fitting = " or ".join(str(size) for size in GROUP_SIZES if width % size == 0)
    remedy = f"use {fitting}" if fitting else "neither 64 nor 128 does, and such a model cannot be quantized"
    return f"The group size {group_size} does not divide n_embd, which is {width}; {remedy}."


def padded_size(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def pack(q_NK: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers to stored blocks.

    Args:
        q_NK: uint8 ``[N, K]``, below ``2 ** bits``; N a multiple of 16, K of 8.
        bits: 4 or 8.

    Returns:
        uint8 ``[N/16, K/8, 64]`` for 4 bits, where byte ``j`` of ``[r, c]`` is
        ``q[16 r + j // 4, 8 c + j % 4] + 16 q[16 r + j // 4, 8 c + 4 + j % 4]``; ``[N/16, K/4, 64]`` for 8 bits, where
        it is ``q[16 r + j // 4, 4 c + j % 4]``.
    """
    outputs, inputs = q_NK.shape
    rows = q_NK
    if bits == 4:
        halves = q_NK.reshape(outputs, inputs // 8, 2, 4)
        rows = (halves[:, :, 0] | np.left_shift(halves[:, :, 1], 4, dtype=np.uint8)).reshape(outputs, inputs // 2)
    blocks = _fours(rows).reshape(outputs // BLOCK_ROWS, BLOCK_ROWS, -1).swapaxes(1, 2)
    return np.ascontiguousarray(blocks).view(np.uint8)


def unpack(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of :func:`pack`: uint8 ``[N, K]``."""
    outputs = len(stored) * BLOCK_ROWS
    rows = np.ascontiguousarray(_fours(stored).swapaxes(1, 2)).view(np.uint8).reshape(outputs, -1)
    if bits == 8:
        return rows
    q_NK = np.empty((outputs, rows.shape[1] // 4, 2, 4), np.uint8)
    fours = rows.reshape(outputs, -1, 4)
    np.bitwise_and(fours, 15, out=q_NK[:, :, 0])
    np.right_shift(fours, 4, out=q_NK[:, :, 1])
    return q_NK.reshape(outputs, -1)


def pack_scale(scale_NG: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Scales ``[N, G]`` as they are stored, rounded to bf16: ``[N/16, G, 16]``."""
    blocks = scale_NG.reshape(-1, BLOCK_ROWS, scale_NG.shape[1]).swapaxes(1, 2)
    numbers = np.ascontiguousarray(blocks).view(np.uint32)
    return ((numbers + 0x7FFF + (numbers >> 16 & 1)) >> 16).astype(np.uint16)


def unpack_scale(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The inverse of :func:`pack_scale`, in fp32."""
    scale: NDArray[Any] = (stored.astype(np.uint32) << 16).view(np.float32)
    return scale.swapaxes(1, 2).reshape(-1, stored.shape[1])


def dequantize(stored: NDArray[np.uint8], scale: NDArray[np.uint16], bits: int, group_size: int) -> NDArray[np.float32]:
    """The values of a stored matrix, with its padding.

    Args:
        stored: uint8 ``[N/16, K/8 or K/4, 64]``, as :func:`pack` makes it.
        scale: bf16 ``[N/16, K/group_size, 16]``.
        bits: 4 or 8.
        group_size: Number of inputs that share a scale.

    Returns:
        fp32 ``[N, K]``: ``(q - 2 ** (bits - 1)) scale``, which fp32 holds exactly.
    """
    q_NK = unpack(stored, bits)
    values_NGg = q_NK.reshape(len(q_NK), -1, group_size).astype(np.float32)
    values_NGg -= np.float32(2 ** (bits - 1))
    with np.errstate(invalid="ignore", over="ignore"):  # scales of damaged files; what computes with them says so
        values_NGg *= unpack_scale(scale)[:, :, None]
    return values_NGg.reshape(q_NK.shape)


def _fours(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Four bytes as one number, which moves in one piece."""
    return np.ascontiguousarray(values).view(np.uint32)
