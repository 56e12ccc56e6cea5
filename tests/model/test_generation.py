"""Decoding: the cache compared with whole forward passes, `generate`, and the snippets of the model card."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

import btlm  # noqa: F401 - registers the model that the snippets of the card load
from btlm.model import BTLMLMHeadModel, attention_btlm
from btlm.model.tokenization_btlm import load_tokenizer
from tests.model.tiny import assert_near, gpt2_and_ours, tiny_model, tokens

LENGTH = 24
LEFT = torch.tensor([[0] * 9 + [1] * 15, [1] * 24, [0] * 1 + [1] * 23])
PERMUTATION = torch.tensor([2, 0, 0])
FIXED = {"type": "linear", "factor": 2.5}
DYNAMIC = {"type": "linear", "train_seq_len": 11}

one_by_one = [1] * LENGTH
chunkings = pytest.mark.parametrize(
    "chunks",
    [one_by_one, [9, *[1] * 15], [7, 5, 1, 4, 7], [1, 10, 13], [13, 1, 2, 8]],
    ids=lambda chunks: "one by one" if chunks == one_by_one else str(len(chunks)),
)
caches = pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
masks = pytest.mark.parametrize("mask", [None, LEFT], ids=["no mask", "left"])
scalings = pytest.mark.parametrize("scaling", [None, FIXED, DYNAMIC], ids=["plain", "fixed", "dynamic"])


def make_cache(kind: type[Cache], model: Any) -> Cache:
    return kind(config=model.config) if kind is DynamicCache else StaticCache(model.config, max_cache_len=LENGTH + 5)


def real_rows(mask: Tensor | None, start: int, end: int) -> Tensor:
    return torch.ones(3, end - start, dtype=torch.bool) if mask is None else mask[:, start:end].bool()


def assert_cached_equals_uncached(
    model: Any, input_ids: Tensor, mask: Tensor | None, chunks: list[int], cache: Cache
) -> None:
    """At every step, the logits of new tokens equal those of one forward pass over the whole text so far."""
    start = 0
    for size in chunks:
        end = start + size
        so_far = None if mask is None else mask[:, :end]
        new = model(input_ids[:, start:end], attention_mask=so_far, past_key_values=cache)
        uncached = model(input_ids[:, :end], attention_mask=so_far, use_cache=False)
        real = real_rows(mask, start, end)
        assert new.past_key_values is cache
        assert new.logits.shape[1] == size
        assert_near(new.logits[real], uncached.logits[:, start:][real], 2e-5)
        assert cache.get_seq_length() == end
        start = end
    assert start == LENGTH


# Results with and without a cache are equal


@caches
@chunkings
@masks
@scalings
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_equals_uncached(
    kind: type[Cache],
    chunks: list[int],
    mask: Tensor | None,
    scaling: dict[str, Any] | None,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_btlm, "QUERY_BLOCK", 4)
    model = tiny_model(alibi_scaling=scaling, attn_implementation=attention)
    assert_cached_equals_uncached(model, tokens(3, LENGTH), mask, chunks, make_cache(kind, model))


@caches
@chunkings
@masks
@torch.no_grad()
def test_cached_equals_uncached_with_learned_positions(
    kind: type[Cache], chunks: list[int], mask: Tensor | None
) -> None:
    model = tiny_model(position_embedding_type="learned")
    assert_cached_equals_uncached(model, tokens(3, LENGTH), mask, chunks, make_cache(kind, model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@caches
@torch.no_grad()
def test_cached_is_close_to_uncached_in_short_dtypes(dtype: torch.dtype, kind: type[Cache]) -> None:
    model, input_ids = tiny_model().to(dtype), tokens(3, LENGTH)
    uncached = model(input_ids, use_cache=False).logits.float()
    cache: Any = make_cache(kind, model)
    cached = torch.cat(
        [model(chunk, past_key_values=cache).logits for chunk in input_ids.split(5, dim=1)], dim=1
    ).float()
    error = (cached - uncached).square().mean().sqrt()
    assert error < uncached.std() * {torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]


@caches
@scalings
@masks
@torch.no_grad()
def test_reordered_cache_continues_the_reordered_texts(
    kind: type[Cache], scaling: dict[str, Any] | None, mask: Tensor | None
) -> None:
    """As in beam search, every step permutes the texts, drops some and duplicates others."""
    model, input_ids = tiny_model(alibi_scaling=scaling), tokens(3, 8)
    cache: Any = make_cache(kind, model)
    rows = LEFT[:, 6:14] if mask is not None else None
    model(input_ids, attention_mask=rows, past_key_values=cache)
    for step in range(6):
        cache.reorder_cache(PERMUTATION)
        input_ids = torch.cat((input_ids[PERMUTATION], tokens(3, 1, seed=step)), dim=1)
        rows = None if rows is None else torch.nn.functional.pad(rows[PERMUTATION], (0, 1), value=1)
        new = model(input_ids[:, -1:], attention_mask=rows, past_key_values=cache).logits[:, -1]
        assert_near(new, model(input_ids, attention_mask=rows, use_cache=False).logits[:, -1], 2e-5)


@caches
@scalings
@torch.no_grad()
def test_cache_is_reusable_after_a_reset(kind: type[Cache], scaling: dict[str, Any] | None) -> None:
    model = tiny_model(alibi_scaling=scaling)
    cache: Any = make_cache(kind, model)
    model(tokens(3, LENGTH, seed=7), past_key_values=cache)
    cache.reset()
    assert_cached_equals_uncached(model, tokens(3, LENGTH), None, [7, 5, 1, 4, 7], cache)


@scalings
@torch.no_grad()
def test_cropped_cache_continues_the_shorter_text(scaling: dict[str, Any] | None) -> None:
    model, input_ids = tiny_model(alibi_scaling=scaling), tokens(3, LENGTH)
    cache = DynamicCache(config=model.config)
    model(torch.cat((input_ids[:, :15], tokens(3, 5, seed=8)), dim=1), past_key_values=cache)
    cache.crop(-5)
    new = model(input_ids[:, 15:18], past_key_values=cache).logits
    assert_near(new, model(input_ids[:, :18]).logits[:, 15:], 2e-5)


@torch.no_grad()
def test_static_cache_longer_than_the_mask_hides_empty_slots() -> None:
    model, input_ids = tiny_model(), tokens(3, LENGTH)
    cache = StaticCache(model.config, max_cache_len=200)
    model(tokens(3, 60, seed=3), past_key_values=cache)  # old keys, which must not count after the reset
    cache.reset()
    assert_cached_equals_uncached(model, input_ids, LEFT, [7, 5, 1, 4, 7], cache)


@pytest.mark.parametrize("train_seq_len", [11, 20])
@torch.no_grad()
def test_a_mask_of_all_slots_of_a_static_cache_counts_only_those_in_use(train_seq_len: int) -> None:
    """Dynamic interpolation counts keys; slots that are empty yet are none, though the mask has ones there."""
    model = tiny_model(alibi_scaling={"type": "linear", "train_seq_len": train_seq_len})
    input_ids, cache, start = tokens(3, LENGTH), make_cache(StaticCache, model), 0
    for size in (7, 1, 3, 1, 6, 1, 5):
        end = start + size
        mask = torch.cat((LEFT[:, :end], torch.ones(3, LENGTH + 5 - end, dtype=torch.long)), dim=1)
        new = model(input_ids[:, start:end], attention_mask=mask, past_key_values=cache)
        uncached = model(input_ids[:, :end], attention_mask=LEFT[:, :end], use_cache=False)
        real = real_rows(LEFT, start, end)
        assert_near(new.logits[real], uncached.logits[:, start:][real], 2e-5)
        start = end
    assert start == LENGTH


@pytest.mark.parametrize("scaling", [None, FIXED], ids=["plain", "fixed"])
@torch.no_grad()
def test_packed_documents_with_a_cache(scaling: dict[str, Any] | None) -> None:
    """The mask covers cached and new tokens."""
    model, input_ids = tiny_model(alibi_scaling=scaling), tokens(1, LENGTH)
    visible = torch.block_diag(torch.ones(10, 10).tril(), torch.ones(14, 14).tril()).bool()[None, None]
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :15], attention_mask=visible[..., :15, :15], past_key_values=cache)
    several = model(input_ids[:, 15:22], attention_mask=visible[..., 15:22, :22], past_key_values=cache).logits
    single = model(input_ids[:, 22:23], attention_mask=visible[..., 22:23, :23], past_key_values=cache).logits
    alone = model(input_ids[:, 10:]).logits
    assert_near(torch.cat((several, single), dim=1), alone[:, 5:13], 2e-5)


@pytest.mark.parametrize("new", [1, 4])
@torch.no_grad()
def test_complete_mask_with_a_cache_under_dynamic_interpolation_is_an_error(new: int) -> None:
    """The mask has rows only for the new tokens, but the cached tokens would be computed again."""
    model, input_ids = tiny_model(alibi_scaling=DYNAMIC), tokens(3, LENGTH)
    visible = torch.ones(LENGTH, LENGTH).tril().bool().expand(3, 1, -1, -1)
    cache, past = DynamicCache(config=model.config), LENGTH - new
    model(input_ids[:, :past], attention_mask=visible[..., :past, :past], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has rows only for the new tokens"):
        model(input_ids[:, past:], attention_mask=visible[..., past:, :], past_key_values=cache)
    logits = model(input_ids[:, past:], past_key_values=cache).logits  # the error left the cache unchanged
    assert_near(logits, model(input_ids, use_cache=False).logits[:, past:], 2e-5)


@scalings
@torch.no_grad()
def test_outputs_are_those_of_the_new_tokens(scaling: dict[str, Any] | None) -> None:
    model, input_ids = tiny_model(alibi_scaling=scaling), tokens(3, LENGTH)
    options = {"output_attentions": True, "output_hidden_states": True}
    cache = model(input_ids[:, :20]).past_key_values
    cached = model(input_ids[:, 20:], past_key_values=cache, **options)
    uncached = model(input_ids, **options)
    for actual, expected in zip(cached.hidden_states, uncached.hidden_states, strict=True):
        assert_near(actual, expected[:, 20:], 2e-5)
    for actual, expected in zip(cached.attentions, uncached.attentions, strict=True):
        assert_near(actual, expected[:, :, 20:], 2e-5)


def test_mask_that_leaves_out_cached_tokens_is_an_error() -> None:
    model, input_ids = tiny_model(), tokens(3, LENGTH)
    cache = model(input_ids[:, :20]).past_key_values
    with pytest.raises(ValueError, match=r"covers 4 tokens but 24 are attended to; include the cached ones"):
        model(input_ids[:, 20:], attention_mask=torch.ones(3, 4), past_key_values=cache)


# generate()


def ids_without_cache(model: Any, prompt: Tensor, **kwargs: Any) -> Tensor:
    output = model.generate(prompt, use_cache=False, **kwargs)
    assert isinstance(output, Tensor)
    return output


@scalings
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 20},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
    ],
    ids=repr,
)
@torch.no_grad()
def test_generation_with_and_without_a_cache(scaling: dict[str, Any] | None, options: dict[str, Any]) -> None:
    model = tiny_model(alibi_scaling=scaling)
    prompt, options = tokens(3, 9), {"max_new_tokens": 12, "pad_token_id": 0, **options}
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    torch.manual_seed(5)
    cached = model.generate(prompt, attention_mask=mask, **options, disable_compile=True)
    options = {key: value for key, value in options.items() if key != "cache_implementation"}
    torch.manual_seed(5)
    assert torch.equal(cached, ids_without_cache(model, prompt, attention_mask=mask, **options))
    assert cached.shape == (3, 21)


@torch.no_grad()
def test_steps_with_a_static_cache_have_one_shape() -> None:
    model, prompt = tiny_model(), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # Transformers drops a mask without padding.
    shapes = []

    def note(module: object, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        shapes.append([kwargs[name].shape for name in ("input_ids", "position_ids", "attention_mask")])

    model.register_forward_pre_hook(note, with_kwargs=True)
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert len(shapes) == 6
    assert all(step == shapes[1] for step in shapes[1:])


# Without dynamic interpolation: there, speculation scores several tokens with the slopes of the last (docs/context.md).
@pytest.mark.parametrize("scaling", [None, FIXED], ids=["plain", "fixed"])
@torch.no_grad()
def test_speculation_does_not_change_the_text(scaling: dict[str, Any] | None) -> None:
    model, prompt = tiny_model(alibi_scaling=scaling), tokens(1, 4).repeat(1, 4)  # repetition, so that there are drafts
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "pad_token_id": 0}
    speculated = model.generate(prompt, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(speculated, ids_without_cache(model, prompt, **options))


@torch.no_grad()
def test_padded_batch_generates_what_each_text_does_alone() -> None:
    model = tiny_model()
    texts = [tokens(1, length, seed=length) for length in (3, 9, 6)]
    prompt = torch.nn.utils.rnn.pad_sequence([text[0] for text in texts], batch_first=True, padding_side="left")
    mask = torch.tensor([[0] * 6 + [1] * 3, [1] * 9, [0] * 3 + [1] * 6])
    options = {"max_new_tokens": 12, "pad_token_id": 0}
    together = model.generate(prompt, attention_mask=mask, **options)[:, 9:]
    alone = [
        model.generate(text, attention_mask=torch.ones_like(text), **options)[0, text.shape[1] :] for text in texts
    ]
    assert torch.equal(together, torch.stack(alone))


@scalings
@torch.no_grad()
def test_generation_from_embeddings(scaling: dict[str, Any] | None) -> None:
    model, prompt = tiny_model(alibi_scaling=scaling), tokens(2, 9)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "pad_token_id": 0}
    by_embeds = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **options)
    assert torch.equal(by_embeds, model.generate(prompt, **options)[:, 9:])


@torch.no_grad()
def test_padded_batch_generates_what_gpt2_does() -> None:
    gpt2, ours = gpt2_and_ours()
    prompt, mask = tokens(3, LENGTH), LEFT
    options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "num_beams": 2}
    assert torch.equal(ours.generate(prompt, **options), gpt2.generate(prompt, **options))


@torch.no_grad()
def test_generation_continues_a_returned_cache() -> None:
    model, prompt = tiny_model(), tokens(1, 9)
    options = {"pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, **options)
    longer = torch.cat((first.sequences, tokens(1, 4, seed=2)), dim=1)
    mask = torch.ones_like(longer)
    second = model.generate(
        longer, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5, **options
    )
    assert torch.equal(second.sequences, ids_without_cache(model, longer, attention_mask=mask, max_new_tokens=5))


# The model card's section Usage, word for word.

WITH_GENERATE = """
from transformers import AutoTokenizer, AutoModelForCausalLM

