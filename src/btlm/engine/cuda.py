"""BTLM on CUDA: torch's kernels, the steps of decoding captured in CUDA graphs, 4-bit weights by torchao.

`generate` of Transformers captures its steps by itself when the cache is static and the device is CUDA; what is left
to do is to give torchao matrices that it knows.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from btlm.model import BTLMLMHeadModel

_GROUP_SIZES = (32, 64, 128, 256)


def to_linear(model: BTLMLMHeadModel) -> BTLMLMHeadModel:
    """Replace the projections, which are ``[in, out]``, by linear layers with the same weights, which torchao knows.

    Args:
        model: Changed in place. It computes the same, and no longer saves as a checkpoint of BTLM.
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
    """Hold the matrices of the blocks in four bits, in torchao's format for the tensor cores; the table stays as it is.

    Args:
        model: In bf16 on CUDA; changed in place.
        group_size: Inputs that share a scale.

    Raises:
        ValueError: The model is not in bf16 on CUDA, or the group is none that torchao has.
        ModuleNotFoundError: torchao is not installed.
    """
    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise ValueError(
            f"Four-bit weights on a GPU need a model in bfloat16 on cuda, and this one is {model.dtype} on "
            f"{model.device}."
        )
    if group_size not in _GROUP_SIZES:
        raise ValueError(f"The group size is {group_size}; torchao has {', '.join(map(str, _GROUP_SIZES))}.")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    config = Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")
    blocks = to_linear(model).transformer.h
    quantize_(blocks, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return model
