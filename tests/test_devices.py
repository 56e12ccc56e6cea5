from pathlib import Path

import pytest
import torch

from btlm import devices


@pytest.mark.parametrize(
    ("cuda", "mps", "kinds", "best"),
    [
        (True, True, ("cuda", "mps"), "cuda"),
        (False, True, ("cuda", "mps"), "mps"),
        (False, True, ("cuda",), "cpu"),
        (False, False, ("cuda", "mps"), "cpu"),
    ],
)
def test_the_best_device_is_the_first_that_is_here(monkeypatch, cuda, mps, kinds, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.best_device(*kinds) == best


def test_a_device_that_can_be_used():
    assert devices.usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("abacus", "The device 'abacus' is unknown; use auto"), ("cuda:99", "The device cuda:99 is not available here")],
)
def test_devices_that_cannot_be_used(name, problem):
    with pytest.raises(ValueError, match=problem):
        devices.usable_device(name)


def test_torch_is_not_asked_where_there_is_no_driver(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    assert not devices.has_cuda()
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.has_cuda()
