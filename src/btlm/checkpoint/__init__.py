"""A name or folder to an open checkpoint. What needs torch loads when it is first used: the engine runs without."""

import importlib
from typing import TYPE_CHECKING, Any

from .locate import BUNDLED_MODEL
from .open import Checkpoint

if TYPE_CHECKING:
    from .to_transformers import load_config, load_model

__all__ = ["BUNDLED_MODEL", "Checkpoint", "load_config", "load_model"]

_LATER = {"load_config": ".to_transformers", "load_model": ".to_transformers"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
