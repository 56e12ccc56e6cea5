"""MinHash signatures of documents, and the bands that find near-duplicates (Broder 1997; Leskovec et al., ch. 3).

A document is the set of its shingles: 13-character windows, or word n-grams, of its normalized text. A shingle with the
code points ``c`` has the 32-bit hash

    ``mix(sum(c[k] * B**k) mod 2**64) >> 32``

with the odd ``B`` below and MurmurHash3's finalizer ``mix``. Permutation ``i`` of the 32-bit numbers is
``x -> (a[i] * x + b[i]) mod 2**32`` with ``a[i]`` odd, and the signature holds the smallest value under each. Each band
of the signature is reduced to one 64-bit key; two documents with the same key in a band are a candidate pair.
"""

import string
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .recipe import Dedup

# Number of shingles hashed at a time: so few that the buffers stay in a core's cache.
BLOCK = 65536
# Only this many characters of a word n-gram are hashed, which bounds the memory for text without spaces.
MAX_SHINGLE = 65536

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64

_SPACE, _PUNCTUATION = 1, 2
_LAST_SPACE = 0x3000  # the space with the greatest code point


def normalize(text: str) -> NDArray[np.uint32]:
    """Code points of SlimPajama's normal form of a text, uint32 ``[characters]``.

    The normal form is in lower case, without ASCII punctuation, with each run of white space as one space, and without
    white space at the ends.
    """
    points = np.frombuffer(text.lower().encode("utf-32-le"), dtype="<u4")
    kind = _character_kinds()[np.minimum(points, _LAST_SPACE + 1)]
    if (kept := kind != _PUNCTUATION).all():
        points = points.astype(np.uint32)
    else:
        points, kind = points[kept].astype(np.uint32), kind[kept]
    is_space = kind == _SPACE
    points[is_space] = ord(" ")
    first_of_run = is_space.copy()
    first_of_run[1:] &= ~is_space[:-1]
    first_of_run[:1] = False
    points = points[~is_space | first_of_run]
    normal: NDArray[np.uint32] = points[:-1] if len(points) and points[-1] == ord(" ") else points
    return normal


def normalized_length_reaches(text: str, characters: int) -> bool:
    """Whether a text's normal form has at least ``characters`` characters; the start of a long text may decide."""
    return any(len(normalize(part)) >= characters for part in (text[: 4 * characters + 64], text))


def signatures(texts: Sequence[str], options: Dedup) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """MinHash signatures, and the number of shingles of each text.

    Args:
        texts: Texts of the documents.
        options: Shingles, permutations and seed.

    Returns:
        uint32 ``[documents, permutations]`` and int64 ``[documents]``. A text of only punctuation and spaces has no
        shingles, and a signature of 2**32 - 1 everywhere.
    """
    a, b = permutations(options.permutations, options.seed)
    result = np.full((len(texts), options.permutations), 2**32 - 1, dtype=np.uint32)
    num_shingles = np.zeros(len(texts), dtype=np.int64)
    values = np.empty(BLOCK, dtype=np.uint32)
    for hashes, starts, documents in _blocks(texts, options, num_shingles):
        permuted = values[: len(hashes)]
        least = np.empty((options.permutations, len(starts)), dtype=np.uint32)
        for i in range(options.permutations):
            np.multiply(hashes, a[i], out=permuted)
            np.add(permuted, b[i], out=permuted)
            np.minimum.reduceat(permuted, starts, out=least[i])
        result[documents] = np.minimum(result[documents], least.T)
    return result, num_shingles


