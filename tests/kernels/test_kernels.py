import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from btlm.kernels import PageTable, instruction_sets, load_kernels, num_pages, page_bytes
from btlm.kernels.arrays import block_rows
from tests.kernels.tiny import Weights, attention, furthest, rounded, same_contents, silu, to_bf16

reference = load_kernels("torch", 1)
PATHS = instruction_sets()
native = pytest.mark.skipif(not PATHS, reason="btlm was installed without a compiler")
each_path = pytest.mark.parametrize("path", PATHS or [pytest.param("native", marks=native)])
each = pytest.mark.parametrize("name", ["torch", *PATHS])

FORMATS = [
    ("int4", 64),
    ("int4", 128),
    ("int8", 64),
    ("int8", 128),
    ("bfloat16", 0),
    ("bfloat16", 1),
    ("float32", 0),
    ("float32", 1),
]
"""With the group of the packed ones, and 1 for the input-major ones of the plain ones."""


def weights(rng, dtype, group, rows, columns, bias=True):
    if dtype in ("int4", "int8"):
        return Weights(rng, dtype, rows, columns, group=group, bias=bias)
    return Weights(rng, dtype, rows, columns, input_major=bool(group), bias=bias)


@pytest.fixture(autouse=True)
def _one_thread_of_torch():
    torch.set_num_threads(1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def linear(kernels, x, source, gate=None, out=None, add=False):
    out = np.full((len(x), source.rows), np.nan, np.float32) if out is None else out.copy()
    kernels.linear(x, source.matrix(kernels), out, gate=gate and gate.matrix(kernels), add=add)
    return out


# Linear


@each
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_linear_is_the_formula(name, dtype, group, rng):
    """Compare with numpy in fp64, value by value, since torch and C++ could share an error."""
    kernels = load_kernels(name, 1)
    source, gate = (weights(rng, dtype, group, 32, 128) for _ in range(2))
    x = rng.standard_normal((3, 128), dtype=np.float32)
    inputs = rounded(x, group) if dtype in ("int4", "int8") else x.astype(np.float64)
    product, opened = (inputs @ one.dense().T + one.bias for one in (source, gate))
    before = rng.standard_normal((3, 32), dtype=np.float32)
    assert furthest(linear(kernels, x, source), product) < 2e-6
    assert furthest(linear(kernels, x, source, out=before, add=True), before + product) < 2e-6
    assert furthest(linear(kernels, x, source, gate), product * silu(opened)) < 2e-6
    assert furthest(linear(kernels, x, source, gate, before, add=True), before + product * silu(opened)) < 2e-6


@each_path
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_linear_is_that_of_torch(path, dtype, group, rng):
    sizes = [(16, 128), (48, 256), (400, 128)]
    if dtype in ("bfloat16", "float32"):
        sizes += [
            (37, 50),
            (1, 1),
            (17, 16),
            (600, 33),
            (15, 8),
            (70, 600),
            (1090, 257),
        ]  # up to three chunks of inputs
    for rows, columns in sizes:
        source, gate = (weights(rng, dtype, group, rows, columns, bias=rows != 48) for _ in range(2))
        for tokens in (1, 2, 3, 5, 7, 8, 9, 12, 65, 70):
            x = rng.standard_normal((tokens, columns), dtype=np.float32) * 3
            before = rng.standard_normal((tokens, rows), dtype=np.float32)
            theirs = [linear(reference, x, source), linear(reference, x, source, gate, before, add=True)]
            for threads in (1, 2, 3):
                kernels = load_kernels(path, threads)
                ours = [linear(kernels, x, source), linear(kernels, x, source, gate, before, add=True)]
                for a, b in zip(ours, theirs, strict=True):
                    assert furthest(a, b) < 3e-6, (rows, columns, tokens, threads)


@each
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_linear_of_extreme_inputs(name, dtype, group, rng):
    kernels = load_kernels(name, 1)
    source = weights(rng, dtype, group, 32, 256)
    x = rng.standard_normal((6, 256), dtype=np.float32)
    x[0] = 0
    x[1] *= np.float32(1e30)
    x[2] *= np.float32(1e-38)
    x[3, 70] = 1e6
    x[4, :128] = 0
    x[5] = np.where(np.arange(256) % 2, 127, -127)
    ours = linear(kernels, x, source)
    assert np.isfinite(ours).all()
    assert np.array_equal(ours[0], source.bias)
    packed = dtype in ("int4", "int8")
    for token in (1, 3, 4, 5):
        inputs = x[token : token + 1]
        if packed:
            with np.errstate(divide="ignore", invalid="ignore"):
                inputs = np.nan_to_num(rounded(inputs, group))
        assert furthest(ours[token : token + 1], inputs @ source.dense().T + source.bias) < 3e-6, token
    assert furthest(ours[2], source.bias) < 1e-6


@each
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_gate_far_below_0_is_closed(name, dtype, rng):
    """SiLU of a number far below 0 is exactly 0, so that large products do not pass the gate."""
    source, gate = (Weights(rng, dtype, 16, 64, group=64 if dtype == "int8" else 0) for _ in range(2))
    gate.bias = np.repeat(np.array([-120, -200, -1e4, -1e30], np.float32), 4)
    x = np.zeros((1, 64), np.float32)
    source.bias = np.full(16, 1e38, np.float32)
    assert np.array_equal(linear(load_kernels(name, 1), x, source, gate), np.zeros((1, 16)))


@each
def test_silu(name):
    values = np.concatenate([np.linspace(-86, 100, 4000), [0, 1e-30, -1e-30, 1e30]]).astype(np.float32)
    source, gate = (
        Weights(np.random.default_rng(0), "float32", len(values), 1),
        Weights(np.random.default_rng(0), "float32", len(values), 1),
    )
    source.bias, gate.bias = np.ones(len(values), np.float32), values
    opened = linear(load_kernels(name, 1), np.zeros((1, 1), np.float32), source, gate)[0]
    exact = silu(values.astype(np.float64))
    assert (np.abs(opened - exact) <= 1e-6 * np.abs(exact) + 1e-37).all()


@each_path
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_a_token_has_the_same_bits_in_every_company(path, dtype, group, rng):
    """The bits are the same alone, in a batch, in other panels, and on other numbers of threads."""
    rows, columns = (208, 256) if dtype in ("int4", "int8") else (205, 250)
    source, gate = (weights(rng, dtype, group, rows, columns) for _ in range(2))
    x = rng.standard_normal((70, columns), dtype=np.float32)
    before = rng.standard_normal((70, rows), dtype=np.float32)
    for opening, add in ((None, False), (gate, False), (gate, True), (None, True)):
        kernels = load_kernels(path, 1)
        alone = np.concatenate(
            [linear(kernels, x[i : i + 1], source, opening, before[i : i + 1], add) for i in range(70)]
        )
        for threads in (1, 2, 3, 5):
            kernels = load_kernels(path, threads)
            for first, last in ((0, 70), (1, 70), (3, 9), (5, 17), (0, 7), (69, 70)):
                some = linear(kernels, x[first:last], source, opening, before[first:last], add)
                assert np.array_equal(some, alone[first:last]), (threads, first, last, add)


@each_path
def test_values_of_activations_at_the_ends_of_eight_bits(path):
    """Activations of 127 or -127 times weights of 15, 0 or 255, with which sums in 16 bits would saturate."""
    for dtype, weight in (("int4", 0x00), ("int4", 0xFF), ("int8", 0), ("int8", 255)):
        source = Weights(np.random.default_rng(0), dtype, 16, 128, group=128, bias=False)
        source.weight[:] = weight
        source.scale = to_bf16(np.ones((1, 1, 16)))
        value = {"int4": {0: -8, 255: 7}, "int8": {0: -128, 255: 127}}[dtype][weight]
        for sign in (1, -1):
            x = np.full((1, 128), 127 * sign, np.float32)
            assert np.array_equal(linear(load_kernels(path, 1), x, source), np.full((1, 16), value * 127 * sign * 128))


# Normalization, tables, bytes


@each
def test_layer_norm(name, rng):
    kernels = load_kernels(name, 2)
    for tokens, columns in ((1, 1), (1, 15), (3, 16), (9, 17), (33, 256), (2, 1000)):
        x = rng.standard_normal((tokens, columns), dtype=np.float32) * 5 + 3
        weight, bias = rng.standard_normal((2, columns), dtype=np.float32)
        out = np.empty_like(x)
        kernels.layer_norm(x, weight, bias, 1e-5, out)
        exact = x.astype(np.float64)
        exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
        assert furthest(out, exact * weight + bias) < 2e-5
        alone = np.empty((1, columns), np.float32)
        kernels.layer_norm(x[-1:], weight, bias, 1e-5, alone)
        if name != "torch":
            assert np.array_equal(alone, out[-1:])
        kernels.layer_norm(x, weight, bias, 1e-5, x)  # in place, as the engine does at the end
        assert np.array_equal(x, out)


@each
@pytest.mark.parametrize(("dtype", "group"), [pair for pair in FORMATS if pair[1] != 1])
def test_embed(name, dtype, group, rng):
    source = weights(rng, dtype, group, 48, 128, bias=False)
    ids = np.array([0, 47, 15, 16, 17, 47, *range(48)])
    out = np.full((len(ids), 128), np.nan, np.float32)
    load_kernels(name, 2).embed(ids, source.matrix(load_kernels(name, 2)), 2.5, out)
    assert furthest(out, source.dense()[ids] * 2.5) < 1e-6


@each
def test_embed_of_a_width_that_is_no_multiple_of_16(name, rng):
    source = Weights(rng, "bfloat16", 5, 21, bias=False)
    out = np.full((2, 21), np.nan, np.float32)
    kernels = load_kernels(name, 1)
    kernels.embed(np.array([4, 1]), source.matrix(kernels), 1.0, out)
    assert np.array_equal(out, source.dense()[[4, 1]].astype(np.float32))


@each
def test_sum_bytes(name, rng):
    kernels = load_kernels(name, 2)
    for size in (256, 1 << 20, (1 << 20) + 512, 5 << 20):
        values = rng.integers(0, 256, size, np.uint8)
        assert kernels.sum_bytes(values) == values.sum(dtype=np.int64)
    assert kernels.sum_bytes(np.full(9 << 20, 255, np.uint8)) == 255 * (9 << 20)


# Attention

SIZES = [(2, 64), (4, 80), (3, 20), (1, 128), (2, 256), (1, 16), (2, 1), (1, 144)]
SEGMENTS = [
    [[0, 0, 0, 63]],
    [[0, 0, 63, 1]],  # the last place of a block
    [[0, 0, 64, 1], [1, 1, 0, 130]],  # the first place of the next block, and another text
    [[0, 1, 130, 1], [1, 0, 65, 100]],
    [[0, 2, 0, 64], [64, 1, 131, 3]],
    [[0, 2, 64, 33], [33, 1, 134, 32], [65, 0, 165, 1]],
    [[0, 0, 166, 26], [26, 2, 97, 95]],  # up to the end of the slots
    [[0, 0, 10, 3]],  # overwrites rejected tokens
]


def slopes_of(heads):
    return np.array([2.0 ** -(i + 1) for i in range(heads)], np.float32)


def attend(kernels, cache, qkv, segments, heads, head_dim, scale=0.1):
    out = np.full((len(qkv), heads * head_dim), np.nan, np.float32)
    kernels.attend(qkv, cache, np.array(segments), slopes_of(heads), scale, out)
    return out


TOLERANCE = {"int4": 1e-4, "int8": 1e-4, "bfloat16": 1e-5, "float32": 1e-5}  # int4, int8: 16-bit probabilities


@each_path
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize(("heads", "head_dim"), SIZES)
def test_attention_is_that_of_torch(path, dtype, heads, head_dim, rng):
    table = PageTable(3, 192, 20)  # pages of several slots lie between one another, in two runs
    for slot, pages in enumerate(([4, 0, 19], [15, 16, 3], [2, 18, 5])):
        table.assign(slot, pages)
    sizes = {"heads": heads, "head_dim": head_dim}
    theirs = reference.cache(dtype, table, **sizes)
    three = [load_kernels(path, threads) for threads in (1, 2, 3)]
    ours = [kernels.cache(dtype, table, **sizes) for kernels in three]
    for segments in SEGMENTS:
        tokens = sum(segment[3] for segment in segments)
        qkv = rng.standard_normal((tokens, 3 * heads * head_dim), dtype=np.float32) * 2
        expected = attend(reference, theirs, qkv, segments, heads, head_dim)
        outs = [
            attend(kernels, cache, qkv, segments, heads, head_dim) for kernels, cache in zip(three, ours, strict=True)
        ]
        assert furthest(outs[0], expected) < TOLERANCE[dtype], segments
        assert all(np.array_equal(out, outs[0]) for out in outs)
        assert all(same_contents(cache, ours[0]) for cache in ours)
        assert same_contents(ours[0], theirs), segments


@pytest.mark.parametrize("number", [1, 16, 20, 33])
def test_every_block_has_its_place_and_a_head_lies_side_by_side_in_a_run(number):
    rows = block_rows(np.arange(number), number, 3)
    assert rows.shape == (3, number)
    assert sorted(rows.reshape(-1)) == list(range(3 * number))
    ends = np.arange(1, number) % 16 == 0
    assert ((np.diff(rows) == 1) | ends).all()
    assert np.array_equal(block_rows(np.array([[number - 1], [0]]), number, 3), rows[:, [number - 1, 0]].T[..., None])


@each
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2), ("int8", 4e-2), ("int4", 0.15)]
)
def test_attention_is_the_formula(name, dtype, tolerance, rng):
    kernels = load_kernels(name, 1)
    heads, head_dim, tokens = 3, 20, 150
    qkv = rng.standard_normal((tokens, 3 * heads * head_dim), dtype=np.float32)
    cache = kernels.cache(dtype, PageTable(1, 192), heads=heads, head_dim=head_dim)
    out = attend(kernels, cache, qkv, [[0, 0, 0, tokens]], heads, head_dim, 0.2)
    assert furthest(out, attention(qkv, heads, slopes_of(heads), 0.2)) < tolerance


