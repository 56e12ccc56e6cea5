"""The operations that the engine runs on: in C++, or in torch where the package was built without a compiler."""

from .cache import Cache, cache_bytes
from .interface import Kernels, WeightMatrix
from .select import instruction_sets, load_kernels, processors

__all__ = ["Cache", "Kernels", "WeightMatrix", "cache_bytes", "instruction_sets", "load_kernels", "processors"]
