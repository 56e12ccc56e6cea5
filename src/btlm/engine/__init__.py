"""Token ids to a stream of tokens and log-probabilities, on the kernels and without torch."""

from .engine import Engine
from .options import GenerationOptions
from .scheduler import Request, Token

__all__ = ["Engine", "GenerationOptions", "Request", "Token"]
