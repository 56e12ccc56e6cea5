import random

import pytest

from btlm.data.tokenize import decode, encode
from btlm.model.tokenization_btlm import load_tokenizer
from tests.data.corpus import text
from tests.data.test_minhash import TEXTS

TOUGH = [
    *TEXTS,
    "<|endoftext|> is text here",
    " \n\t  spaces   before and after  \r\n\r\n",
    "I'll we've don't CAN'T 'tis 2024-11-24 3.14159 ½ ²",
    "".join(chr(point) for point in range(0x20, 0x2FF)),
    "".join(chr(point) for point in range(0x1F5FF, 0x1F650)),
    "a\u0301 \u200b \ufeff \u2028 \u0085 \u180e",
    "x" * 3000,
    " " * 3000,
    "=" * 3000 + "\n" * 300,
]


@pytest.mark.parametrize("number", range(len(TOUGH)))
def test_the_ids_are_those_of_the_bundled_tokenizer(number):
    tokenizer = load_tokenizer().backend_tokenizer
    tokenizer.encode_special_tokens = True
    assert encode(TOUGH[number]).tolist() == tokenizer.encode(TOUGH[number]).ids


def test_the_ids_of_random_characters():
    tokenizer = load_tokenizer().backend_tokenizer
    tokenizer.encode_special_tokens = True
    rng = random.Random(0)
    alphabet = [*map(chr, range(0x20, 0x7F)), *"  \n\n\t'éßñ—“”…漢字かな한글العربيةไทย😀👍🏽\u00a0\u0301"]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(500)]
    assert [encode(text).tolist() for text in texts] == [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def test_decoding_gives_the_text_back():
    original = text(random.Random(1)) + " 漢字 😀 <|endoftext|>"
    assert decode(encode(original)) == original


@pytest.mark.parametrize("run", [" " * 10**6 + "x", "\n" * 10**6 + " y", "a" * 10**6, "=" * 10**6])
def test_a_run_of_a_million_characters(run):
    tokens = encode(run)
    assert decode(tokens) == run
    # The first part of the run by itself is short enough for tiktoken.
    assert tokens[:20].tolist() == encode(run[:3000])[:20].tolist()
