"""BTLM on CUDA: torch's kernels, the steps of decoding captured in CUDA graphs, 4-bit weights by torchao.

Transformers' `generate` captures its steps by itself if the cache is static and the device is CUDA; what remains is to
give torchao matrices of a kind that it knows.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from btlm.model import BTLMLMHeadModel

_GROUP_SIZES = (32, 64, 128, 256)


def to_linear(model: BTLMLMHeadModel) -> BTLMLMHeadModel:
    """Replace the projections, which are ``[in, out]``, by linear layers with the same weights, which torchao knows.

    Args:
        model: The model, changed in place. It computes the same, but can no longer be saved as a BTLM checkpoint.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                weight, bias = child.weight, child.bias
                linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta", dtype=weight.dtype)
                linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
                linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
                setattr(module, name, linear)
    return model


def to_int4(model: BTLMLMHeadModel, group_size: int = 128) -> BTLMLMHeadModel:
    """Quantize the matrices of the blocks to four bits, in torchao's format for the tensor cores; not the token table.

    Args:
        model: The model, in bf16 on CUDA; changed in place.
        group_size: Number of inputs that share a scale.

    Raises:
        ValueError: The model is not in bf16 on CUDA, or torchao has no such group size.
        ModuleNotFoundError: torchao is not installed.
    """
    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise ValueError(
            f"Four-bit weights on a GPU need a model in bfloat16 on cuda, and this one is {model.dtype} on "
            f"{model.device}."
        )
    if group_size not in _GROUP_SIZES:
        raise ValueError(f"The group size must be one of {', '.join(map(str, _GROUP_SIZES))}, not {group_size}.")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")
    blocks = to_linear(model).transformer.h
    quantize_(blocks, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return model