@each_path
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_attention_has_the_same_bits_in_chunks_and_in_company(path, dtype, rng):
    heads, head_dim, tokens = 2, 20, 190
    qkv = rng.standard_normal((tokens, 3 * heads * head_dim), dtype=np.float32)
    kernels = load_kernels(path, 1)

    def empty(slots=1):
        return kernels.cache(dtype, PageTable(slots, 192), heads=heads, head_dim=head_dim)

    whole = attend(kernels, empty(), qkv, [[0, 0, 0, tokens]], heads, head_dim)
    for threads, chunk in ((1, 1), (2, 7), (3, 32), (2, 33), (1, 64), (3, 100)):
        kernels = load_kernels(path, threads)
        cache, parts = empty(3), []
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            other = rng.standard_normal((5, qkv.shape[1]), dtype=np.float32)
            both = np.concatenate([other, qkv[start : start + count]])
            segments = [[0, 2, start % 180, 5], [5, 1, start, count]]
            parts.append(attend(kernels, cache, both, segments, heads, head_dim)[5:])
        assert np.array_equal(np.concatenate(parts), whole), (threads, chunk)


@each
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
def test_attention_of_extreme_values(name, dtype, rng):
    kernels = load_kernels(name, 1)
    heads, head_dim, tokens = 2, 20, 80
    width = heads * head_dim
    qkv = rng.standard_normal((tokens, 3, width), dtype=np.float32)
    qkv[0] = 0
    qkv[3, 1] *= np.float32(1e6)  # one key that gets all of the attention
    qkv[5, 2, 3] = 1e30  # values do not enter the softmax
    qkv[6, 1] *= np.float32(1e-38)
    qkv[7, 2] *= np.float32(1e-38)
    cache = kernels.cache(dtype, PageTable(1, 128), heads=heads, head_dim=head_dim)
    qkv = qkv.reshape(tokens, -1)
    out = attend(kernels, cache, qkv, [[0, 0, 0, tokens]], heads, head_dim)
    assert np.isfinite(out).all()
    assert np.array_equal(out[0], np.zeros(width))
    exact = attention(qkv, heads, slopes_of(heads), 0.1)
    for row in (1, 2, 3, 4):
        assert furthest(out[row], exact[row]) < (0.15 if dtype == "int4" else 0.05), row


