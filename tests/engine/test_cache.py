import numpy as np
import pytest

from btlm.engine.cache import KVCache, cache_bytes, cache_dtype_of, common_prefix
from btlm.engine.supported import slopes
from btlm.kernels import load_kernels
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
    assert sum(array.nbytes for array in arrays) == cache_bytes(architecture(), dtype, 3, capacity)
    assert cache.capacity == capacity
    assert len(cache.layers) == architecture().n_layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_copies_hold_what_was_written(dtype, tokens):
    """A text continued from a copied slot is the same as from the original, and other slots do not change."""
    kernels, sizes = load_kernels("torch", 1), architecture()
    cache = KVCache(kernels, sizes, dtype, 3, 200)
    rng = np.random.default_rng(0)
    before = rng.standard_normal((tokens, 240), dtype=np.float32)
    after = rng.standard_normal((2, 240), dtype=np.float32)
    results = []

    def attend(qkv, slot, start):
        out = np.empty((len(qkv), 80), np.float32)
        kernels.attend(qkv, cache.layers[1], np.array([[0, slot, start, len(qkv)]]), slopes(sizes), 0.2, out)
        return out

    attend(before, 0, 0)
    cache.copy(0, 2, tokens)
    results = [attend(after, slot, tokens) for slot in (0, 2, 1)]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


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
