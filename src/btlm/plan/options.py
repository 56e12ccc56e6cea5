"""Options of plans."""

from dataclasses import dataclass
from typing import Annotated, Literal

from btlm.errors import OptionError
from btlm.settings import NOT_EMPTY, Count, Range, check

# Peak of dense bf16 products in TFLOP/s, by NVIDIA's data sheets (half of the figures with sparsity; SXM modules).
PEAK_TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}
# Share of the peak that training is assumed to reach.
MFU = 0.4


@dataclass(frozen=True)
class Hardware:
    """What a plan expects times for: this machine, whose speed is measured, or other devices.

    Args:
        hardware: Devices to plan for, by their data sheet (default: this machine, measured).
        peak_tflops: Peak of one device in TFLOP/s, to plan for a device without a name here.
        mfu: Share of that peak that training is expected to reach, the model FLOPs utilization (default: 0.4).
        devices: Numbers of devices to expect times for (default: those that can share the batches).
    """

    hardware: Literal["a100", "h100", "h200"] | None = None
    peak_tflops: Annotated[float, Range(above=0, most=1e6)] | None = None
    mfu: Annotated[float, Range(above=0, most=1)] | None = None
    devices: Annotated[list[Count], NOT_EMPTY] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
        if self.hardware and self.peak_tflops:
            raise OptionError("{hardware} and {peak_tflops} both give the peak of a device; leave out one.")
        if self.mfu and not (self.hardware or self.peak_tflops):
            raise OptionError("{mfu} is a share of a peak; give {hardware} or {peak_tflops}, too.")

    @property
    def peak(self) -> float | None:
        """Peak of one device in TFLOP/s; ``None`` for this machine."""
        return PEAK_TFLOPS[self.hardware] if self.hardware else self.peak_tflops
