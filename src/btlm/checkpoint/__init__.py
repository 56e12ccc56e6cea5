"""A name or folder to an open checkpoint. What needs torch loads when it is first used: the engine runs without."""

import importlib
from typing import TYPE_CHECKING, Any

from .locate import BUNDLED_MODEL

if TYPE_CHECKING:
    from .config import load_config
    from .to_transformers import load_model

__all__ = ["BUNDLED_MODEL", "load_config", "load_model"]

_LATER = {"load_config": ".config", "load_model": ".to_transformers"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