# Load the tokenizer and model
tokenizer = AutoTokenizer.from_pretrained("cerebras/btlm-3b-8k-base")
model = AutoModelForCausalLM.from_pretrained("cerebras/btlm-3b-8k-base", trust_remote_code=True, torch_dtype="auto")

# Set the prompt for generating text
prompt = "Albert Einstein was known for "

# Tokenize the prompt and convert to PyTorch tensors
inputs = tokenizer(prompt, return_tensors="pt")

# Generate text using the model
outputs = model.generate(
    **inputs,
    num_beams=5,
    max_new_tokens=50,
    early_stopping=True,
    no_repeat_ngram_size=2
)

# Convert the generated token IDs back to text
generated_text = tokenizer.batch_decode(outputs, skip_special_tokens=True)

# Print the generated text
print(generated_text[0])
"""

WITH_PIPELINE = '''
from transformers import AutoTokenizer, AutoModelForCausalLM
from transformers import pipeline

# Load the tokenizer and model
tokenizer = AutoTokenizer.from_pretrained("cerebras/btlm-3b-8k-base")
model = AutoModelForCausalLM.from_pretrained("cerebras/btlm-3b-8k-base", trust_remote_code=True, torch_dtype="auto")

# Set the prompt for text generation
prompt = """Isaac Newton was a """

# Create a text generation pipeline
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)

# Generate text using the pipeline
generated_text = pipe(
    prompt, 
    max_length=50, 
    do_sample=False, 
    no_repeat_ngram_size=2)[0]

# Print the generated text
print(generated_text['generated_text'])
'''  # noqa: W291 - the card's own trailing spaces


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the released one except for size: bf16, the whole vocabulary, end-of-text as bos and eos."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(vocab_size=50257, bos_token_id=50256, eos_token_id=50256).to(torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def run_snippet(snippet: str, folder: Path, remote_code: bool) -> dict[str, Any]:
    snippet = snippet.replace("cerebras/btlm-3b-8k-base", str(folder))
    if not remote_code:
        snippet = snippet.replace(" trust_remote_code=True,", "")
    assert ("trust_remote_code" in snippet) == remote_code
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert type(names["model"]) is BTLMLMHeadModel
    assert names["model"].dtype == torch.bfloat16
    return names


def has_repeated_bigram(ids: list[int]) -> bool:
    bigrams = list(pairwise(ids))
    return len(set(bigrams)) < len(bigrams)


remote_code = pytest.mark.parametrize("remote_code", [True, False], ids=["remote code", "no remote code"])


@remote_code
def test_usage_with_generate(remote_code: bool, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_snippet(WITH_GENERATE, checkpoint, remote_code)
    prompt, (ids,) = names["inputs"]["input_ids"][0].tolist(), names["outputs"].tolist()
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + 50 or ids[-1] == 50256
    assert not has_repeated_bigram(ids)
    assert capsys.readouterr().out == names["tokenizer"].decode(ids, skip_special_tokens=True) + "\n"

    uncached = names["model"].generate(
        **names["inputs"], num_beams=5, max_new_tokens=50, early_stopping=True, use_cache=False, pad_token_id=50256
    )
    assert has_repeated_bigram(uncached[0].tolist()), "without the option bigrams repeat, so the option did the work"


@remote_code
def test_usage_with_pipeline(remote_code: bool, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_snippet(WITH_PIPELINE, checkpoint, remote_code)
    text = names["generated_text"]["generated_text"]
    assert text.startswith("Isaac Newton was a ")
    assert len(text) > len("Isaac Newton was a ")
    inputs = names["tokenizer"]("Isaac Newton was a ", return_tensors="pt")
    start = names["model"].generate(**inputs, do_sample=False, no_repeat_ngram_size=2, max_new_tokens=20)[0]
    assert text.startswith(names["tokenizer"].decode(start))
    assert capsys.readouterr().out == text + "\n"
