"""Text to text: :class:`TextGenerator`, and the command `btlm generate`. What is heavy loads when it is first used."""

from typing import TYPE_CHECKING

from btlm import lazy

from .report import GenerationReport

if TYPE_CHECKING:
    from .text_generator import TextGenerator
    from .with_transformers import generate_text

__all__ = ["GenerationReport", "TextGenerator", "generate_text"]

__getattr__, __dir__ = lazy.names(__name__, {"TextGenerator": ".text_generator", "generate_text": ".with_transformers"})
