import math
import random
import re
import string

import numpy as np
import pytest

from btlm.data import minhash
from btlm.data.bands import pair_probability
from btlm.data.minhash import (
    band_keys,
    document_hashes,
    normalize,
    normalized_length_reaches,
    permutations,
    shingle_hashes,
    signatures,
)
from btlm.data.recipe import Dedup

UNICODE = "  Ärger\u00a0— \u2028ÉCOLE,\t\tİstanbul\x1c «x»  ...!  (naïve) \u3000 ﬁn \U0001d4b3\U0001d4b4 \n\n ΑΣ. "


def plain_normal_form(text):
    """SlimPajama's formula: lower case, no punctuation, one space per run of white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text.strip())


def plain_shingles(text, kind="characters", size=13):
    normal = plain_normal_form(text)
    if kind == "characters":
        return [normal[i : i + size] for i in range(len(normal) - size + 1)]
    words = normal.split()
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def plain_document(text, kind, size):
    """The shingles of a document; a document shorter than a shingle is one shingle itself."""
    return plain_shingles(text, kind, size) or [normal for normal in [plain_normal_form(text)] if normal]


def plain_hash(shingle):
    """The formula in the module's docstring, with Python's integers."""
    value = sum(ord(c) * pow(0x9E3779B97F4A7C15, k, 2**64) for k, c in enumerate(shingle)) % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> 33)) * factor % 2**64
    return (value ^ (value >> 33)) >> 32


def plain_signature(text, options):
    a, b = permutations(options.permutations, options.seed)
    hashes = [plain_hash(shingle) for shingle in set(plain_document(text, options.shingle, options.shingle_size))]
    return [
        min(((int(a_i) * x + int(b_i)) % 2**32 for x in hashes), default=2**32 - 1)
        for a_i, b_i in zip(a, b, strict=True)
    ]


def random_text(rng, letters):
    return "".join(rng.choices(string.ascii_lowercase, k=letters))


TEXTS = [
    UNICODE,
    "",
    "   ",
    "!?",
    "a" * 500,
    "twelve chars",
    "thirteen char",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    "Words, words; words! " * 40,
    "\U0001f600 emoji and \u4e2d\u6587 text without spaces\u4e2d\u6587\u4e2d\u6587\u4e2d\u6587",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_normal_form_is_the_originals(text):
    assert "".join(map(chr, normalize(text))) == plain_normal_form(text)


def test_the_normal_form_of_random_characters():
    rng = random.Random(0)
    alphabet = [*string.printable, *"\u00a0\u2003\u3000\u0130ßΣ\u0301é—“"]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 60)))
        assert "".join(map(chr, normalize(text))) == plain_normal_form(text)


def test_the_length_filter_agrees_with_the_normal_form_at_every_length():
    rng = random.Random(1)
    for _ in range(400):
        text = "".join(rng.choices("ab ,.\n", k=rng.randint(0, 120)))
        assert normalized_length_reaches(text, 20) == (len(plain_normal_form(text)) >= 20)


def test_the_length_filter_agrees_where_the_start_of_a_text_decides():
    """The first 144 characters here, which are cut within a word, white space or punctuation."""
    rng = random.Random(2)
    reaches = []
    for _ in range(3000):
        letters = "".join(rng.choices("ab ", k=rng.randint(15, 20)))
        start = f"{letters}{' ' * (144 - len(letters))}"
        text = rng.choice([start[:143] + "b", start, start[:-1] + "."]) + rng.choice(
            ["", ",", " ,. ", " c", "c", " " * 200 + "d"]
        )
        reaches.append(normalized_length_reaches(text, 20))
        assert reaches[-1] == (len(plain_normal_form(text)) >= 20), text
    assert 300 < sum(reaches) < 2700


def test_the_length_filter_looks_past_a_start_of_punctuation():
    assert normalized_length_reaches("." * 5000 + "a" * 200, 200)
    assert not normalized_length_reaches("." * 5000 + "a" * 199, 200)


@pytest.mark.parametrize(("kind", "size"), [("characters", 13), ("characters", 1), ("words", 3), ("words", 13)])
@pytest.mark.parametrize("text", TEXTS)
def test_shingle_hashes_are_those_of_the_plain_formula(text, kind, size):
    hashes = [int(value) >> 32 for part in shingle_hashes(normalize(text), kind, size) for value in part]
    assert hashes == [plain_hash(shingle) for shingle in plain_shingles(text, kind, size)]


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_signatures_are_those_of_the_plain_formula(kind):
    options = Dedup(shingle=kind, shingle_size=5, permutations=16, bands=2, rows=8, seed=3)
    signature, num_shingles = signatures(TEXTS, options)
    assert signature.tolist() == [plain_signature(text, options) for text in TEXTS]
    assert num_shingles.tolist() == [len(plain_document(text, kind, 5)) for text in TEXTS]


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_signatures_do_not_depend_on_blocks(kind, monkeypatch):
    rng = random.Random(2)
    texts = [" ".join(random_text(rng, rng.randint(1, 9)) for _ in range(n)) for n in (3, 300, 40, 1, 200, 77)]
    options = Dedup(shingle=kind)
    whole, whole_numbers = signatures(texts, options)
    monkeypatch.setattr(minhash, "BLOCK", 64)
    blocks, block_numbers = signatures(texts, options)
    assert (blocks == whole).all()
    assert (block_numbers == whole_numbers).all()


def test_band_keys_agree_exactly_where_the_bands_do():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, (200, 12), dtype=np.uint32)
    second = rng.integers(0, 3, (200, 12), dtype=np.uint32)
    same = (first.reshape(200, 4, 3) == second.reshape(200, 4, 3)).all(axis=2)
    assert 0 < same.sum() < same.size
    assert ((band_keys(first, 4, 3) == band_keys(second, 4, 3)) == same).all()


def test_band_keys_depend_on_the_order_of_the_values():
    keys = band_keys(np.array([[1, 2, 2, 1]], dtype=np.uint32), 2, 2)
    assert keys[0, 0] != keys[0, 1]


def planted_pairs(rng, jaccard, number, letters=500):
    """Pairs of texts with a common beginning, and their exact Jaccard similarity of 13-character shingles."""
    shingles = letters - 12
    common = round(2 * shingles * jaccard / (1 + jaccard)) + 12
    pairs = []
    for _ in range(number):
        start = random_text(rng, common)
        pairs += [start + random_text(rng, letters - common) for _ in range(2)]
    sets = [set(plain_shingles(text)) for text in pairs[:2]]
    return pairs, len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("jaccard", [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
def test_planted_pairs_meet_with_the_probability_of_the_formula(jaccard):
    number = 1000
    pairs, exact = planted_pairs(random.Random(7), jaccard, number)
    # After the common beginning, letters may agree by chance, which makes up to two of 488 shingles equal.
    assert exact == pytest.approx(jaccard, abs=0.004)
    signature, _ = signatures(pairs, Dedup())
    keys = band_keys(signature, 9, 13).reshape(number, 2, 9)
    met = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
    expected = pair_probability(exact, 9, 13)
    # 99.9% of the samples of a coin with this probability lie within the bounds.
    assert abs(met - expected) <= 3.3 * math.sqrt(expected * (1 - expected) / number) + 0.5 / number


@pytest.mark.parametrize("jaccard", [0.1, 0.5, 0.9])
def test_signatures_agree_with_the_probability_of_the_similarity(jaccard):
    pairs, exact = planted_pairs(random.Random(8), jaccard, 200)
    signature, _ = signatures(pairs, Dedup())
    agree = (signature[::2] == signature[1::2]).mean(axis=1)
    assert agree.mean() == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / agree.size / 128))
    # The permutations are practically independent, so the agreement varies like that of 128 coins.
    assert agree.std() == pytest.approx(math.sqrt(exact * (1 - exact) / 128), rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_maps_are_permutations(seed):
    """A map with an even factor takes several numbers to one, and misses others, which weakens the signature."""
    a, b = permutations(128, seed)
    numbers = np.arange(2**12, dtype=np.uint32)
    for a_i, b_i in zip(a, b, strict=True):
        # Odd factors permute the numbers below every power of two.
        assert len(np.unique((a_i * numbers + b_i) % np.uint32(2**12))) == len(numbers)


def test_every_seed_has_maps_of_its_own():
    maps = [np.stack(permutations(128, seed)) for seed in range(3)]
    assert all((maps[i] != maps[j]).mean() > 0.99 for i in range(3) for j in range(i))
    (first, _), (other, _) = (signatures([TEXTS[-1]], Dedup(seed=seed)) for seed in (1, 2))
    assert (first != other).mean() > 0.9


@pytest.mark.parametrize("letters", [3, 15, 40, 64, 65, 200])
def test_of_long_word_ngrams_the_beginning_is_hashed(monkeypatch, letters):
    """With smaller bounds, so that n-grams reach past a block, and past the longest beginning that is hashed."""
    monkeypatch.setattr(minhash, "BLOCK", 64)
    monkeypatch.setattr(minhash, "MAX_SHINGLE", 50)
    minhash._powers.cache_clear()
    rng = random.Random(letters)
    words = [random_text(rng, rng.randint(max(1, letters - 3), letters + 3)) for _ in range(60)]
    texts = [" ".join(words), " ".join(words[:1]), "a " * 100 + " ".join(words)]
    try:
        for size in (1, 2, 5):
            found = [
                [int(h) >> 32 for part in shingle_hashes(normalize(t), "words", size) for h in part] for t in texts
            ]
            assert found == [[plain_hash(s[:50]) for s in plain_shingles(text, "words", size)] for text in texts]
        # A document of fewer words is one shingle.
        (whole,) = document_hashes(texts[0], Dedup(shingle="words", shingle_size=61))
        assert [int(value) >> 32 for value in whole] == [plain_hash(plain_normal_form(texts[0])[:50])]
    finally:
        minhash._powers.cache_clear()
