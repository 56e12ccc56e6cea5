"""Options of conversions."""

from dataclasses import dataclass
from typing import Annotated, Literal

from btlm.settings import check


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights are quantized.

    Args:
        bits: Bits per weight in the blocks.
        group_size: Weights that share a scale.
        table_bits: Bits per weight in the token table, and in the head where it is not tied.
        calibration: Text file to choose the weights by (GPTQ): on it, the outputs of every matrix change as little as
            possible. Without it, each weight is rounded by itself.
    """

    bits: Literal[4, 8] = 4
    group_size: Literal[64, 128] = 128
    table_bits: Literal[4, 8] = 8
    calibration: Annotated[str, "FILE"] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)


@dataclass(frozen=True)
class GGUF:
    """How a model is stored for llama.cpp.

    Args:
        type: Type of the matrices.
    """

    type: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16"

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
