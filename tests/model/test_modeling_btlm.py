"""The network compared with GPT-2 and the fp64 reference; muP multipliers, gradients, compilation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from btlm.model import attention_btlm
from tests.model import reference
from tests.model.tiny import TINY, assert_near, gpt2_and_ours, tiny_model, tokens

FIXED = {"type": "linear", "factor": 2.5}
DYNAMIC = {"type": "linear", "train_seq_len": 11}
LEFT = torch.tensor([[0] * 9 + [1] * 15, [1] * 24, [0] * 1 + [1] * 23])

both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# The network


@both_attentions
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu", "n_inner": 36},
        {"tie_word_embeddings": False},
    ],
    ids=repr,
)
@torch.no_grad()
def test_equals_gpt2_in_standard_parametrization(variant: dict[str, Any], attention: str) -> None:
    gpt2, ours = gpt2_and_ours(attention, **variant)
    input_ids = tokens(2, 40)
    labels = input_ids.masked_fill(input_ids % 5 == 0, -100)
    expected, actual = gpt2(input_ids, labels=labels), ours(input_ids, labels=labels)
    assert expected.logits.std() > 0.5
    assert_near(actual.logits, expected.logits, 1e-5)
    assert_near(actual.loss, expected.loss, 1e-5)
    # Our model derives positions that count only real tokens from the mask; generation passes them to GPT-2.
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = gpt2(input_ids, attention_mask=mask, position_ids=position_ids).logits[mask.bool()]
    assert_near(ours(input_ids, attention_mask=mask).logits[mask.bool()], expected, 1e-5)
    assert_near(ours(input_ids, attention_mask=mask, position_ids=position_ids).logits[mask.bool()], expected, 1e-5)


@both_attentions
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"n_head": 6},
        {"n_head": 8},
        {"n_head": 3},
        {"n_head": 1},
        {"tie_word_embeddings": False},
        {"mup_scale_qk_dot_by_d": False},
        {"n_inner": None, "layer_norm_epsilon": 1e-2},
        {"alibi_scaling": FIXED},
        {"alibi_scaling": DYNAMIC},
    ],
    ids=repr,
)
@torch.no_grad()
def test_equals_the_fp64_reference(variant: dict[str, Any], attention: str) -> None:
    model = tiny_model(attn_implementation=attention, **variant)
    input_ids = tokens(2, 45)
    expected = reference.logits_of(model, input_ids)
    assert expected.std() > 0.5
    assert_near(model(input_ids).logits, expected, 1e-4)


@pytest.mark.parametrize(
    "variant",
    [{}, {"n_head": 6, "alibi_scaling": FIXED}, {"alibi_scaling": {**DYNAMIC, "train_seq_len": 600}}],
    ids=repr,
)
@torch.no_grad()
def test_equals_the_fp64_reference_at_length(variant: dict[str, Any]) -> None:
    model = tiny_model(n_layer=2, **variant)
    input_ids = tokens(1, 1500)
    assert_near(model(input_ids).logits, reference.logits_of(model, input_ids), 1e-4)


def test_embedding_multiplier_is_not_applied_in_place() -> None:
    model = tiny_model()
    input_ids = tokens(2, 9)
    inputs_embeds = model.get_input_embeddings()(input_ids).detach()
    before = inputs_embeds.clone()
    looked_up: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: looked_up.append(output))
    by_ids = model(input_ids, output_hidden_states=True)
    by_embeds = model(inputs_embeds=inputs_embeds, output_hidden_states=True)
    assert torch.equal(inputs_embeds, before)
    assert torch.equal(looked_up[0], before)
    assert torch.equal(by_ids.hidden_states[0], before * TINY["mup_embeddings_scale"])
    assert torch.equal(by_ids.logits, by_embeds.logits)


@torch.no_grad()
def test_output_multiplier() -> None:
    model = tiny_model()
    output = model(tokens(2, 9), output_hidden_states=True)
    scale = TINY["mup_output_alpha"] * TINY["mup_width_scale"]
    assert_near(output.logits, model.lm_head(output.hidden_states[-1]) * scale, 1e-5)


@torch.no_grad()
def test_query_key_products_are_divided_by_the_head_dimension() -> None:
    by_d, by_root = tiny_model(), tiny_model(mup_scale_qk_dot_by_d=False)
    for block in by_root.transformer.h:  # queries divided by sqrt(d) compensate for the difference
        for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            tensor[..., : TINY["n_embd"]] *= 4**-0.5
    assert_near(by_root(tokens(1, 20)).logits, by_d(tokens(1, 20)).logits, 1e-5)


def test_wrong_inputs_are_named() -> None:
    model, input_ids = tiny_model(), tokens(1, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids, inputs_embeds=torch.zeros(1, 4, 48))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention_mask covers 3 tokens but 4"):
        model(input_ids, attention_mask=torch.ones(1, 3))
    learned = tiny_model(position_embedding_type="learned", n_positions=4)
    with pytest.raises(ValueError, match=r"5 tokens do not fit the 4 learned positions \(n_positions\)"):
        learned(tokens(1, 5))


@torch.no_grad()
def test_outputs() -> None:
    model, input_ids = tiny_model(), tokens(2, 9)
    output = model(input_ids, labels=input_ids, output_hidden_states=True)
    as_tuple = model(input_ids, labels=input_ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)
    assert len(output.hidden_states) == TINY["n_layer"] + 1
    assert torch.equal(output.hidden_states[-1], model.transformer(input_ids).last_hidden_state)
    assert_near(output.loss, reference.loss(reference.logits_of(model, input_ids), input_ids), 1e-5)
    assert model(input_ids, use_cache=False).past_key_values is None
    assert_near(model(input_ids, logits_to_keep=2).logits, output.logits[:, -2:], 1e-6)
    assert_near(model(input_ids, logits_to_keep=torch.tensor([1, 5])).logits, output.logits[:, [1, 5]], 1e-6)


# Gradients


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * (gradient.norm() + 1e-3), name


def real_labels(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Labels without padding: neither a token nor the one that it is predicted from may be padding."""
    return input_ids if mask is None else input_ids.masked_fill(mask * mask.roll(1, dims=1) == 0, -100)


