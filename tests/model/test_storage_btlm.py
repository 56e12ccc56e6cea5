"""The layout of packed weights is what the module's text says."""

import numpy as np
import pytest

from btlm.model.architecture_btlm import BTLM_3B, Quantization
from btlm.model.storage_btlm import dequantize, pack, pack_scale, stored_matrices, unpack, unpack_scale
from tests.model.tiny import tiny_config


def random_q(outputs, inputs, bits):
    return np.random.default_rng(0).integers(0, 2**bits, (outputs, inputs), np.uint8)


def packed_by_loop(q, bits):
    """Straight from the docstring of the module."""
    outputs, inputs = q.shape
    columns = 8 if bits == 4 else 4
    stored = np.zeros((outputs // 16, inputs // columns, 64), np.uint8)
    for r in range(outputs // 16):
        for c in range(inputs // columns):
            for n in range(16):
                for i in range(4):
                    if bits == 4:
                        byte = int(q[16 * r + n, 8 * c + i]) + 16 * int(q[16 * r + n, 8 * c + 4 + i])
                    else:
                        byte = int(q[16 * r + n, 4 * c + i])
                    stored[r, c, 4 * n + i] = byte
    return stored


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_that_of_the_text(bits):
    q = random_q(48, 64, bits)
    stored = pack(q, bits)
    assert stored.flags.c_contiguous
    assert stored.dtype == np.uint8
    assert np.array_equal(stored, packed_by_loop(q, bits))
    assert np.array_equal(unpack(stored, bits), q)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 128), (8, 64), (8, 128)])
def test_values_are_steps_from_the_middle_times_the_scale_of_the_group(bits, group_size):
    q = random_q(32, 256, bits)
    numbers = np.random.default_rng(1).standard_normal((32, 256 // group_size)).astype(np.float32)
    scale = (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bf16 holds these exactly
    stored_scale = pack_scale(scale)
    assert stored_scale.shape == (2, 256 // group_size, 16)
    assert stored_scale.dtype == np.uint16
    assert stored_scale[1, 1, 5] == scale[16 + 5, 1].view(np.uint32) >> 16
    assert np.array_equal(unpack_scale(stored_scale), scale)
    values = dequantize(pack(q, bits), stored_scale, bits, group_size)
    assert values.dtype == np.float32
    for n, k in [(0, 0), (5, 63), (17, 64), (31, 255), (16, 130)]:
        assert values[n, k] == (int(q[n, k]) - 2 ** (bits - 1)) * scale[n, k // group_size]


def test_scales_are_rounded_to_bf16_as_torch_rounds_them():
    import torch

    scale = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)) * 1e-8
    scale[0, :3] = torch.tensor([1.00390625, 1.01171875, -0.0])  # ties go to the even number
    expected = scale.bfloat16().float().numpy()
    assert np.array_equal(unpack_scale(pack_scale(scale.numpy())), expected)


def test_the_matrices_of_btlm_3b():
    matrices = stored_matrices(BTLM_3B, Quantization(4, 128, 8))
    assert len(matrices) == 1 + 32 * 5
    down = matrices["transformer.h.31.mlp.c_proj"]
    # 6,826 inputs are padded to 54 groups of 128; 50,257 tokens to 3,142 rows of blocks.
    assert (down.outputs, down.inputs, down.padded_outputs, down.padded_inputs) == (2560, 6826, 2560, 6912)
    assert down.weight_shape == (160, 864, 64)
    assert down.scale_shape == (160, 54, 16)
    table = matrices["transformer.wte"]
    assert (table.bits, table.weight_shape, table.scale_shape) == (8, (3142, 640, 64), (3142, 20, 16))


@pytest.mark.parametrize(("width", "group_size", "remedy"), [(192, 128, "use 64"), (48, 64, "neither 64 nor 128 does")])
def test_a_group_size_that_does_not_fit_is_refused(width, group_size, remedy):
    architecture = tiny_config(n_embd=width).architecture
    with pytest.raises(ValueError, match=rf"{group_size} does not divide n_embd, which is {width}; {remedy}"):
        stored_matrices(architecture, Quantization(4, group_size, 8))
