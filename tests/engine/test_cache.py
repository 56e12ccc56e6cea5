import numpy as np
import pytest

from btlm.engine.cache import KVCache, cache_bytes, cache_dtype_of, common_prefix
from btlm.engine.supported import slopes
from btlm.kernels import load_kernels, num_pages
from btlm.kernels.arrays import DTYPES
from btlm.model.architecture_btlm import Architecture
from tests.checkpoint.tiny import TINY


def architecture(n_head=4):
    return Architecture.from_config({**TINY, "n_embd": 80, "n_head": n_head})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [1, 64, 65, 200])
def test_bytes_are_those_of_the_arrays(dtype, capacity):
    cache = KVCache(load_kernels("torch", 1), architecture(), dtype, 3, capacity)
    arrays = [array for layer in cache.layers for array in vars(layer).values() if isinstance(array, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 3 * cache_bytes(architecture(), dtype, capacity)
    assert cache.capacity == capacity
    assert len(cache.layers) == architecture().n_layer


@pytest.fixture
def cache():
    """Three slots of up to 200 tokens, which share nine pages."""
    return KVCache(load_kernels("torch", 1), architecture(), "float32", 3, 200, 9 * 64)


def write(cache, slot, start, tokens):
    """Attend with random tokens; returns the result."""
    qkv = np.random.default_rng(start).standard_normal((tokens, 240), dtype=np.float32)
    out = np.empty((tokens, 80), np.float32)
    segments = np.array([[0, slot, start, tokens]])
    load_kernels("torch", 1).attend(qkv, cache.layers[1], segments, slopes(architecture()), 0.2, out)
    return out


@pytest.mark.parametrize("how", ["begin", "follow", "move"])
@pytest.mark.parametrize("kept", [1, 63, 64, 65, 150])
def test_a_text_that_begins_alike_continues_alike(cache, how, kept):
    cache.begin(0, 160)
    write(cache, 0, 0, kept)
    free = cache.free_pages
    if how == "follow":
        cache.begin(2, 160)
        cache.follow(2, cache.pages(0), kept)
    else:
        cache.begin(2, 160, cache.pages(0)[: num_pages(kept)], kept, move=how == "move")
    assert free - cache.free_pages == num_pages(160) - (num_pages(kept) if how == "move" else kept // 64)
    shared = kept // 64 if how != "move" else num_pages(kept)
    assert cache.pages(2)[:shared] == cache.pages(0)[:shared]
    assert not set(cache.pages(2)[shared:]) & set(cache.pages(0))
    continued = write(cache, 2, kept, 9)
    if how == "move":
        return
    assert np.array_equal(write(cache, 0, kept, 9), continued)  # and nobody has written what the other reads
    assert np.array_equal(write(cache, 2, kept + 9, 1), write(cache, 0, kept + 9, 1))


def test_pages_are_free_when_nobody_holds_them(cache):
    cache.begin(0, 130)
    cache.begin(1, 140, cache.pages(0), 128)
    pages = cache.end(0, 70)
    assert cache.free_pages == 9 - 2 - 1  # two shared ones, and one more of slot 1
    assert [cache.holders(page) for page in pages] == [2, 2]
    cache.drop(pages)
    assert [cache.holders(page) for page in pages] == [1, 1]
    assert cache.end(1, 0) == []
    assert cache.free_pages == 9


def test_a_text_gets_pages_side_by_side_where_there_are_any(cache):
    for slot in range(3):
        cache.begin(slot, 64 * (slot + 1))
    cache.end(0, 0)
    assert cache.pages(2) == [3, 4, 5]
    cache.begin(0, 192)
    assert cache.pages(0) == [6, 7, 8]  # not the first free one
    cache.end(1, 0)
    cache.end(2, 0)
    cache.begin(1, 64)
    cache.begin(2, 200)
    assert (cache.pages(1), cache.pages(2)) == ([0], [1, 2, 3, 4])
    cache.end(0, 0)
    cache.end(1, 0)
    cache.begin(0, 64)
    cache.begin(1, 64)
    cache.end(0, 0)
    cache.begin(0, 200)
    assert cache.pages(0) == [0, 6, 7, 8]  # there are no four of them


@pytest.mark.parametrize(
    ("name", "weights", "dtype"),
    [
        *(("auto", "4bit", "int8"), ("auto", "8bit", "int8"), ("auto", "bfloat16", "bfloat16")),
        *(("auto", "float32", "float32"), ("auto", "float16", "float32"), ("int4", "8bit", "int4")),
    ],
)
def test_the_dtype_that_a_name_means(name, weights, dtype):
    assert cache_dtype_of(name, weights) == dtype


@pytest.mark.parametrize(("name", "weights"), [("q8", "8bit"), ("auto", "q8"), ("auto", "BF16"), ("int8", "2bit")])
def test_an_unknown_dtype_is_an_error(name, weights):
    with pytest.raises(ValueError, match=r"dtype '(q8|BF16|2bit)' is unknown"):
        cache_dtype_of(name, weights)


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 5, 3], 1), ([2], [1], 0)],
)
def test_common_prefix(a, b, length):
    assert common_prefix(a, b) == common_prefix(b, a) == length
