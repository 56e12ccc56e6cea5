"""Attention in its two forms, folded and explicit: precision, causality, padding, complete masks, probabilities."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from btlm.model import BTLMLMHeadModel
from btlm.model.attention_btlm import BTLMAttention, plan_attention
from tests.model import reference
from tests.model.tiny import TINY, assert_near, tiny_config, tiny_model, tokens

FIXED = {"type": "linear", "factor": 2.5}
DYNAMIC = {"type": "linear", "train_seq_len": 11}
LEFT = torch.tensor([[0] * 9 + [1] * 15, [1] * 24, [0] * 1 + [1] * 23])
RIGHT = LEFT.flip(1)
HOLES = (tokens(3, 24, seed=9) % 3 > 0).long()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# Precision


@pytest.mark.parametrize(("num_keys", "head_dim"), [(8192, 80), (70_000, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_exact_at_length(num_keys: int, head_dim: int, dtype: torch.dtype) -> None:
    """A few queries follow a long random cache, so that rounding errors of the position bias reach the softmax."""
    torch.manual_seed(0)
    n_head, num_queries = 12, 4
    config = tiny_config(n_embd=n_head * head_dim, n_head=n_head, n_layer=1)
    attention = BTLMAttention(config, 0).eval()
    attention.c_attn.weight.normal_(std=config.n_embd**-0.5)
    attention.c_proj.weight.copy_(torch.eye(config.n_embd))
    attention.to(dtype)
    cache: Any = DynamicCache(config=config)
    cache.update(*torch.randn(2, 1, n_head, num_keys - num_queries, head_dim).to(dtype), 0)
    hidden = torch.randn(1, num_queries, config.n_embd).to(dtype)
    query = attention.c_attn(hidden)[..., : config.n_embd].view(1, num_queries, n_head, head_dim).transpose(1, 2)
    actual, _ = attention(hidden, plan_attention(config, hidden, cache, None, output_attentions=False), cache)

    key, value = cache.layers[0].keys.double(), cache.layers[0].values.double()
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    slopes = torch.tensor(reference.press_slopes(n_head), dtype=torch.float64)[:, None, None]
    scores = query.double() @ key.transpose(-1, -2) / head_dim - slopes * distance
    probabilities = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    exact = (probabilities @ value).transpose(1, 2).reshape(actual.shape)
    error = (actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # fp32 shows whether scores are exact; shorter dtypes also round values and output.
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]

    cache.crop(-num_queries)
    _, explicit = attention(hidden, plan_attention(config, hidden, cache, None, output_attentions=True), cache)
    assert_near(explicit, probabilities, 1e-5)


@pytest.mark.parametrize(
    "shape", [{}, {"n_head": 32, "n_embd": 64, "n_layer": 2}, {"n_head": 2, "n_embd": 160}], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_attentions
@torch.no_grad()
def test_closer_to_fp64_than_the_plain_formulation(dtype: torch.dtype, shape: dict[str, int], attention: str) -> None:
    model = tiny_model(attn_implementation=attention, **shape).to(dtype)
    input_ids = tokens(1, 300)
    exact = reference.logits_of(model, input_ids)
    plain = reference.logits_of(model, input_ids, dtype=dtype)
    ours = model(input_ids).logits
    assert ours.dtype == dtype
    assert ours.isfinite().all()

    def error(logits: Tensor) -> Tensor:
        return (logits.double() - exact).square().mean().sqrt()

    assert error(ours) < error(plain)
    assert error(ours) < exact.std() * {torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]


@torch.no_grad()
def test_autocast_keeps_the_position_bias() -> None:
    model = tiny_model()
    input_ids, mask = tokens(3, 24), LEFT
    exact = reference.logits_of(model, input_ids, key_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (model(input_ids, attention_mask=mask).logits.double() - exact)[mask.bool()]
    assert error.square().mean().sqrt() < exact.std() * 2**-5


# Causality and padding


@pytest.mark.parametrize("dtype", DTYPES)
@both_attentions
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT, HOLES], ids=["no mask", "left", "right", "holes"])
@torch.no_grad()
def test_a_token_never_changes_logits_before_it(dtype: torch.dtype, attention: str, mask: Tensor | None) -> None:
    model = tiny_model(attn_implementation=attention).to(dtype)
    input_ids = tokens(3, 24)
    logits = model(input_ids, attention_mask=mask).logits
    for changed in (1, 13, 23):
        other = input_ids.clone()
        other[:, changed] = (other[:, changed] + 1) % TINY["vocab_size"]
        other_logits = model(other, attention_mask=mask).logits
        assert torch.equal(other_logits[:, :changed], logits[:, :changed])
        assert not torch.equal(other_logits[:, changed:], logits[:, changed:])


@both_attentions
def test_no_gradient_reaches_later_tokens(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    inputs_embeds = torch.randn(1, 12, 48, requires_grad=True)
    logits = model(inputs_embeds=inputs_embeds).logits
    for position in (0, 5, 11):
        (gradient,) = torch.autograd.grad(logits[:, position].sum(), inputs_embeds, retain_graph=True)
        reached = gradient[0].abs().sum(-1)
        assert (reached[: position + 1] > 0).all()
        assert (reached[position + 1 :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@both_attentions
@pytest.mark.parametrize("mask", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])
@pytest.mark.parametrize("scaling", [None, DYNAMIC], ids=["plain", "dynamic"])
@torch.no_grad()
def test_padding_is_not_attended_to(
    dtype: torch.dtype, attention: str, mask: Tensor, scaling: dict[str, Any] | None
) -> None:
    model = tiny_model(attn_implementation=attention, alibi_scaling=scaling).to(dtype)
    input_ids, real = tokens(3, 24), mask.bool()
    logits = model(input_ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    exact = reference.logits_of(model, input_ids, key_mask=mask)
    error = (logits.double() - exact)[real]
    if dtype == torch.float32:
        assert error.abs().max() < 1e-4
    assert (
        error.square().mean().sqrt()
        < exact.std() * {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    )
    others = torch.where(real, input_ids, (input_ids + 1) % TINY["vocab_size"])
    assert torch.equal(model(others, attention_mask=mask).logits[real], logits[real])


@both_attentions
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", [{}, {"alibi_scaling": DYNAMIC}, {"position_embedding_type": "learned"}], ids=repr)
@torch.no_grad()
def test_batch_of_unequal_texts_equals_each_alone(side: str, attention: str, variant: dict[str, Any]) -> None:
    model = tiny_model(attn_implementation=attention, **variant)
    texts = [tokens(1, length, seed=length)[0] for length in (1, 6, 17, 24)]
    input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(text) for text in texts], batch_first=True, padding_side=side
    )
    batch = model(input_ids, attention_mask=mask).logits
    for text, row, real in zip(texts, batch, mask.bool(), strict=True):
        assert_near(row[real], model(text[None]).logits[0], 1e-5)


@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["no mask", "left", "holes"])
@pytest.mark.parametrize("scaling", [None, FIXED, DYNAMIC], ids=["plain", "fixed", "dynamic"])
@torch.no_grad()
def test_attention_probabilities(mask: Tensor | None, scaling: dict[str, Any] | None) -> None:
    model, input_ids = tiny_model(alibi_scaling=scaling), tokens(3, 24)
    output = model(input_ids, attention_mask=mask, output_attentions=True)
    assert_near(output.logits, model(input_ids, attention_mask=mask).logits, 1e-5 if mask is None else float("inf"))
    expected = reference.forward(model.state_dict(), model.config.to_dict(), input_ids, key_mask=mask).probabilities
    real = torch.ones(3, 24, dtype=torch.bool) if mask is None else mask.bool()
    assert len(output.attentions) == TINY["n_layer"]
    for probabilities, exact in zip(output.attentions, expected, strict=True):
        assert probabilities.shape == (3, TINY["n_head"], 24, 24)
        assert_near(probabilities.sum(-1), torch.ones(3, TINY["n_head"], 24), 1e-5)
        assert_near(probabilities.transpose(1, 2)[real], exact.transpose(1, 2)[real], 1e-5)


def additive(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@both_attentions
@pytest.mark.parametrize("form", [torch.bool, torch.float32, torch.float64], ids=["bool", "fp32", "fp64"])
@pytest.mark.parametrize("scaling", [None, FIXED], ids=["plain", "fixed"])
@torch.no_grad()
def test_packed_documents_equal_each_alone(attention: str, form: torch.dtype, scaling: dict[str, Any] | None) -> None:
    model = tiny_model(attn_implementation=attention, alibi_scaling=scaling)
    lengths, input_ids = [5, 1, 11, 7], tokens(2, 24)
    visible = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool().expand(2, 1, 24, 24)
    packed = model(input_ids, attention_mask=visible if form == torch.bool else additive(visible, form)).logits
    alone = [model(document).logits for document in input_ids.split(lengths, dim=1)]
    assert_near(packed, torch.cat(alone, dim=1), 1e-5)


@both_attentions
@pytest.mark.parametrize("form", [torch.bool, torch.float32])
@torch.no_grad()
def test_complete_mask_equals_padding_mask(attention: str, form: torch.dtype) -> None:
    model, input_ids = tiny_model(attn_implementation=attention), tokens(3, 24)
    visible = (torch.ones(24, 24).tril() * HOLES[:, None, None, :]).bool()
    complete = model(input_ids, attention_mask=visible if form == torch.bool else additive(visible)).logits
    assert_near(complete[HOLES.bool()], model(input_ids, attention_mask=HOLES).logits[HOLES.bool()], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@both_attentions
@pytest.mark.parametrize("form", [torch.bool, torch.float32, "the model's"], ids=str)
@torch.no_grad()
def test_complete_mask_with_rows_that_see_nothing(dtype: torch.dtype, attention: str, form: Any) -> None:
    """Rows of padding in an additive mask have its lowest value everywhere; they must not make real tokens NaN."""
    model, input_ids = tiny_model(attn_implementation=attention).to(dtype), tokens(3, 24)
    visible = (torch.ones(24, 24).tril() * LEFT[:, None, None, :]).bool()
    mask = visible if form == torch.bool else additive(visible, dtype if form == "the model's" else form)
    logits = model(input_ids, attention_mask=mask).logits
    expected = model(input_ids, attention_mask=LEFT).logits
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    assert_near(logits[LEFT.bool()], expected[LEFT.bool()], tolerance)


@both_attentions
@pytest.mark.parametrize("form", [torch.bool, torch.float32], ids=str)
@torch.no_grad()
def test_a_complete_mask_never_uncovers_later_tokens(attention: str, form: torch.dtype) -> None:
    model, input_ids = tiny_model(attn_implementation=attention), tokens(1, 24)
    visible = torch.ones(24, 24).tril().bool()
    visible[:10, :10] = True
    mask = visible[None, None] if form == torch.bool else additive(visible[None, None])
    assert_near(model(input_ids, attention_mask=mask).logits, model(input_ids).logits, 1e-5)


# Which form is chosen


@both_attentions
def test_mask_of_three_dimensions_is_an_error(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    with pytest.raises(ValueError, match=r"attention_mask.*\(1, 9, 9\)"):
        model(tokens(1, 9), attention_mask=torch.ones(1, 9, 9).tril())


@both_attentions
def test_mask_for_another_batch_is_an_error(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    with pytest.raises(ValueError, match="a batch of 2, and the input for one of 3"):
        model(tokens(3, 9), attention_mask=torch.ones(2, 9))


@torch.no_grad()
def test_attention_is_set_later() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_attention_other_than_ours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"flash_attention_2|Flash Attention"):
        BTLMLMHeadModel(tiny_config(attn_implementation="flash_attention_2"))
