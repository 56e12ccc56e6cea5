import itertools
import time

import pytest
import torch
from transformers import GenerationConfig

from btlm.engine import GenerationOptions
from btlm.errors import LogitsNotFinite
from btlm.generate import generate_text
from btlm.generate.with_transformers import length_warning
from btlm.model import BTLMConfig
from btlm.model.tokenization_btlm import load_tokenizer
from tests.checkpoint.tiny import END, TINY, byte_tokenizer, tiny_model

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def run(model, tokenizer, prompt=PROMPT, **options):
    pieces: list[str] = []
    report = generate_text(model, tokenizer, prompt, GenerationOptions(**options), pieces.append)
    return pieces, report


def reference(model, tokenizer, prompt=PROMPT, **options):
    """The continuation through Transformers' own interface, not streamed."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=END, **options)
    return output[0, ids.shape[1] :].tolist()


class Script(torch.nn.Module):
    """A stand-in for a model, with a given continuation."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids
        self.device = torch.device("cpu")
        self.config = BTLMConfig(**TINY)
        self.generation_config = GenerationConfig(eos_token_id=END)

    def generate(self, inputs, streamer, **_):
        streamer.put(inputs)
        for token in self.ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat((inputs, torch.tensor([self.ids])), dim=1)


# Text that is written


def test_streamed_text_is_that_of_generate(model, tokenizer):
    pieces, report = run(model, tokenizer, max_new_tokens=24)
    ids = reference(model, tokenizer, max_new_tokens=24, do_sample=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert report.prompt_tokens == len(PROMPT)
    assert report.new_tokens == len(ids)


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, load_tokenizer])
def test_text_comes_as_soon_as_a_character_is_whole(make_tokenizer):
    tokenizer = make_tokenizer()
    text = " naïve 你好, 🙂\nnot\ttoo  late — é"
    ids = tokenizer(text).input_ids
    pieces, _ = run(Script(ids), tokenizer)
    assert "".join(pieces) == text
    # No piece ends inside a character, and every piece is written as soon as its last character is complete.
    boundaries = {len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)}
    assert set(itertools.accumulate(map(len, pieces))) <= boundaries
    assert max(map(len, pieces)) <= max(len(tokenizer.decode([token])) for token in ids)
    assert len(pieces) > len(text.split())


def test_the_replacement_character_is_a_character(tokenizer):
    text = "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    assert "".join(run(Script(tokenizer(text).input_ids), tokenizer)[0]) == text


def test_a_character_that_stays_incomplete_is_written_at_the_end(tokenizer):
    ids = tokenizer("a🙂").input_ids[:-1]
    pieces, _ = run(Script(ids), tokenizer)
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_not_written(tokenizer):
    pieces, report = run(Script([*tokenizer("ab").input_ids, END]), tokenizer)
    assert "".join(pieces) == "ab"
    assert report.end_of_text
    assert report.new_tokens == 3


def test_a_text_ends_where_the_model_ends_it(model, tokenizer):
    first, second, third = reference(model, tokenizer, max_new_tokens=3, do_sample=False)
    assert third not in (first, second)
    ending = tiny_model()
    ending.generation_config.eos_token_id = [END, third]
    _, report = run(ending, tokenizer, max_new_tokens=10)
    assert (report.new_tokens, report.end_of_text) == (3, True)
    _, report = run(ending, tokenizer, max_new_tokens=2)
    assert (report.new_tokens, report.end_of_text) == (2, False)


@pytest.mark.parametrize("prompt", ["<|endoftext|>", "\n", " "])
def test_any_prompt_but_the_empty_one_is_continued(model, tokenizer, prompt):
    assert run(model, tokenizer, prompt, max_new_tokens=1)[1].prompt_tokens == 1


def test_an_empty_prompt(model, tokenizer):
    with pytest.raises(ValueError, match="The prompt is empty"):
        run(model, tokenizer, "")


# How tokens are chosen


def test_beams_are_those_of_transformers_written_at_once(model, tokenizer):
    pieces, report = run(model, tokenizer, max_new_tokens=8, num_beams=3)
    ids = reference(model, tokenizer, max_new_tokens=8, num_beams=3, do_sample=False)
    assert len(pieces) == 1
    assert pieces[0] == tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[0] != "".join(run(model, tokenizer, max_new_tokens=8)[0])
    assert report.first_token_s is None
    assert report.new_tokens == len(ids)


def test_beams_do_not_count_padding(tokenizer):
    class Padded(Script):
        def generate(self, inputs, streamer, **_):
            assert streamer is None
            return torch.cat((inputs, torch.tensor([self.ids])), dim=1)

    pieces, report = run(Padded([*tokenizer("ab").input_ids, END, END, END]), tokenizer, num_beams=2)
    assert pieces == ["ab"]
    assert (report.new_tokens, report.end_of_text) == (3, True)


def sample(model, tokenizer, seed, length, probabilities_of):
    """Sample by the definition, with one forward pass over the whole text per token."""
    torch.manual_seed(seed)
    ids = tokenizer(PROMPT).input_ids
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        ids = [*ids, int(torch.multinomial(probabilities_of(logits), 1))]
    return tokenizer.decode(ids[len(PROMPT) :], skip_special_tokens=True)


def nucleus(logits, share):
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = probabilities.cumsum(-1) - probabilities < share
    result = torch.zeros_like(logits)
    result[order[kept]] = probabilities[kept] / probabilities[kept].sum()
    return result


def top(logits, count):
    kept = logits.topk(count)
    return torch.zeros_like(logits).scatter(0, kept.indices, kept.values.softmax(-1))


