"""Fixtures for all rooms that work on checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A valid checkpoint folder; tests must not change it."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A copy of a valid checkpoint folder, which tests may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def torch_state():
    """Restore torch's generator, which sampling seeds, and use one thread, the fastest for small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
