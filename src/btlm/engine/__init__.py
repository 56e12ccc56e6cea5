"""Token ids to a stream of tokens and log-probabilities, on the kernels and without torch.

The engine loads when it is first used: the command line needs only its options.
"""

from typing import TYPE_CHECKING

from btlm import lazy

from .options import GenerationOptions

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Request, Token

__all__ = ["Engine", "GenerationOptions", "Request", "Token"]

__getattr__, __dir__ = lazy.names(__name__, {"Engine": ".engine", "Request": ".request", "Token": ".request"})
