"""BTLM-3B-8k: the open reference implementation. Importing it registers BTLM with Transformers' Auto classes.

Torch and Transformers take seconds to import, so btlm waits until someone needs them: its own classes load when they
are first used, and BTLM is registered the moment Transformers is imported, whichever of the two comes first.
"""

from typing import TYPE_CHECKING

from . import lazy, registration

if TYPE_CHECKING:
    from btlm.model import BTLMConfig, BTLMLMHeadModel, BTLMModel

__version__ = "0.1.0"
__all__ = ["BTLMConfig", "BTLMLMHeadModel", "BTLMModel", "__version__"]

__getattr__, __dir__ = lazy.names(__name__, dict.fromkeys(__all__[:-1], "btlm.model"))

registration.register_with_transformers()
