import importlib.util
import os
from typing import cast

import pytest
import torch

import btlm.kernels.twin
from btlm.kernels import Kernels, load_kernels, processors

twin = cast(Kernels, btlm.kernels.twin)
HAS_NATIVE = importlib.util.find_spec("btlm.kernels._native") is not None
native = pytest.mark.skipif(not HAS_NATIVE, reason="btlm was installed without a compiler")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.delenv("BTLM_KERNELS", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if HAS_NATIVE:
        monkeypatch.undo()
        load_kernels("native", 1)


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)


@native
def test_the_fastest_path_is_chosen():
    kernels = load_kernels(threads=2)
    assert kernels.path() == kernels.paths()[0]
    assert kernels.paths()[-1] == "plain"
    assert kernels.threads() == 2
    assert load_kernels().threads() == processors()


@native
def test_every_path_by_its_name():
    for name in load_kernels("native", 1).paths():
        assert load_kernels(name, 1).path() == name
    assert load_kernels("native", 1).path() == load_kernels("native", 1).paths()[0]


def test_no_threads_are_not_all_threads():
    with pytest.raises(ValueError, match="0 threads are not between 1 and 1,024"):
        load_kernels("torch", 0)


def test_torch_by_its_name():
    assert load_kernels("torch", 1) is twin
    assert (twin.path(), twin.paths(), twin.threads()) == ("torch", ["torch"], 1)
    with pytest.raises(ValueError, match="no instruction path plain"):
        twin.use_path("plain")


def test_the_variable_decides_where_nothing_is_named(monkeypatch):
    monkeypatch.setenv("BTLM_KERNELS", "torch")
    assert load_kernels(threads=1) is twin
    if HAS_NATIVE:
        assert load_kernels("native", 1) is not twin
    monkeypatch.setenv("BTLM_KERNELS", "auto")
    assert (load_kernels(threads=1) is twin) is not HAS_NATIVE
    monkeypatch.setenv("BTLM_KERNELS", "sse9")
    with pytest.raises(ValueError, match="'sse9'"):
        load_kernels()
    monkeypatch.setenv("BTLM_KERNELS", "")
    assert (load_kernels(threads=1) is twin) is not HAS_NATIVE


@native
def test_unknown_names_are_one_line():
    with pytest.raises(ValueError, match=r"'sse9' are unknown.*auto, native, torch, .*plain") as error:
        load_kernels("sse9")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sse9"):
        load_kernels("native", 1).use_path("sse9")


@pytest.mark.usefixtures("without_native")
def test_without_the_native_module_torch_runs():
    assert load_kernels(threads=1) is twin
    for name in ("native", "plain", "avx2"):
        with pytest.raises(ValueError, match=f"{name!r} are not here.*compiler") as error:
            load_kernels(name)
        assert "\n" not in str(error.value)


def test_threads_below_one():
    for name in ("torch", *(["native"] if HAS_NATIVE else [])):
        with pytest.raises(ValueError, match="-1 threads"):
            load_kernels(name, -1)


def test_processors():
    assert 1 <= processors() <= (os.cpu_count() or 1)
