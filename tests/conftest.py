import os

import pytest

# Set before any test module imports huggingface_hub, which reads it only once. Everything that tests load is in the
# repository; a test that uses the network fails here as it would on a machine without network.
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.power_cut import PowerCut  # after the line above


@pytest.fixture
def power_cut(monkeypatch):
    """Records what a power cut would take away of what a test writes: assert that ``power_cut.lost`` is empty."""
    return PowerCut(monkeypatch)