@pytest.mark.parametrize(
    ("options", "probabilities_of"),
    [
        ({"temperature": 1.5}, lambda logits: (logits / 1.5).softmax(-1)),  # from all 257 tokens, not only the top 50
        ({"top_p": 0.6}, lambda logits: nucleus(logits, 0.6)),
        ({"top_k": 4}, lambda logits: top(logits, 4)),
        ({"temperature": 0.7, "top_k": 9}, lambda logits: top(logits / 0.7, 9)),
    ],
)
def test_samples_follow_the_definition(model, tokenizer, options, probabilities_of):
    pieces, report = run(model, tokenizer, max_new_tokens=12, seed=5, **options)
    assert "".join(pieces) == sample(model, tokenizer, 5, report.new_tokens, probabilities_of)
    assert report.seed == 5


def test_seeds_repeat_and_differ(model, tokenizer):
    def text(seed):
        return run(model, tokenizer, max_new_tokens=16, temperature=2.0, seed=seed)[0]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_drawn_seed_is_reported_and_repeats(model, tokenizer):
    pieces, report = run(model, tokenizer, max_new_tokens=16, temperature=2.0)
    assert run(model, tokenizer, max_new_tokens=16, temperature=2.0, seed=report.seed)[0] == pieces
    assert f"seed {report.seed}" in str(report)


def test_nothing_is_drawn_without_sampling(model, tokenizer):
    before = torch.random.get_rng_state()
    assert run(model, tokenizer, max_new_tokens=2)[1].seed is None
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_ngram_is_repeated(model, tokenizer):
    pieces, _ = run(model, tokenizer, max_new_tokens=30, no_repeat_ngram_size=1)
    ids = reference(model, tokenizer, max_new_tokens=30, no_repeat_ngram_size=1, do_sample=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(ids)) == len(ids)
    assert pieces != run(model, tokenizer, max_new_tokens=30)[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1}, {"num_beams": 2}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_write_no_text(tokenizer, options, bad):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("transformer.h.1.ln_2.bias")[3] = bad
    written: list[str] = []
    with pytest.raises(LogitsNotFinite, match=r"transformer\.h\.1\.ln_2\.bias holds NaN or infinity"):
        generate_text(model, tokenizer, "ab", GenerationOptions(max_new_tokens=4, **options), written.append)
    assert not written


def test_recommendations_of_the_checkpoint_change_nothing(tokenizer):
    model = tiny_model()
    expected = run(model, tokenizer, max_new_tokens=8)[0]
    model.generation_config.update(repetition_penalty=9.0, min_length=99, no_repeat_ngram_size=1, top_k=1, num_beams=2)
    recommended = model.generation_config
    assert run(model, tokenizer, max_new_tokens=8)[0] == expected
    assert model.generation_config is recommended


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not a whole number of at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 0, "top_p": 0.9}, "temperature 0 always takes the most probable token; leave top_p and top_k"),
        ({"temperature": 0, "seed": 1}, "seed needs sampling"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size is 0"),
        ({"top_k": 1, "seed": -1}, "seed is -1"),
        ({"seed": 1}, "seed needs sampling"),
        ({"num_beams": 4, "temperature": 1.0}, "use one or the other"),
        ({"num_beams": 4, "seed": 1}, "seed needs sampling"),
    ],
)
def test_impossible_options(options, expected):
    with pytest.raises(ValueError, match=r", not |needs|use one|leave") as error:
        GenerationOptions(**options)
    assert expected in str(error.value)


def test_impossible_options_are_told_together():
    with pytest.raises(ValueError, match=r"max_new_tokens is 0, .*top_p is 2, .*top_k is -1"):
        GenerationOptions(max_new_tokens=0, top_p=2, top_k=-1)


# Speeds that are reported


def test_speed_leaves_out_the_first_token(tokenizer, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 4)
    _, report = run(Script([1, 2, 3]), tokenizer)
    # Clock readings at the start, the first token and the two others, a quarter of a second apart.
    assert (report.first_token_s, report.total_s) == (0.25, 0.75)
    told = "16 prompt tokens, 3 new (first after 0.25 s, then 4.0 tokens/s); stopped at max_new_tokens"
    assert str(report) == told


def test_one_token_has_no_speed(tokenizer, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 4)
    _, report = run(Script([END]), tokenizer)
    assert str(report) == "16 prompt tokens, 1 new (first after 0.25 s); stopped at end of text"


# Length


def config(**values):
    return BTLMConfig(**{**TINY, **values})


@pytest.mark.parametrize("position_embedding_type", ["alibi", "learned"])
def test_the_training_length_is_no_reason_to_warn(position_embedding_type):
    assert length_warning(config(position_embedding_type=position_embedding_type), 64) is None


@pytest.mark.parametrize(
    ("scaling", "length", "made_for"),
    [
        (None, 65, 64),
        (None, 128, 64),
        ({"type": "linear", "factor": 2.0}, 128, None),
        ({"type": "linear", "factor": 2.0}, 129, 128),
        ({"type": "linear", "train_seq_len": 64}, 100_000, None),
    ],
)
def test_a_longer_text_warns_where_nothing_scales_to_it(scaling, length, made_for):
    warning = length_warning(config(alibi_scaling=scaling), length)
    if made_for is None:
        assert warning is None
    else:
        assert warning is not None
        assert f"more than the {made_for} that this model is made for" in warning
        assert f"{length} tokens" in warning
        assert "context_scaling (dynamic, or a factor) helps some models and harms others" in warning


def test_learned_positions_end():
    with pytest.raises(ValueError, match=r"65 tokens.* end at 64"):
        length_warning(config(position_embedding_type="learned"), 65)
