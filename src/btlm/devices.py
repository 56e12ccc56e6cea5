"""Which device to compute on."""

from pathlib import Path


def has_cuda() -> bool:
    """Torch is asked where there is an NVIDIA driver: it takes seconds to import."""
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()
