import numpy as np
import pytest
import torch

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import MappedTensor
from btlm.engine.network import weight_dtype
from btlm.errors import NotSupported
from tests.checkpoint.tiny import tiny_model

TABLE = "transformer.wte.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_plain_weights_is_that_of_the_token_table(tmp_path, dtype):
    tiny_model().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tensors = Checkpoint.open(tmp_path).tensors
    assert weight_dtype(Checkpoint.open(tmp_path).architecture, tensors) == dtype
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert weight_dtype(Checkpoint.open(tmp_path).architecture, bare) == dtype


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "U8"])
def test_a_dtype_that_the_engine_cannot_read_is_never_taken_for_another(checkpoint, dtype):
    tensors = {TABLE: MappedTensor(dtype, np.zeros(8, np.uint8))}
    with pytest.raises(NotSupported, match=f"{TABLE} is stored as {dtype}"):
        weight_dtype(Checkpoint.open(checkpoint).architecture, tensors)


def test_weights_without_a_token_table(checkpoint):
    with pytest.raises(ValueError, match=f"lack {TABLE}"):
        weight_dtype(Checkpoint.open(checkpoint).architecture, {})
