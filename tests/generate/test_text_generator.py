import itertools
from types import SimpleNamespace

import pytest

from btlm.checkpoint import BUNDLED_MODEL
from btlm.engine import Engine, GenerationOptions
from btlm.errors import EngineFull, NotSupported, TooLong
from btlm.generate import TextGenerator
from tests.checkpoint.tiny import byte_tokenizer, set_config

OPTIONS = GenerationOptions(max_new_tokens=20)
PROMPT = "Once upon a time"


@pytest.fixture
def generator(checkpoint):
    return TextGenerator.open(checkpoint, context=60, kernels="torch", threads=1)


@pytest.fixture
def whole(checkpoint):
    """The continuation by the engine, decoded at once."""
    tokenizer = byte_tokenizer()
    engine = Engine.open(checkpoint, context=60, kernels="torch", threads=1)
    ids = [token.id for token in engine.generate(tokenizer(PROMPT).input_ids, OPTIONS)]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_text_is_that_of_the_engine_whole_and_in_pieces(generator, whole):
    assert generator.generate(PROMPT, OPTIONS) == whole
    stream = generator.stream(PROMPT, OPTIONS)
    pieces = list(stream)
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    assert all(pieces)
    report = stream.report
    assert (report.prompt_tokens, report.new_tokens, report.end_of_text, report.stop) == (16, 20, False, None)
    assert 0 < report.first_token_s <= report.total_s


def test_times_are_those_of_the_first_token_and_of_the_last(generator, monkeypatch):
    clock = itertools.count()
    # Only for the generator: the engine reads the clock, too.
    only_here = SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr("btlm.generate.text_generator.time", only_here)
    stream = generator.stream(PROMPT, OPTIONS)
    assert "".join(stream)
    assert (stream.report.first_token_s, stream.report.total_s) == (1, 20)


def test_right_guesses_are_reported(generator):
    stream = generator.stream("a b a b a b a b", GenerationOptions(max_new_tokens=20, lookup_tokens=4))
    text = "".join(stream)
    report = stream.report
    assert 0 <= report.right_guesses <= report.guesses
    assert report.guesses > 0
    assert f"; {report.right_guesses} of {report.guesses} guesses right; stopped at" in str(report)
    stream = generator.stream("a b a b a b a b", GenerationOptions(max_new_tokens=20, lookup_tokens=0))
    assert "".join(stream) == text
    assert "guess" not in str(stream.report)


def test_it_ends_before_a_stop_text(generator, whole):
    stop = whole[7:9]
    stream = generator.stream(PROMPT, OPTIONS, stop=["never in it", stop])
    assert "".join(stream) == whole[: whole.index(stop)]
    assert stream.report.stop == stop
    assert stream.report.new_tokens < 20
    assert str(stream.report).endswith(f"; stopped at {stop!r}")
    assert generator.engine.has_room
    # The beginning of a stop text is part of the continuation if the rest does not come.
    assert generator.generate(PROMPT, OPTIONS, stop=[whole[-2:] + "x"]) == whole


def test_a_reader_who_leaves_frees_the_engine(generator, whole):
    stream = iter(generator.stream(PROMPT, OPTIONS))
    assert whole.startswith(next(stream))
    with pytest.raises(EngineFull):
        generator.generate(PROMPT, OPTIONS)
    stream.close()
    assert generator.generate(PROMPT, OPTIONS) == whole


def test_streams_at_the_same_time(checkpoint, whole):
    generator = TextGenerator.open(checkpoint, context=60, num_requests=2, threads=1)
    first, second = (iter(generator.stream(PROMPT, OPTIONS)) for _ in range(2))
    texts = ["", ""]
    for a, b in zip(first, second, strict=True):
        texts = [texts[0] + a, texts[1] + b]
    assert texts == [whole, whole]


def test_the_seed_is_reported(generator):
    stream = generator.stream(PROMPT, GenerationOptions(max_new_tokens=20, temperature=1.0))
    text = "".join(stream)
    again = GenerationOptions(max_new_tokens=20, temperature=1.0, seed=stream.report.seed)
    assert generator.generate(PROMPT, again) == text
    assert generator.generate(PROMPT, GenerationOptions(max_new_tokens=20, temperature=1.0)) != text


def test_end_of_text_is_not_text(copy, whole):
    (end,) = byte_tokenizer()(whole[1]).input_ids
    set_config(copy, eos_token_id=end)
    (copy / "generation_config.json").unlink()
    stream = TextGenerator.open(copy, context=60, kernels="torch", threads=1).stream(PROMPT, OPTIONS)
    assert "".join(stream) == whole[0]
    assert stream.report is not None
    assert stream.report.end_of_text
    assert stream.report.new_tokens == 2


def test_what_cannot_be(generator, copy):
    for prompt, stop, says in (("", [], "prompt is empty"), ("a", [""], "stop text is empty")):
        with pytest.raises(ValueError, match=says):
            generator.stream(prompt, stop=stop)
    with pytest.raises(TypeError, match="a list of texts"):
        generator.stream("a", stop="end")
    with pytest.raises(TooLong):
        generator.generate(PROMPT * 4, OPTIONS)
    set_config(copy, alibi_scaling={"type": "linear", "train_seq_len": 64})
    with pytest.raises(NotSupported):
        TextGenerator.open(copy)


def test_the_bundled_model_by_default():
    generator = TextGenerator.open(context=8)
    assert generator.tokenizer.get_vocab_size() == 50257
    assert generator.engine.architecture.n_embd == 256
    assert BUNDLED_MODEL.is_dir()