@each
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("spoiled", [np.inf, np.nan, 3e38])
def test_what_a_text_that_is_gone_left_behind_does_not_matter(name, dtype, spoiled, rng):
    kernels = load_kernels(name, 1)
    heads, head_dim = 2, 20
    qkv = rng.standard_normal((70, 3 * heads * head_dim), dtype=np.float32)
    caches = [kernels.cache(dtype, PageTable(1, 128), heads=heads, head_dim=head_dim) for _ in range(2)]
    gone = qkv.copy()
    gone[2:, heads * head_dim :] = spoiled
    attend(kernels, caches[0], gone, [[0, 0, 0, 70]], heads, head_dim)
    outs = [attend(kernels, cache, qkv[:2], [[0, 0, 0, 2]], heads, head_dim) for cache in caches]
    assert np.array_equal(*outs)


@each
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, 19])
def test_what_is_not_finite_is_not_lost_in_attention(name, dtype, bad, place, rng):
    """Queries, keys and values are rounded to integers, which cannot hold NaN."""
    kernels = load_kernels(name, 1)
    heads, head_dim = 2, 20
    qkv = rng.standard_normal((6, 3, heads, head_dim), dtype=np.float32)
    cache = kernels.cache(dtype, PageTable(1, 64), heads=heads, head_dim=head_dim)
    for part in range(3):
        spoiled = qkv.copy()
        spoiled[4, part, 1, place] = bad
        out = attend(kernels, cache, spoiled.reshape(6, -1), [[0, 0, 0, 6]], heads, head_dim).reshape(6, heads, -1)
        assert np.isnan(out[4, 1]).all()
        assert np.isfinite(out[:, 0]).all()
        assert name == "torch" or np.isfinite(out[:4]).all()  # torch multiplies hidden values by 0


