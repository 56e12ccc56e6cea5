"""The operations that the engine runs on: in C++, or in torch where the package was built without a compiler."""

from .arrays import num_pages
from .cache import Cache, PageTable, page_bytes
from .interface import Kernels, WeightMatrix
from .select import instruction_sets, load_kernels, processors

__all__ = [
    "Cache",
    "Kernels",
    "PageTable",
    "WeightMatrix",
    "instruction_sets",
    "load_kernels",
    "num_pages",
    "page_bytes",
    "processors",
]
