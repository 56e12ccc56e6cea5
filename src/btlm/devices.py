"""Choice of the torch device to compute on."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btlm.console import one_line

if TYPE_CHECKING:
    import torch


def best_device(*kinds: str) -> str:
    """The first of the given kinds (``"cuda"``, ``"mps"``) that torch can use here; else ``"cpu"``."""
    import torch

    usable: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return next((kind for kind in kinds if usable[kind]()), "cpu")


def usable_device(name: str) -> "torch.device":
    """The torch device with a given name.

    Raises:
        ValueError: Torch does not know the device, or cannot use it here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(f"The device {name!r} is unknown; use auto, cpu, cuda, cuda:1, mps or another torch device.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"The device {name} is not available here ({one_line(error)}); use cpu.") from error
    return device


def multiplies_bf16() -> bool:
    """Whether this processor has instructions that multiply bf16; without them torch is faster in fp32."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # a torch without it is older
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def has_cuda() -> bool:
    """Whether torch can use CUDA. Torch, which takes seconds to import, is asked only if there is an NVIDIA driver."""
    return Path("/dev/nvidiactl").exists() and best_device("cuda") == "cuda"
