"""Fixtures of every room that works on checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder that works; for reading only."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A folder that works, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def torch_state():
    """Sampling seeds the generator that other tests draw from; small models run fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