@each
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_lost_in_products(name, dtype, group, bad, rng):
    kernels = load_kernels(name, 1)
    source, gate = (weights(rng, dtype, group, 32, 256) for _ in range(2))
    x = rng.standard_normal((3, 256), dtype=np.float32)
    expected = linear(kernels, x, source, gate)
    for place in (0, 17, 255):
        spoiled = x.copy()
        spoiled[1, place] = bad
        for opening in (None, gate):
            out = linear(kernels, spoiled, source, opening)
            assert not np.isfinite(out[1]).any()
        assert np.array_equal(out[[0, 2]], expected[[0, 2]])
    gate.bias[5] = bad
    assert not np.isfinite(linear(kernels, x, source, gate)[:, 5]).any()


@each
def test_far_keys_do_not_matter_and_scores_keep_their_digits(name, rng):
    """The bias reaches -1,500; the probability of a key at that distance is exactly 0."""
    kernels = load_kernels(name, 1)
    heads, head_dim, tokens = 1, 16, 3008
    cache = kernels.cache("float32", PageTable(1, 3008), heads=heads, head_dim=head_dim)
    qkv = rng.standard_normal((tokens, 3 * head_dim), dtype=np.float32)
    attend(kernels, cache, qkv[:-1], [[0, 0, 0, tokens - 1]], heads, head_dim)
    out = attend(kernels, cache, qkv[-1:], [[0, 0, tokens - 1, 1]], heads, head_dim)
    near = attention(qkv[-400:], heads, slopes_of(heads), 0.1)[-1]
    assert furthest(out[0], near) < 3e-6


# Arguments that do not match


@each
@pytest.mark.parametrize(
    "wrong",
    [
        *("x", "out", "token", "negative token", "slot", "negative slot", "capacity", "negative start", "rows"),
        *("negative row", "no tokens", "overflow", "qkv", "attended", "slopes", "norm", "table"),
    ],
)
def test_wrong_shapes_are_one_line(name, wrong, rng):
    kernels = load_kernels(name, 1)
    source = Weights(rng, "float32", 24, 32)
    matrix = source.matrix(kernels)
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 24), np.float32)
    cache = kernels.cache("float32", PageTable(2, 64), heads=2, head_dim=16)
    qkv, attended, slopes = np.zeros((2, 96), np.float32), np.zeros((2, 32), np.float32), slopes_of(2)
    ids = np.array([0, 1])
    vector = np.zeros(32, np.float32)

    def attend_with(segment=(0, 0, 0, 2), qkv=qkv, slopes=slopes, attended=attended):
        kernels.attend(qkv, cache, np.array([segment]), slopes, 1.0, attended)

    calls = {
        "x": lambda: kernels.linear(x[:, :16].copy(), matrix, out),
        "out": lambda: kernels.linear(x, matrix, out[:1]),
        "token": lambda: kernels.embed(np.array([0, 24]), matrix, 1.0, x),
        "negative token": lambda: kernels.embed(np.array([-1, 0]), matrix, 1.0, x),
        "slot": lambda: attend_with((0, 2, 0, 2)),
        "negative slot": lambda: attend_with((0, -1, 0, 2)),
        "negative start": lambda: attend_with((0, 0, -1, 2)),
        "negative row": lambda: attend_with((-1, 0, 0, 2)),
        "no tokens": lambda: attend_with((0, 0, 0, 0)),
        "overflow": lambda: attend_with((1, 0, 1, 2**63 - 1)),
        "capacity": lambda: attend_with((0, 0, 63, 2)),
        "rows": lambda: attend_with((1, 0, 0, 2)),
        "qkv": lambda: attend_with(qkv=np.zeros((2, 90), np.float32)),
        "attended": lambda: attend_with(attended=np.zeros((2, 16), np.float32)),
        "slopes": lambda: attend_with(slopes=slopes_of(3)),
        "norm": lambda: kernels.layer_norm(x, vector[:16], vector, 1e-5, x),
        "table": lambda: kernels.embed(ids, matrix, 1.0, out),
    }
    with pytest.raises(ValueError, match=r"\w") as error:
        calls[wrong]()
    assert "\n" not in str(error.value)


