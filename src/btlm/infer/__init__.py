"""A checkpoint to text."""

from .generate import GenerationOptions, GenerationReport, generate_text
from .load import load_config, load_model
from .locate import BUNDLED_MODEL

__all__ = [
    "BUNDLED_MODEL",
    "GenerationOptions",
    "GenerationReport",
    "generate_text",
    "load_config",
    "load_model",
]
