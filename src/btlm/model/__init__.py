"""The network. Imports nothing else of btlm, so that its files can travel in a checkpoint.

What needs torch and Transformers loads when it is first used: the facts of the network are there without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classification_btlm import BTLMForSequenceClassification, BTLMForTokenClassification
    from .configuration_btlm import BTLMConfig
    from .modeling_btlm import BTLMLMHeadModel, BTLMModel

__all__ = [
    "BTLMConfig",
    "BTLMForSequenceClassification",
    "BTLMForTokenClassification",
    "BTLMLMHeadModel",
    "BTLMModel",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        file = "classification_btlm" if name.startswith("BTLMFor") else "modeling_btlm"
        return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
