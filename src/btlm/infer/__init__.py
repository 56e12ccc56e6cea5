"""A checkpoint to text. What needs torch loads when it is first used: the engine runs without."""

import importlib
from typing import TYPE_CHECKING, Any

from .engine import Engine, Text, Token
from .locate import BUNDLED_MODEL
from .options import GenerationOptions, GenerationReport

if TYPE_CHECKING:
    from .generate import generate_text
    from .load import load_config, load_model

__all__ = [
    "BUNDLED_MODEL",
    "Engine",
    "GenerationOptions",
    "GenerationReport",
    "Text",
    "Token",
    "generate_text",
    "load_config",
    "load_model",
]

_LATER = {
    "generate_text": ".generate",
    "load_config": ".load",
    "load_model": ".load",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
