"""Token ids to a stream of tokens, on the kernels and without torch."""

from .engine import Engine, Text, Token
from .options import GenerationOptions

__all__ = ["Engine", "GenerationOptions", "Text", "Token"]
