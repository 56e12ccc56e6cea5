"""Token ids to a stream of tokens and log-probabilities, on the kernels and without torch.

The engine loads when it is first used: the command line needs only its options.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .options import GenerationOptions

if TYPE_CHECKING:
    from .engine import Engine
    from .scheduler import Request, Token

__all__ = ["Engine", "GenerationOptions", "Request", "Token"]

_LATER = {"Engine": ".engine", "Request": ".scheduler", "Token": ".scheduler"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