def permutations(number: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The odd factors ``a`` and the summands ``b``, uint32 ``[number]`` each."""
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**32, (2, number), dtype=np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]


def band_keys(signature: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.uint64]:
    """One 64-bit key per band of ``rows`` values of the signature.

    Maps uint32 ``[documents, permutations]`` to uint64 ``[documents, bands]``. Bands with different values have the
    same key with probability 2**-64.
    """
    values = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    keys = np.zeros((len(signature), bands), dtype=np.uint64)
    for row in range(rows):
        keys = mix_bits(keys * np.uint64(_MULTIPLIER) + values[:, :, row] + np.uint64(1))
    return keys


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's 64-bit finalizer (Appleby), a bijection."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(33))
    return mixed


def document_hashes(text: str, options: Dedup) -> Iterator[NDArray[np.uint64]]:
    """64-bit hashes of the shingles of a document; a document shorter than a shingle counts as one shingle."""
    points = normalize(text)
    number = 0
    for hashes in shingle_hashes(points, options.shingle, options.shingle_size):
        number += len(hashes)
        yield hashes
    if len(points) and not number:
        yield _hash_spans(points[:MAX_SHINGLE], np.array([0]), np.array([min(len(points), MAX_SHINGLE)]))


def shingle_hashes(points: NDArray[np.uint32], kind: str, size: int) -> Iterator[NDArray[np.uint64]]:
    """64-bit hashes of the shingles of a normalized text, in order, at most :data:`BLOCK` at a time.

    MinHash takes their upper halves.

    Args:
        points: Code points ``[characters]``.
        kind: Kind of shingle, ``characters`` or ``words``.
        size: Number of characters or words per shingle.
    """
    if kind == "characters":
        for start in range(0, len(points) - size + 1, BLOCK):
            starts = np.arange(min(BLOCK, len(points) - size + 1 - start))
            yield _hash_spans(points[start : start + BLOCK + size - 1], starts, starts + size)
        return
    spaces = np.flatnonzero(points == ord(" "))
    number = max(0, len(spaces) + 1 - size + 1) if len(points) else 0
    starts = np.concatenate([[0], spaces + 1])[:number]
    ends = np.minimum(np.append(spaces, len(points))[size - 1 :][:number], starts + MAX_SHINGLE)
    first = 0
    while first < len(starts):
        last = int(np.searchsorted(starts, starts[first] + BLOCK))
        begin = int(starts[first])
        span = points[begin : int(ends[last - 1])]
        yield _hash_spans(span, starts[first:last] - begin, ends[first:last] - begin)
        first = last


# Helpers


def _blocks(
    texts: Sequence[str], options: Dedup, num_shingles: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.uint32], list[int], list[int]]]:
    """Blocks of hashes of many documents: the hashes, where each document starts in the block, and its number."""
    parts: list[NDArray[np.uint32]] = []
    starts: list[int] = []
    documents: list[int] = []
    filled = 0
    for document, text in enumerate(texts):
        for hashes in document_hashes(text, options):
            if filled + len(hashes) > BLOCK:
                yield np.concatenate(parts), starts, documents
                parts, starts, documents, filled = [], [], [], 0
            if not documents or documents[-1] != document:
                starts.append(filled)
                documents.append(document)
            parts.append((hashes >> np.uint64(32)).astype(np.uint32))
            filled += len(hashes)
            num_shingles[document] += len(hashes)
    if parts:
        yield np.concatenate(parts), starts, documents


def _hash_spans(points: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hashes of spans of ``points``, each from two look-ups in the prefix sums of ``points[k] * B**k``."""
    powers, inverse_powers = _powers()
    sums = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum(points * powers[: len(points)], out=sums[1:])
    return mix_bits((sums[ends] - sums[starts]) * inverse_powers[starts])


@cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    size = BLOCK + MAX_SHINGLE
    return tuple(  # type: ignore[return-value]  # two of them
        np.cumprod(np.array([1] + [base] * (size - 1), dtype=np.uint64), dtype=np.uint64)
        for base in (_MULTIPLIER, pow(_MULTIPLIER, -1, 2**64))
    )


@cache
def _character_kinds() -> NDArray[np.uint8]:
    kinds = np.zeros(_LAST_SPACE + 2, dtype=np.uint8)
    kinds[[point for point in range(len(kinds)) if chr(point).isspace()]] = _SPACE
    kinds[[ord(character) for character in string.punctuation]] = _PUNCTUATION
    return kinds
