"""The operations that the engine runs on: in C++, or in torch where the package was built without a compiler."""

from .interface import DTYPES, Cache, Kernels, WeightMatrix, cache_bytes
from .select import instruction_sets, load_kernels, processors

__all__ = [
    "DTYPES",
    "Cache",
    "Kernels",
    "WeightMatrix",
    "cache_bytes",
    "instruction_sets",
    "load_kernels",
    "processors",
]
