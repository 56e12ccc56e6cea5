"""Tokens to text: whole characters, stop texts, places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.engine import Token
from btlm.errors import NotSupported
from btlm.serve.text import Continuation, placed_prompt
from btlm.serve.vocabulary import Vocabulary

VOCABULARY = Vocabulary(Checkpoint.open(BUNDLED_MODEL).tokenizer, 50257)


def pieces(ids, stop=()):
    one = Continuation(VOCABULARY, stop)
    for token in ids:
        one.add(Token(token, -1.0))
        yield one.take()
        if one.stopped:
            break
    one.end()
    yield one.take(last=True)


@given(st.text(max_size=40))
def test_a_text_comes_back_whole(text):
    (ids,) = VOCABULARY.encode([text])
    found = list(pieces(ids))
    assert "".join(piece for piece, _ in found) == text
    placed = [token for _, tokens in found for token in tokens]
    assert [one.token.id for one in placed] == ids
    assert placed == [
        one._replace(scored=True, token=Token(one.token.id, -1.0))
        for one in placed_prompt(VOCABULARY, ids, [Token(token, -1.0) for token in ids[1:]])
    ]
    assert all("\ufffd" not in piece for piece, _ in found if "\ufffd" not in text)


@given(st.lists(st.integers(0, 50256), max_size=30), st.data())
def test_any_tokens_are_decoded_as_the_tokenizer_does(ids, data):
    whole = VOCABULARY.tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(piece for piece, _ in pieces(ids)) == whole
    if whole:
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = whole[start : start + data.draw(st.integers(1, 5))]
        found = list(pieces(ids, ["not there", stop]))
        text = "".join(piece for piece, _ in found)
        assert text == whole[: whole.index(stop)]
        placed = [token for _, tokens in found for token in tokens]
        assert [one.token.id for one in placed] == ids[: len(placed)]
        assert all(one.start <= len(text) for one in placed)


def test_names_tell_all_tokens_apart():
    names = {VOCABULARY.name(token) for token in range(VOCABULARY.size)}
    assert len(names) == VOCABULARY.size
    assert VOCABULARY.name(50256) == "<|endoftext|>"
    assert VOCABULARY.name(447) == "bytes:\\xe2\\x80"


def test_other_kinds_of_tokenizers_are_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(NotSupported, match="byte-level"):
        Vocabulary(Tokenizer(models.WordLevel({"a": 0}, "a")), 1)


def test_a_character_that_the_prompt_begins_is_ended_by_the_continuation():
    ids = VOCABULARY.encode(["x \U0001f642!"])[0]
    for cut in range(1, len(ids)):
        text, rest = VOCABULARY.split(ids[:cut])
        one = Continuation(VOCABULARY, (), len(text), rest)
        for token in ids[cut:]:
            one.add(Token(token, 0.0))
        one.end()
        assert text + one.take(last=True)[0] == "x \U0001f642!"
        placed = placed_prompt(VOCABULARY, ids[:cut], [Token(token, 0.0) for token in ids[1:cut]], ends=False)
        assert placed[-1].end == len(text)
