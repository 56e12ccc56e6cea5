import importlib.util
import os

import pytest

from btlm.kernels import instruction_sets, load_kernels, processors

HAS_NATIVE = importlib.util.find_spec("btlm.kernels._native") is not None
native = pytest.mark.skipif(not HAS_NATIVE, reason="btlm was installed without a compiler")


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("BTLM_KERNELS", raising=False)


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)


@native
def test_the_fastest_instruction_set_is_chosen():
    kernels = load_kernels(threads=2)
    assert kernels.name == instruction_sets()[0]
    assert instruction_sets()[-1] == "plain"
    assert kernels.threads == 2
    assert load_kernels().threads == processors()


@native
def test_every_instruction_set_by_its_name():
    for name in instruction_sets():
        assert load_kernels(name, 1).name == name
    assert load_kernels("native", 1).name == instruction_sets()[0]


def test_torch_by_its_name():
    kernels = load_kernels("torch", 3)
    assert (kernels.name, kernels.threads) == ("torch", 3)


def test_the_variable_decides_where_nothing_is_named(monkeypatch):
    fastest = instruction_sets()[0] if HAS_NATIVE else "torch"
    monkeypatch.setenv("BTLM_KERNELS", "torch")
    assert load_kernels(threads=1).name == "torch"
    if HAS_NATIVE:
        assert load_kernels("native", 1).name == fastest
    monkeypatch.setenv("BTLM_KERNELS", "auto")
    assert load_kernels(threads=1).name == fastest
    monkeypatch.setenv("BTLM_KERNELS", "sse9")
    with pytest.raises(ValueError, match="'sse9'"):
        load_kernels()
    monkeypatch.setenv("BTLM_KERNELS", "")
    assert load_kernels(threads=1).name == fastest


@native
def test_unknown_names_are_one_line():
    with pytest.raises(ValueError, match=r"'sse9' are unknown.*auto, native, torch, .*plain") as error:
        load_kernels("sse9")
    assert "\n" not in str(error.value)


@native
def test_the_native_module_refuses_an_instruction_set_that_the_machine_lacks():
    with pytest.raises(ValueError, match="cannot run the instruction set sse9"):
        importlib.import_module("btlm.kernels._native").Kernels("sse9", 1)


@pytest.mark.usefixtures("without_native")
def test_without_the_native_module_torch_runs(caplog):
    assert instruction_sets() == []
    assert load_kernels("torch", 1).unpacked_bytes == 4
    assert not caplog.records  # it was asked for
    assert load_kernels(threads=1).name == "torch"
    assert "install a compiler" in caplog.records[0].getMessage()
    for name in ("native", "plain", "avx2"):
        with pytest.raises(ValueError, match=f"{name!r} are not here.*compiler") as error:
            load_kernels(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("threads", [0, -1, 1025])
@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=native)])
def test_impossible_threads(name, threads):
    """A number of 0 threads does not mean all of them."""
    with pytest.raises(ValueError, match=f"{threads} threads are not between 1 and 1,024"):
        load_kernels(name, threads)


def test_processors():
    assert 1 <= processors() <= (os.cpu_count() or 1)
