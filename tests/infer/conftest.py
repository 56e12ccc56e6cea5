import shutil
from pathlib import Path

import pytest
import torch

from tests.infer.tiny import save_tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder that works; for reading only."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A folder that works, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _random_state():
    """Sampling seeds torch's generator, which other tests draw from too."""
    with torch.random.fork_rng():
        yield
