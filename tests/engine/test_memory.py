import resource
import sys

import pytest

from btlm.engine import memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_this_machine_has_memory():
    free, peak = memory.available_memory(), memory.peak_memory()
    assert free is not None
    assert free > 1 << 20
    assert 1 << 24 < peak < 1 << 44


def test_the_smallest_limit_counts(monkeypatch):
    for name, value in (("_free", 5000), ("_control_group", 3000), ("_address_space", None)):
        monkeypatch.setattr(memory, name, lambda value=value: value)
    assert memory.available_memory() == 3000
    for name in ("_free", "_control_group"):
        monkeypatch.setattr(memory, name, lambda: None)
    assert memory.available_memory() is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "5000", "memory.current": "3000", "memory.stat": "anon 7\ninactive_file 400"}, 2400),
        ({"memory.max": "max", "memory.current": "3000", "memory.stat": "inactive_file 400"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "total_inactive_file 300\ninactive_file 9",
            },
            4300,
        ),
        ({}, None),
        (
            {
                "own": "1:cpu:/elsewhere\n0::/system.slice/btlm.service",
                "system.slice/memory.max": "9000",
                "system.slice/memory.current": "7000",
                "system.slice/memory.stat": "inactive_file 0",
                "system.slice/btlm.service/memory.max": "5000",
                "system.slice/btlm.service/memory.current": "1000",
                "system.slice/btlm.service/memory.stat": "inactive_file 0",
            },
            2000,
        ),
        (
            {
                "own": "4:cpu,memory:/user/1",
                "memory/user/1/memory.limit_in_bytes": "5000",
                "memory/user/1/memory.usage_in_bytes": "1000",
                "memory/user/1/memory.stat": "total_inactive_file 1",
            },
            4001,
        ),
    ],
)
def test_a_control_group_leaves_what_it_can_drop_too(monkeypatch, tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    assert memory._control_group() == left


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells")
def test_a_limit_of_the_address_space(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    limited = memory.available_memory()
    assert memory._address_space() is not None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert memory._address_space() is None
    assert limited is not None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    assert (memory.available_memory() or 0) < 1 << 20
