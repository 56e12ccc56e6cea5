"""The operations that the engine runs on: in C++, or in torch where the package was built without a compiler."""

from .load import load_kernels, processors
from .protocol import Kernels, LayerCache, WeightMatrix

__all__ = ["Kernels", "LayerCache", "WeightMatrix", "load_kernels", "processors"]
