"""Options of plans."""

from dataclasses import dataclass

from btlm.settings import Count


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes, and prints as such.

    Args:
        mfu: Model FLOPs utilization, the expected share of the peak.
        peak_tflops: Peak of one device in TFLOP/s; the default is that of dense bf16 products on an NVIDIA H100 SXM.
        devices: Numbers of devices to expect times for (default: those that can share the batches).
    """

    # NVIDIA's data sheet: 1,979 TFLOP/s with sparsity, half of it without.
    mfu: float = 0.4
    peak_tflops: float = 989.0
    devices: list[Count] | None = None