@each
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "int5"}, "dtype 'int5' is unknown; choose one of int4, int8, bfloat16, float32"),
        ({"dtype": "q4"}, "dtype 'q4' is unknown"),
        ({"dtype": "float32"}, "two dimensions"),
        ({"weight": np.zeros(10, np.uint8)}, "weight"),
        ({"weight": np.zeros((2, 16, 32), np.uint8)}, "weight"),
        ({"weight": np.zeros((2, 16, 64), np.int8)}, "weight is int8"),
        ({"weight": np.zeros((16, 2, 64), np.uint8).transpose(1, 0, 2)}, "not contiguous"),
        ({"weight": np.zeros((0, 16, 64), np.uint8), "scale": np.zeros((0, 2, 16), np.uint16)}, "empty"),
        ({"scale": None}, "scales"),
        ({"scale": np.zeros(5, np.uint16)}, "scales"),
        ({"scale": np.zeros((2, 3, 16), np.uint16)}, "3 groups do not divide 128 columns"),
        ({"scale": np.zeros((2, 16, 16), np.uint16)}, "16 groups do not divide 128 columns"),
        ({"scale": np.zeros((1, 2, 16), np.uint16)}, "scale is"),
        ({"scale": np.zeros((2, 2, 16), np.float32)}, "scale is float32"),
        ({"bias": np.zeros(5, np.float32)}, "bias"),
        ({"bias": np.zeros(32)}, "bias is float64"),
        ({"input_major": True}, "input-major"),
    ],
)
def test_impossible_matrices(name, change, problem, rng):
    source = Weights(rng, "int4", 32, 128, group=64)
    given = {"dtype": "int4", "weight": source.weight, "scale": source.scale, "bias": source.bias}
    with pytest.raises(ValueError, match=problem) as error:
        load_kernels(name, 1).matrix(**{**given, **change})
    assert "\n" not in str(error.value)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_impossible_plain_matrices(name, dtype, rng):
    kernels, source = load_kernels(name, 1), Weights(rng, dtype, 24, 32)
    with pytest.raises(ValueError, match="no scales"):
        kernels.matrix(dtype, source.weight, np.zeros((1, 1, 16), np.uint16))
    with pytest.raises(ValueError, match="weight is float64"):
        kernels.matrix(dtype, source.dense())


@each
def test_a_gate_of_another_shape(name, rng):
    kernels = load_kernels(name, 1)
    source, gate = Weights(rng, "float32", 24, 32), Weights(rng, "float32", 25, 32)
    with pytest.raises(ValueError, match="gate"):
        linear(kernels, np.zeros((1, 32), np.float32), source, gate)
    source, gate = (Weights(rng, "int8", 16, 128, group=group) for group in (64, 128))
    with pytest.raises(ValueError, match="gate"):
        linear(kernels, np.zeros((1, 128), np.float32), source, gate)


@each
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_table_has_a_row_per_token(name, dtype, rng):
    """An input-major table is refused; earlier, only the native kernels did so, and torch read its transpose."""
    kernels = load_kernels(name, 1)
    table = Weights(rng, dtype, 32, 32, input_major=True).matrix(kernels)
    with pytest.raises(ValueError, match="input-major: it has one row per token id"):
        kernels.embed(np.array([0, 1]), table, 1.0, np.zeros((2, 32), np.float32))


@each
@pytest.mark.parametrize(
    "change", [{"head_dim": 257}, {"head_dim": 0}, {"dtype": "int5"}, {"dtype": "f32"}, {"heads": 0}, {"heads": -1}]
)
def test_impossible_caches(name, change):
    sizes = {"dtype": "int8", "heads": 2, "head_dim": 16} | change
    for make in (lambda **sizes: load_kernels(name, 1).cache(table=PageTable(1, 64), **sizes), page_bytes):
        with pytest.raises(ValueError, match=r"\w") as error:
            make(**sizes)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [(0, 64), (-1, 64), (2, 0), (2, 64, 0)])
def test_impossible_page_tables(sizes):
    with pytest.raises(ValueError, match=r"is empty; each must be at least 1"):
        PageTable(*sizes)


@pytest.mark.parametrize(("slot", "pages"), [(2, [0]), (-1, [0]), (0, [5]), (0, [-1]), (0, [0, 1, 2])])
def test_pages_that_are_not_there_cannot_be_assigned(slot, pages):
    table = PageTable(2, 128, 5)
    with pytest.raises(ValueError, match=f"slot {slot} cannot have the pages"):
        table.assign(slot, pages)


