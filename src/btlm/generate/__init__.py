"""Text to text: :class:`TextGenerator`, and the command `btlm generate`. What is heavy loads when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

from .report import GenerationReport

if TYPE_CHECKING:
    from .text_generator import TextGenerator
    from .with_transformers import generate_text

__all__ = ["GenerationReport", "TextGenerator", "generate_text"]

_LATER = {"TextGenerator": ".text_generator", "generate_text": ".with_transformers"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
