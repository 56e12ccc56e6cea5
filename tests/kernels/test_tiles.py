"""The kernels on AMX's tiles: emulated on every machine, and on the processor where it has them.

They must have the bits of the kernels that they replace. Everything is shared with the emulation but the instructions.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from btlm.kernels import Kernels, PageTable, instruction_sets, load_kernels
from tests.kernels.test_kernels import SEGMENTS, SIZES, TOLERANCE, attend, linear
from tests.kernels.tiny import Weights, furthest, same_contents

SETS = instruction_sets()
PAIRS = [("amx-emulated", "avx512vnni"), ("amx-emulated-plain", "plain"), ("amx", "avx512vnni")]
"""Kernels with tiles, and those without that they are compared with."""

pytestmark = pytest.mark.skipif(not SETS, reason="btlm was installed without a compiler")
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])


def load(name, threads=1):
    if name == "amx" and name not in SETS:
        pytest.skip("this machine has no AMX, or the system does not allow its tiles")
    if "avx512vnni" not in SETS and name in ("amx-emulated", "avx512vnni"):
        pytest.skip("this machine has no AVX-512 with VNNI")
    if not name.startswith("amx-emulated"):
        return load_kernels(name, threads)
    return Kernels(importlib.import_module("btlm.kernels._native").Kernels(name, threads))  # not for users


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@each_pair
@pytest.mark.parametrize(
    ("dtype", "group"), [("int4", 64), ("int4", 128), ("int4", 512), ("int8", 64), ("int8", 128), ("int8", 512)]
)
def test_products_have_the_bits_of_those_without_tiles(pair, dtype, group, rng):
    """Whole and partial panels of tokens, one and two of them, blocks of tokens, single and paired blocks of rows."""
    name, base = pair
    for rows, columns in ((16, group), (208, 2 * group)):
        source, gate = (Weights(rng, dtype, rows, columns, group=group) for _ in range(2))
        for tokens in (3, 4, 5, 15, 16, 17, 32, 33, 130):
            x = rng.standard_normal((tokens, columns), dtype=np.float32) * 3
            before = rng.standard_normal((tokens, rows), dtype=np.float32)
            for opening, add in ((None, False), (gate, True)):
                expected = linear(load(base), x, source, opening, before, add)
                for threads in (1, 3):
                    ours = linear(load(name, threads), x, source, opening, before, add)
                    assert np.array_equal(ours, expected), (rows, columns, tokens, threads, add)


@each_pair
@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("group", [16, 48, 80, 576])
def test_groups_that_tiles_cannot_have_are_multiplied_without_them(pair, dtype, group, rng):
    name, base = pair
    source = Weights(rng, dtype, 48, 2 * group, group=group)
    x = rng.standard_normal((20, 2 * group), dtype=np.float32)
    assert np.array_equal(linear(load(name), x, source), linear(load(base), x, source))


@each_pair
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_products_of_extreme_inputs(pair, dtype, rng):
    """Zeros, NaN, and the ends of eight bits, where sums are largest and saturation would show."""
    name, base = pair
    source = Weights(rng, dtype, 32, 256, group=128)
    x = rng.standard_normal((20, 256), dtype=np.float32)
    x[0] = 0
    x[1] = 127
    x[2] = -127
    x[3] *= np.float32(1e30)
    x[4] *= np.float32(1e-38)
    x[17, 200] = np.nan
    x[18, 3] = np.inf
    for weight in (0x00, 0xFF, None):
        if weight is not None:
            source.weight[:] = weight
        ours, expected = (linear(load(one), x, source) for one in pair)
        assert np.array_equal(ours, expected, equal_nan=True)
        assert np.isnan(ours[17]).all()
        assert np.isfinite(np.delete(ours, (17, 18), 0)).all()
        source = Weights(rng, dtype, 32, 256, group=128)
    assert name != base


@each_pair
@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize(("heads", "head_dim"), [*SIZES, (1, 176), (1, 208), (1, 240)])
def test_attention_has_the_bits_of_that_without_tiles(pair, dtype, heads, head_dim, rng):
    """Every number of tiles that a head needs, segments that begin and end within pages, and pages that lie apart."""
    name, base = pair
    table = PageTable(3, 192, 20)
    for slot, pages in enumerate(([4, 0, 19], [15, 16, 3], [2, 18, 5])):
        table.assign(slot, pages)
    kernels = [load(base), load(name), load(name, 3)]
    caches = [one.cache(dtype, table, heads=heads, head_dim=head_dim) for one in kernels]
    for segments in SEGMENTS:
        tokens = sum(segment[3] for segment in segments)
        qkv = rng.standard_normal((tokens, 3 * heads * head_dim), dtype=np.float32) * 2
        qkv[tokens // 2] *= np.float32(1e-38 if tokens % 2 else 100)
        expected, *ours = (
            attend(one, cache, qkv, segments, heads, head_dim) for one, cache in zip(kernels, caches, strict=True)
        )
        assert all(np.array_equal(out, expected) for out in ours), segments
        assert all(same_contents(cache, caches[0]) for cache in caches)


@each_pair
@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_attention_is_that_of_torch(pair, dtype, rng):
    heads, head_dim, tokens = 2, 80, 150
    qkv = rng.standard_normal((tokens, 3 * heads * head_dim), dtype=np.float32)
    ours, theirs = (
        attend(
            one,
            one.cache(dtype, PageTable(1, 192), heads=heads, head_dim=head_dim),
            qkv,
            [[0, 0, 0, tokens]],
            heads,
            head_dim,
        )
        for one in (load(pair[0]), load_kernels("torch", 1))
    )
    assert furthest(ours, theirs) < TOLERANCE[dtype]


def test_emulated_tiles_are_not_offered():
    assert not any("emulated" in name for name in SETS)
    with pytest.raises(ValueError, match="'amx-emulated' are unknown here"):
        load_kernels("amx-emulated", 1)


def test_tiles_are_used_where_the_processor_has_them():
    """A machine with AMX has the path, so that these tests cannot all be skipped there without notice."""
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and {"amx_tile", "amx_int8", "avx512_vnni"} <= set(flags.read_text().split())
    if not has:
        pytest.skip("this machine has no AMX")
    assert SETS[0] == "amx"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["amx", "amx-emulated", "amx-emulated-plain"])
def test_tiles_after_a_fork(name):
    """A child asks anew for the permission to use tiles."""
    load(name)
    program = """
import os, sys
import numpy as np
from tests.kernels.test_tiles import load, linear
from tests.kernels.tiny import Weights
kernels = load(sys.argv[1], 2)
source = Weights(np.random.default_rng(0), "int8", 208, 128, group=64)
x = np.random.default_rng(1).standard_normal((40, 128), dtype=np.float32)
before = linear(kernels, x, source)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(linear(kernels, x, source), before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(linear(kernels, x, source), before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
