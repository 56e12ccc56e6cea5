"""The networks of the family beside BTLM's own: learned positions, activations without a gate, heads of their own."""

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.engine.activation import activate
from btlm.engine.network import MAX_TOKENS
from btlm.errors import TooLong
from btlm.model import BTLMLMHeadModel
from tests.checkpoint.tiny import save_tiny

GPT2 = {
    "activation_function": "gelu_new",
    "position_embedding_type": "learned",
    "mup_width_scale": 1.0,
    "mup_embeddings_scale": 1.0,
    "mup_output_alpha": 1.0,
    "mup_scale_qk_dot_by_d": False,
}
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
NETWORKS = [
    GPT2,
    *({"activation_function": name} for name in ACTIVATIONS),
    {"position_embedding_type": "learned"},
    {**GPT2, "tie_word_embeddings": False},
    {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    {**GPT2, "scale_attn_weights": False},
]
IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()


def scores(folder, kernels="auto"):
    return Engine.open(folder, context=64, kernels=kernels).score(IDS)


def expected_scores(folder):
    model = BTLMLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].double().log_softmax(-1)
    return logits[torch.arange(len(IDS) - 1), IDS[1:]].numpy()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    values = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, 1e-30, -300, 300, 3e38, -3e38]]).astype(np.float32)
    exact = ACT2FN[name](torch.from_numpy(values[:-2]).double()).numpy()
    table = np.tile(values, (33, 1))
    activate(name, table)
    assert np.allclose(table[:, :-2], exact, rtol=1e-6, atol=1e-6)
    assert np.isfinite(table[:, :-1]).all()
    for start, end in ((0, 1), (3, 20), (7, 4008)):  # a number's result does not depend on its place
        part = values[None, start:end].copy()
        activate(name, part)
        assert np.array_equal(part[0], table[20, start:end], equal_nan=True)
    nothing = np.full((1, 5), np.nan, np.float32)
    activate(name, nothing)
    assert np.isnan(nothing).all()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("values", NETWORKS, ids=str)
def test_the_engine_is_the_model(tmp_path, values, kernels):
    folder = save_tiny(tmp_path, **values)
    assert np.allclose(scores(folder, kernels), expected_scores(folder), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_one_is_near_its_weights(tmp_path, bits):
    """Activations and cache are rounded to eight bits; the weights are the same numbers on both sides."""
    plain = save_tiny(tmp_path / "plain", **{**GPT2, "n_embd": 64, "initializer_range": 0.1})
    quantize(plain, tmp_path / "packed", bits=bits, group_size=64)
    difference = np.asarray(scores(tmp_path / "packed")) - expected_scores(tmp_path / "packed")
    assert np.sqrt(np.mean(difference**2)) < 0.02  # of scores that differ by 0.9
    assert np.allclose(scores(tmp_path / "packed"), scores(tmp_path / "packed", "torch"), atol=0.01)


def test_text_is_that_of_the_model_and_of_an_uncached_pass(tmp_path):
    folder = save_tiny(tmp_path, **GPT2)
    model = BTLMLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = model.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, 40:]
    engine = Engine.open(folder, context=64, num_requests=2)
    options = GenerationOptions(max_new_tokens=24)
    tokens = list(engine.generate(IDS, options, stop_ids=frozenset()))
    assert [token.id for token in tokens] == theirs.tolist()
    whole = engine.score([*IDS, *theirs.tolist()])
    assert np.allclose([token.logprob for token in tokens], whole[39:], atol=1e-4)
    short = engine.add(IDS[:7], options, stop_ids=frozenset())  # positions are those of each request
    again = engine.add(IDS, options, stop_ids=frozenset())
    while short.finished is None or again.finished is None:
        engine.step()
    assert [token.id for token in again.tokens] == theirs.tolist()


def test_there_are_no_positions_beyond_the_learned_ones(tmp_path):
    folder = save_tiny(tmp_path, **GPT2)
    with pytest.raises(TooLong, match=r"65 tokens.*learned positions end at 64"):
        Engine.open(folder, context=65)
    network = Engine.open(folder).network
    with pytest.raises(TooLong, match="learned positions"):
        Engine(network, context=MAX_TOKENS)
    with pytest.raises(ValueError, match=r"factor is 2\.0, and this model's learned positions have none"):
        Engine.open(folder, factor=2.0)
