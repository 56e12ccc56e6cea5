"""Tensors of a checkpoint -> parameters of the network in vLLM. Needs torch, but not vLLM.

Matrices are stored as ``[inputs, outputs]``; vLLM's linear layers hold ``[outputs, inputs]``, and split them over the
devices of tensor parallelism. Query, key and value are one matrix on both sides. The two up-projections of SwiGLU are
two matrices in a checkpoint and one in vLLM, with the gate first.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from btlm.checkpoint.tensors import check_fit
from btlm.model.architecture_btlm import DOWN, GATE, HEAD, QUERY_KEY_VALUE, SLOPES, UP, Architecture

# The module that holds GATE and UP, where the network has both.
GATE_UP = "mlp.gate_up"
# Causality buffers of old checkpoints.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")
_INNER_MULTIPLE = 64


class Piece(NamedTuple):
    """A tensor for one parameter, or for a part of it; all devices together."""

    stored: str
    """Its name in the checkpoint."""
    parameter: str
    """Name of the parameter."""
    part: str | int | None
    """What vLLM calls the part: ``"q"``, ``"k"`` or ``"v"``, 0 for the gate and 1 for the other up-projection."""
    tensor: Tensor
    """In vLLM's layout; ``[outputs, inputs]`` for a matrix."""


def padded_inner(inner: int, num_devices: int) -> int:
    """Width of the feed-forward layer in vLLM: zeros are added so that each device gets a multiple of 64.

    BTLM-3B has 6,826 = 2 * 3,413, which four devices could not share, and which is slow on GPUs.
    """
    multiple = _INNER_MULTIPLE * num_devices
    return -(-inner // multiple) * multiple


def pieces(weights: Iterable[tuple[str, Tensor]], architecture: Architecture, num_devices: int) -> Iterator[Piece]:
    """The tensors of a checkpoint as vLLM's layers take them.

    Args:
        weights: Names and tensors of the checkpoint, in any order.
        architecture: The network; a tied head may be among the tensors, and is passed over.
        num_devices: Devices of tensor parallelism.

    Raises:
        ValueError: A tensor is not one of the network, or of another shape.
    """
    expected = architecture.tensors
    for name, tensor in weights:
        tied = name == f"{HEAD}.weight" and architecture.tie_word_embeddings
        if tied or name == SLOPES or name.endswith(_OLD_BUFFERS):
            continue
        if name not in expected:
            check_fit("the checkpoint", missing=[], unexpected=[name], shapes=[])
        facts = expected[name]
        if tuple(tensor.shape) != facts.shape:
            check_fit("the checkpoint", missing=[], unexpected=[], shapes=[(name, tuple(tensor.shape), facts.shape)])
        if facts.kind == "matrix":
            tensor = tensor.t()
        module, _, kind = name.rpartition(".")
        padding = padded_inner(architecture.inner_dim, num_devices) - architecture.inner_dim
        if module.endswith((UP, GATE)):  # outputs, which are the first dimension
            tensor = F.pad(tensor, (0, 0, 0, padding) if tensor.ndim == 2 else (0, padding))
        elif module.endswith(DOWN) and kind == "weight":
            tensor = F.pad(tensor, (0, padding))
        if module.endswith(QUERY_KEY_VALUE):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                yield Piece(name, name, part, third)
        elif module.endswith((UP, GATE)) and architecture.activation_function == "swiglu":
            block = module.removesuffix(GATE).removesuffix(UP)
            yield Piece(name, f"{block}{GATE_UP}.{kind}", 0 if module.endswith(GATE) else 1, tensor)
        else:
            yield Piece(name, name, None, tensor)