@each
def test_matrices_and_caches_of_other_kernels(name, rng):
    if not PATHS:
        pytest.skip("btlm was installed without a compiler")
    kernels, others = load_kernels(name, 1), load_kernels(PATHS[0] if name == "torch" else "torch", 1)
    source = Weights(rng, "float32", 24, 32)
    with pytest.raises(ValueError, match="WeightMatrix of other kernels"):
        kernels.linear(np.zeros((1, 32), np.float32), source.matrix(others), np.zeros((1, 24), np.float32))
    cache = others.cache("float32", PageTable(1, 64), heads=1, head_dim=16)
    with pytest.raises(ValueError, match="Cache of other kernels"):
        attend(kernels, cache, np.zeros((1, 48), np.float32), [[0, 0, 0, 1]], 1, 16)


@each
@pytest.mark.parametrize(
    "out",
    [np.zeros((2, 32)), np.zeros((32, 2), np.float32).T, np.broadcast_to(np.float32(0), (2, 32)), "read-only"],
    ids=["fp64", "strided", "broadcast", "read-only"],
)
def test_what_cannot_be_written_to_in_place_is_refused(name, out):
    x = np.ones((2, 32), np.float32)
    if isinstance(out, str):
        out = x.copy()
        out.flags.writeable = False
    with pytest.raises(ValueError, match="out is"):
        load_kernels(name, 1).layer_norm(x, x[0], x[0], 1e-5, out)


@each_path
@pytest.mark.parametrize(("dtype", "most"), [("int8", 127), ("int4", 7)])
def test_a_scale_that_bf16_holds_is_that_scale(path, dtype, most):
    """Scales are rounded up to bf16, and not further where they need no rounding."""
    kernels = load_kernels(path, 1)
    caches = [one.cache(dtype, PageTable(1, 64), heads=1, head_dim=16) for one in (kernels, reference)]
    qkv = np.zeros((3, 48), np.float32)
    qkv[:, 16] = qkv[:, 32] = [most, most / 4, np.nextafter(np.float32(most), np.float32(most + 1))]
    for one, cache in zip((kernels, reference), caches, strict=True):
        attend(one, cache, qkv, [[0, 0, 0, 3]], 1, 16)
        for scales in (cache.key_scales, cache.value_scales):
            assert scales is not None
            assert scales.reshape(-1)[:3].tolist() == [0x3F80, 0x3E80, 0x3F81]


# The cache


@each
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize(("length", "head_dim"), [(1, 16), (64, 20), (65, 80), (200, 1)])
def test_bytes_of_a_cache(name, dtype, length, head_dim):
    cache = load_kernels(name, 1).cache(dtype, PageTable(3, length), heads=2, head_dim=head_dim)
    arrays = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    expected = 3 * num_pages(length) * page_bytes(dtype, heads=2, head_dim=head_dim)
    assert sum(array.nbytes for array in arrays if array is not None) == expected


@each
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_texts_share_pages(name, dtype, tokens, rng):
    """A text in shared pages, with a copy of the last one, continues as the original does; others do not change."""
    kernels, heads, head_dim = load_kernels(name, 1), 2, 20
    table = PageTable(3, 200, 12)
    cache = kernels.cache(dtype, table, heads=heads, head_dim=head_dim)
    for slot, pages in enumerate(([7, 2, 11, 0], [1, 3, 4, 5], [])):
        table.assign(slot, pages)
    before, after = (rng.standard_normal((n, 3 * heads * head_dim), dtype=np.float32) for n in (tokens, 2))
    attend(kernels, cache, before, [[0, 0, 0, tokens]], heads, head_dim)
    whole = tokens // 64
    table.assign(2, [*[7, 2, 11][:whole], 9, 10])
    if tokens % 64:
        cache.copy([7, 2, 11][whole], 9)
    original, sharing, other = (
        attend(kernels, cache, after, [[0, slot, tokens, 2]], heads, head_dim) for slot in (0, 2, 1)
    )
    assert np.array_equal(original, sharing)
    assert not np.array_equal(original, other)


@each
@pytest.mark.parametrize("copy", [(0, 3), (3, 0), (-1, 0), (0, -1)])
def test_impossible_copies(name, copy):
    cache = load_kernels(name, 1).cache("float32", PageTable(3, 64), heads=1, head_dim=16)
    with pytest.raises(ValueError, match=f"page {copy[0]} cannot be copied to page {copy[1]} of a cache of 3 pages"):
        cache.copy(*copy)


@each
def test_a_slot_without_a_page_is_refused(name):
    table = PageTable(1, 128, 2)
    cache = load_kernels(name, 1).cache("float32", table, heads=1, head_dim=16)
    table.assign(0, [1])
    qkv = np.zeros((65, 48), np.float32)
    attend(load_kernels(name, 1), cache, qkv[:64], [[0, 0, 0, 64]], 1, 16)
    with pytest.raises(ValueError, match="slot 0 has no page for token 64"):
        attend(load_kernels(name, 1), cache, qkv, [[0, 0, 0, 65]], 1, 16)


@each
def test_a_cache_ends_at_its_length(name):
    """A cache cannot be used beyond its length, although its blocks of 64 tokens have more room."""
    kernels = load_kernels(name, 1)
    cache = kernels.cache("float32", PageTable(1, 65), heads=1, head_dim=16)
    qkv = np.zeros((66, 48), np.float32)
    attend(kernels, cache, qkv[:65], [[0, 0, 0, 65]], 1, 16)
    with pytest.raises(ValueError, match="66 tokens from 0 in slot 0 does not fit a cache of 1 slots of 65 tokens"):
        attend(kernels, cache, qkv, [[0, 0, 0, 66]], 1, 16)


