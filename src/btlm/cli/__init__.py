"""The command `btlm`. `main` chooses a command, each of which has a file here; `options` makes flags of dataclasses."""

from .main import main

__all__ = ["main"]
