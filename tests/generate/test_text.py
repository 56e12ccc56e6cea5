import random

import pytest
from tokenizers import Tokenizer

from btlm.checkpoint import BUNDLED_MODEL
from btlm.generate.text import StopStrings, TextPieces

# Characters of one to four bytes, parts of emoji that belong together, and the replacement character itself.
RANGES = ((0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0x1F300, 0x1FA00), (0x200D, 0x200E), (0xFE0F, 0xFE10))
CHARACTERS = [*RANGES, (0xFFFD, 0xFFFE), (0x10FFFE, 0x110000)]
STREAMS = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))


def streams(tokenizer: Tokenizer, kind: str) -> list[list[int]]:
    rng = random.Random(0)
    every = range(tokenizer.get_vocab_size())
    single_bytes = sorted(id_ for token, id_ in tokenizer.get_vocab().items() if len(token) == 1)
    if kind == "characters":
        texts = ["".join(chr(rng.randrange(*rng.choice(CHARACTERS))) for _ in range(20)) for _ in range(STREAMS)]
        return [tokenizer.encode(text).ids for text in texts]
    chosen = single_bytes if kind == "bytes" else every
    return [[rng.choice(chosen) for _ in range(rng.randrange(1, 30))] for _ in range(STREAMS)]


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("kind", ["characters", "tokens", "bytes"])
def test_pieces_together_are_the_text(tokenizer: Tokenizer, kind: str, together: int) -> None:
    """The pieces together equal the whole text; random tokens and bytes are mostly invalid UTF-8."""
    for ids in streams(tokenizer, kind):
        pieces = TextPieces(tokenizer)
        written = [pieces.put(ids[i : i + together]) for i in range(0, len(ids), together)]
        assert "".join([*written, pieces.end()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_piece_waits_only_for_the_bytes_of_its_character(tokenizer: Tokenizer) -> None:
    text = "Grüße, 世界 👩\N{ZERO WIDTH JOINER}🚀 ende"
    ids = [id_ for character in text for id_ in tokenizer.encode(character).ids]
    pieces = TextPieces(tokenizer)
    assert list(filter(None, (pieces.put([id_]) for id_ in ids))) == list(text)


def test_special_tokens_are_not_written(tokenizer: Tokenizer) -> None:
    pieces = TextPieces(tokenizer)
    end = tokenizer.get_vocab()["<|endoftext|>"]
    ids = [end, *tokenizer.encode("a").ids, end, end, *tokenizer.encode("b").ids, end]
    assert pieces.put(ids) + pieces.end() == "ab"


# Texts that end the continuation


@pytest.mark.parametrize(
    ("stop", "written", "found"),
    [
        ([], "one two three", None),
        (["four"], "one two three", None),
        (["two"], "one ", "two"),
        (["three", "two t"], "one ", "two t"),
        (["e t", "ne"], "o", "ne"),
        (["two", "two t"], "one ", "two"),
        (["o"], "", "o"),
        (["three, four"], "one two three", None),
        ([" two thx", "ee"], "one two thr", "ee"),
    ],
)
def test_text_ends_before_the_first_stop_text(stop: list[str], written: str, found: str | None) -> None:
    text = "one two three"
    for size in (1, 2, 3, 5, 13):
        strings = StopStrings(stop)
        passed = [strings.pass_on(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join([*passed, strings.end()]) == written
        assert strings.found == found


def test_only_what_may_begin_a_stop_text_waits() -> None:
    strings = StopStrings(["aab"])
    assert [strings.pass_on(letter) for letter in "xaaaxabaab-"] == ["x", "", "", "a", "aax", "", "ab", "", "", "", ""]
    assert strings.found == "aab"


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