# The native module by itself


@native
def test_the_native_module_stays_inside_its_arrays(rng):
    """The native module refuses a wrong call even without the checks of the interface."""
    kernels = importlib.import_module("btlm.kernels._native").Kernels("plain", 1)
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 24), np.float32)
    matrix = kernels.matrix("float32", np.zeros((24, 32), np.float32), None, None, 24, 32, 0, False)
    turned = kernels.matrix("float32", np.zeros((24, 32), np.float32), None, None, 24, 32, 0, True)
    pages, scales = np.zeros((1, 2, 2048), np.uint8), [np.zeros((1, 2, 64), np.uint16)] * 2
    table = np.zeros((1, 1), np.int32)
    cache = kernels.cache("int8", pages, pages, *scales, table, 1, 2, 32)
    astray = [kernels.cache("int8", pages, pages, *scales, table + page, 1, 2, 32) for page in (-1, 1)]
    qkv, slopes = np.zeros((2, 192), np.float32), np.zeros(2, np.float32)
    attended = np.zeros((2, 64), np.float32)
    packed = np.zeros((2, 16, 64), np.uint8)
    calls = [
        lambda: kernels.matrix("float32", x, None, None, 3, 32, 0, False),
        lambda: kernels.matrix("q4", x, None, None, 2, 32, 0, False),
        lambda: kernels.matrix("float32", x, None, x[0], 2, 32, 0, False),
        lambda: kernels.matrix("int4", packed, None, None, 32, 128, 64, False),
        lambda: kernels.matrix("int4", packed, np.zeros(64, np.uint16), None, 32, 128, 48, False),
        lambda: kernels.matrix("int4", packed, np.zeros(63, np.uint16), None, 32, 128, 64, False),
        lambda: kernels.cache("int8", pages, pages, None, None, table, 1, 2, 32),
        lambda: kernels.cache("int8", pages, pages, *scales, table, 2, 2, 32),
        lambda: kernels.cache("int8", pages, pages, *scales, table[:0], 1, 2, 32),
        lambda: kernels.cache("int9", pages, pages, *scales, table, 1, 2, 32),
        lambda: kernels.linear(x[:, :16].copy(), matrix, out, None, False),
        lambda: kernels.linear(x, matrix, out[:1], None, False),
        lambda: kernels.linear(x, matrix, out, turned, False),
        lambda: kernels.layer_norm(x, x[0, :16], x[0], 1e-5, x),
        lambda: kernels.embed(np.array([24]), matrix, 1.0, x[:1]),
        lambda: kernels.embed(np.array([-1]), matrix, 1.0, x[:1]),
        lambda: kernels.embed(np.array([0]), turned, 1.0, x[:1]),
        lambda: kernels.attend(qkv, cache, np.array([[0, 1, 0, 2]]), slopes, 1.0, attended),
        lambda: kernels.attend(qkv, cache, np.array([[0, 0, 63, 2]]), slopes, 1.0, attended),
        lambda: kernels.attend(qkv, cache, np.array([[1, 0, 0, 2]]), slopes, 1.0, attended),
        lambda: kernels.attend(qkv, cache, np.array([[1, 0, 1, 2**63 - 1]]), slopes, 1.0, attended),
        *(lambda c=c: kernels.attend(qkv, c, np.array([[0, 0, 0, 2]]), slopes, 1.0, attended) for c in astray),
        lambda: kernels.attend(qkv, cache, np.array([[0, 0, 0, 2]]), slopes[:1], 1.0, attended),
        lambda: kernels.attend(qkv, cache, np.array([[0, 0, 0, 2]]), slopes, 1.0, out),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit together"):
            call()


@native
@pytest.mark.parametrize("out", [np.zeros((2, 32)), np.zeros((32, 2), np.float32).T], ids=["fp64", "strided"])
def test_the_native_module_copies_no_array(out):
    kernels = importlib.import_module("btlm.kernels._native").Kernels("plain", 1)
    x = np.ones((2, 32), np.float32)
    for arguments in ((x, x[0], x[0], 1e-5, out), (out, x[0], x[0], 1e-5, x)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            kernels.layer_norm(*arguments)


# Threads and instruction sets


@pytest.mark.parametrize(("one", "two"), [(a, b) for a in ("torch", *PATHS) for b in ("torch", *PATHS)])
def test_kernels_share_nothing(one, two, rng):
    """Two objects are used in turn, as by two engines in a process; each keeps its settings, results and threads."""
    source, x = Weights(rng, "float32", 208, 250), rng.standard_normal((5, 250), dtype=np.float32)
    qkv = rng.standard_normal((70, 120), dtype=np.float32)

    def results(kernels):
        cache = kernels.cache("float32", PageTable(1, 128), heads=2, head_dim=20)
        return linear(kernels, x, source), attend(kernels, cache, qkv, [[0, 0, 0, 70]], 2, 20)

    before = torch.get_num_threads()
    alone = [results(load_kernels(name, threads)) for name, threads in ((one, 3), (two, 2))]
    first, second = load_kernels(one, 3), load_kernels(two, 2)
    for _ in range(3):
        for kernels, name, threads, expected in ((first, one, 3, alone[0]), (second, two, 2, alone[1])):
            assert (kernels.name, kernels.threads) == (name, threads)
            assert all(np.array_equal(a, b) for a, b in zip(results(kernels), expected, strict=True))
    assert torch.get_num_threads() == before
    del first
    assert all(np.array_equal(a, b) for a, b in zip(results(second), alone[1], strict=True))
    if {one, two} == {"plain", PATHS[0] if PATHS else None} and one != two:  # results differ, so a mix-up would show
        assert not np.array_equal(alone[0][1], alone[1][1])


def test_torch_computes_on_the_threads_of_the_kernels(monkeypatch, rng):
    seen = []
    layer_norm = torch.nn.functional.layer_norm

    def spy(*args):
        seen.append(torch.get_num_threads())
        return layer_norm(*args)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", spy)
    x = rng.standard_normal((2, 16), dtype=np.float32)
    for threads in (3, 1, 2):
        load_kernels("torch", threads).layer_norm(x, x[0], x[1], 1e-5, np.empty_like(x))
    assert seen == [3, 1, 2]
    assert torch.get_num_threads() == 1


@native
def test_thousands_of_small_calls(rng):
    source = Weights(rng, "int8", 208, 64, group=64)
    x = rng.standard_normal((1, 64), dtype=np.float32)
    expected, out = linear(load_kernels("native", 1), x, source), np.empty((1, 208), np.float32)
    for threads in (2, 4, 9):
        kernels = load_kernels("native", threads)
        matrix = source.matrix(kernels)
        for _ in range(700):
            out[:] = 0
            kernels.linear(x, matrix, out)
            assert np.array_equal(out, expected), threads


@native
def test_calls_from_several_threads_of_python(rng):
    kernels = load_kernels("native", 3)
    sources = [Weights(rng, "int4", 112, 128, group=64) for _ in range(4)]
    x = rng.standard_normal((9, 128), dtype=np.float32)
    expected = [linear(kernels, x, source) for source in sources]
    wrong: list[bool] = []

    def work(i):
        wrong.extend(not np.array_equal(linear(kernels, x, sources[i]), expected[i]) for _ in range(150))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 600
    assert not any(wrong)


@native
def test_threads_come_and_go(rng):
    source = Weights(rng, "float32", 200, 40)
    x = rng.standard_normal((3, 40), dtype=np.float32)
    expected = linear(load_kernels("native", 1), x, source)
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir())) if tasks.is_dir() else 0
    for threads in (1, 6, 2, 16, 1, 3) * 5:
        kernels = load_kernels("native", threads)
        assert kernels.threads == threads
        assert np.array_equal(linear(kernels, x, source), expected)
        if before:
            assert len(list(tasks.iterdir())) < before + threads  # the threads of earlier kernels have ended