@both_attentions
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
def test_gradients_equal_those_of_the_reference(attention: str, mask: Tensor | None) -> None:
    model, input_ids = tiny_model(attn_implementation=attention), tokens(3, 24)
    labels = real_labels(input_ids, mask)
    actual = gradients(model, input_ids=input_ids, attention_mask=mask, labels=labels)
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    state = {**leaves, "lm_head.weight": leaves["transformer.wte.weight"]}
    logits = reference.forward(state, model.config.to_dict(), input_ids, key_mask=mask).logits
    expected = torch.autograd.grad(reference.loss(logits, labels), list(leaves.values()))
    assert_gradients_near(actual, {name: g.float() for name, g in zip(leaves, expected, strict=True)}, 1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@both_attentions
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
def test_checkpointed_gradients_keep_the_position_bias(
    use_reentrant: bool, attention: str, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(attn_implementation=attention).train()
    input_ids = tokens(3, 24)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": real_labels(input_ids, mask)}
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls: list[int] = []
    model.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, **inputs)
    assert len(calls) == 2, "the block did not run again in the backward pass"
    assert_gradients_near(checkpointed, expected, 1e-6)
    zeros = torch.zeros(TINY["n_head"])
    monkeypatch.setattr(attention_btlm, "alibi_slopes", lambda n_head, device: zeros)
    without_alibi = gradients(model, **inputs)
    name = "transformer.h.1.attn.c_attn.weight"
    assert (without_alibi[name] - expected[name]).norm() > 0.1 * expected[name].norm()


def test_checkpointing_leaves_caching_out() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    assert model.train()(tokens(1, 5), use_cache=True).past_key_values is None
    assert model.eval()(tokens(1, 5), use_cache=True).past_key_values.get_seq_length() == 5


def test_cached_keys_while_checkpointing_are_an_error() -> None:
    model = tiny_model()
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot use cached keys"):
        model.train()(tokens(1, 3), past_key_values=cache)


# Compilation


@pytest.fixture
def compile_fullgraph() -> Any:
    """Compile without graph breaks; the counter gives the number of compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    yield lambda model: (torch.compile(model, fullgraph=True, backend=counter), counter)
    torch._dynamo.reset()


@both_attentions
@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
@torch.no_grad()
def test_compiles_to_one_graph(compile_fullgraph: Any, mask: Tensor | None, attention: str) -> None:
    model, input_ids = tiny_model(attn_implementation=attention), tokens(3, 24)
    compiled, counter = compile_fullgraph(model)
    actual = compiled(input_ids, attention_mask=mask, use_cache=False).logits
    assert_near(actual, model(input_ids, attention_mask=mask).logits, 1e-5)
    assert counter.frame_count == 1


def test_compiled_training_step(compile_fullgraph: Any) -> None:
    model, input_ids = tiny_model().train(), tokens(3, 24)
    expected = gradients(model, input_ids=input_ids, labels=input_ids, use_cache=False)
    compiled, counter = compile_fullgraph(model)
    model.zero_grad()
    compiled(input_ids, labels=input_ids, use_cache=False).loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradients_near(actual, expected, 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
@torch.no_grad()
def test_decoding_compiles_once_with_a_static_cache(compile_fullgraph: Any, mask: Tensor | None) -> None:
    model, input_ids = tiny_model(), tokens(3, 24)
    cache = StaticCache(model.config, max_cache_len=30)
    model(input_ids[:, :20], attention_mask=None if mask is None else mask[:, :20], past_key_values=cache)
    full_mask = None if mask is None else torch.nn.functional.pad(mask, (0, 6), value=1)
    compiled, counter = compile_fullgraph(model)
    expected = model(input_ids, attention_mask=mask).logits
    for step in range(20, 24):
        logits = compiled(input_ids[:, step, None], attention_mask=full_mask, past_key_values=cache).logits
        assert_near(logits[:, 0], expected[:, step], 1e-5)
    assert counter.frame_count == 1


# Building and changing a model


@torch.no_grad()
def test_resized_vocabulary() -> None:
    model, input_ids = tiny_model(), tokens(1, 9)
    before = model(input_ids).logits
    model.resize_token_embeddings(120)
    after = model(input_ids).logits
    assert after.shape[-1] == model.config.vocab_size == 120
    assert_near(after[..., :101], before, 1e-6)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dropout_acts_in_training_only() -> None:
    model, input_ids = tiny_model(attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2), tokens(1, 9)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
