"""BTLM-3B-8k: the open reference implementation. Importing it registers BTLM with Transformers' Auto classes.

Torch and Transformers take seconds to import, so btlm waits until someone needs them: its own classes load when they
are first used, and BTLM is registered the moment Transformers is imported, whichever of the two comes first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registration

if TYPE_CHECKING:
    from btlm.model import BTLMConfig, BTLMLMHeadModel, BTLMModel

__version__ = "0.1.0"
__all__ = ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("btlm.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register_with_transformers()
