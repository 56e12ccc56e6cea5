from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from btlm.engine import GenerationOptions
from btlm.generate.cuda import to_int4, to_linear
from btlm.generate.with_transformers import _generation_config
from tests.checkpoint.tiny import tiny_model

TOKENS = torch.tensor([[5, 9, 200, 31, 7]])


def test_linear_layers_compute_what_the_projections_did():
    model = tiny_model()
    with torch.no_grad():
        before = model(TOKENS).logits
        after = to_linear(model)(TOKENS).logits
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert sum(isinstance(module, nn.Linear) for module in model.transformer.h.modules()) == 10
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_four_bits_need_a_gpu_and_bfloat16():
    with pytest.raises(ValueError, match=r"bfloat16 on cuda, and this one is torch.float32 on cpu\.$"):
        to_int4(tiny_model())


def test_steps_are_captured_on_cuda_alone(monkeypatch):
    model = tiny_model()
    assert _generation_config(model, GenerationOptions()).cache_implementation is None
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert _generation_config(model, GenerationOptions()).cache_implementation == "static"
    assert _generation_config(model, GenerationOptions(num_beams=2)).cache_implementation is None
    model.config.alibi_scaling = {"type": "linear", "train_seq_len": 64}
    assert _generation_config(model, GenerationOptions()).cache_implementation is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_text_on_cuda_is_that_of_the_processor():
    model: Any = tiny_model()
    config = _generation_config(model, GenerationOptions(max_new_tokens=8))
    expected = model.generate(TOKENS, generation_config=config)
    model.cuda()
    config = _generation_config(model, GenerationOptions(max_new_tokens=8))
    assert model.generate(TOKENS.cuda(), generation_config=config).tolist() == expected.tolist()
