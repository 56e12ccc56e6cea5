"""Names of a package that load when they are first used, so that its import stays fast."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: Full name of the package.
        modules: Name that the package offers -> module that has it, which may be relative (``".engine"``).
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name], package), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *modules})
