"""Options of `btlm generate` beside those of generation itself, see :mod:`btlm.engine.options`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from btlm.engine.options import Threads
from btlm.settings import check


@dataclass(frozen=True, kw_only=True)
class Run:
    """The model, and what continues the prompt with it.

    Args:
        model: Checkpoint folder or Hugging Face id (default: the bundled model).
        engine: Program to use: btlm, transformers, or auto, which is btlm for everything that it supports.
        dtype: Dtype of the weights: bfloat16, float16, float32, or auto, which is as stored.
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        draft: Small checkpoint with the same vocabulary, folder or id, whose guesses the model checks several at a
            time: the same text, faster where they are right.
        threads: Number of threads (default: one per core).
        kernels: Kernels to use: native, torch, an instruction set, or auto, which is the fastest here.
        device: Device of torch: cpu, cuda, cuda:1, mps ... or auto, which is the fastest here.
        context_scaling: Position interpolation for text longer than the training length: dynamic, a factor above 1, or
            none, which is as stored.
        no_echo: Write the continuation only, without the prompt.
    """

    model: Annotated[str, "MODEL"] | None = None
    engine: Literal["auto", "btlm", "transformers"] = "auto"
    dtype: Annotated[str, "DTYPE"] = "auto"
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    draft: Annotated[str, "MODEL"] | None = None
    threads: Threads | None = None
    kernels: Annotated[str, "NAME"] = "auto"
    device: Annotated[str, "DEVICE"] = "auto"
    context_scaling: Annotated[str, "SCALING"] = "none"
    no_echo: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
