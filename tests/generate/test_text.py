import random

import pytest
from tokenizers import Tokenizer

from btlm.checkpoint import BUNDLED_MODEL
from btlm.generate.text import TextPieces

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
        written: list[str] = []
        pieces = TextPieces(tokenizer, written.append)
        for i in range(0, len(ids), together):
            pieces.put(ids[i : i + together])
        pieces.end()
        assert "".join(written) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_piece_waits_only_for_the_bytes_of_its_character(tokenizer: Tokenizer) -> None:
    text = "Grüße, 世界 👩\N{ZERO WIDTH JOINER}🚀 ende"
    ids = [id_ for character in text for id_ in tokenizer.encode(character).ids]
    written: list[str] = []
    pieces = TextPieces(tokenizer, written.append)
    for id_ in ids:
        pieces.put([id_])
    assert written == list(text)


def test_special_tokens_are_not_written(tokenizer: Tokenizer) -> None:
    written: list[str] = []
    pieces = TextPieces(tokenizer, written.append)
    end = tokenizer.get_vocab()["<|endoftext|>"]
    pieces.put([end, *tokenizer.encode("a").ids, end, end, *tokenizer.encode("b").ids, end])
    pieces.end()
    assert "".join(written) == "ab"