@native
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_more_threads_than_the_system_gives():
    """Threads that were already started for the failed object end, and those of earlier objects keep working."""
    code = """if True:
        import resource
        from pathlib import Path
        import numpy as np
        from btlm.kernels import load_kernels
        kernels = load_kernels("native", 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, used + 200_000_000))
        try:
            load_kernels("native", 1000)
        except ValueError as error:
            print(error)
        x = np.ones((2, 16), np.float32)
        kernels.layer_norm(x, x[0], x[0], 1e-5, x)
        print(kernels.threads, x.sum())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1000 threads are more than the system gives; use fewer\n2 32.0\n", done.stderr


def holds_in_a_fork(check):
    """Whether a check, which may also hang, is true in a forked process."""
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = check()
        finally:
            os._exit(0 if same else 1)  # in any case, the child must not go on to run the tests
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return ended == (child, 0)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
ignore_threads = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")


@native
@forks
@ignore_threads
def test_a_fork_has_threads_of_its_own(rng):
    kernels, unused = load_kernels("native", 3), load_kernels("native", 2)
    source = Weights(rng, "int8", 1600, 128, group=64)
    x = rng.standard_normal((4, 128), dtype=np.float32)
    expected = linear(kernels, x, source)

    def check():
        nonlocal kernels, unused
        same = np.array_equal(linear(kernels, x, source), expected) and kernels.threads == 3
        tasks = Path("/proc/self/task")
        same = same and (not tasks.is_dir() or len(list(tasks.iterdir())) == 3)  # a fork begins with one
        same = same and np.array_equal(linear(load_kernels("native", 2), x, source), expected)
        del kernels, unused  # their threads do not exist in the child and cannot be joined
        return same

    assert holds_in_a_fork(check)
    assert np.array_equal(linear(kernels, x, source), expected)


@native
@forks
@ignore_threads
def test_a_fork_does_not_wait_for_a_call_that_was_under_way(rng):
    kernels = load_kernels("native", 2)
    source = Weights(rng, "float32", 1600, 640)
    x = rng.standard_normal((200, 640), dtype=np.float32)  # long enough that a fork meets a call
    expected, over = linear(kernels, x, source), threading.Event()

    def work():
        while not over.is_set():
            linear(kernels, x, source)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert all(holds_in_a_fork(lambda: np.array_equal(linear(kernels, x, source), expected)) for _ in range(5))
    finally:
        over.set()
        worker.join()


@native
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts CPU time as Linux does")
def test_idle_threads_sleep(rng):
    kernels = load_kernels("native", 4)
    source = Weights(rng, "int8", 1600, 128, group=64)
    x = rng.standard_normal((4, 128), dtype=np.float32)
    linear(kernels, x, source)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.06  # three busy threads would take most of 0.3 s per core
