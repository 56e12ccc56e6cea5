"""Text of a prompt and of its continuation, without torch."""

import math
import sys
from collections.abc import Callable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ValueError: There are none.
    """
    ids: list[int] = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("The prompt is empty; give some text to continue.")
    return ids


class TextPieces:
    """Receives token ids, and writes text as soon as it ends in a whole character.

    Transformers' ``TextStreamer`` holds text back until the next space; here a piece waits only for the bytes that its
    last character lacks.

    Args:
        tokenizer: Decodes the ids; special tokens are skipped.
        write: Receives the pieces.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.stream = DecodeStream(skip_special_tokens=True)
        self.waiting: list[int] = []

    def put(self, ids: list[int]) -> None:
        """Take the next ids."""
        self.waiting += ids
        if (piece := self.stream.step(self.tokenizer, ids)) is not None:
            self.waiting.clear()
            self.write(piece)

    def end(self) -> None:
        """Write what is left, which may be part of a character."""
        if self.waiting:
            self.write(self.tokenizer.decode(self.waiting, skip_special_tokens=True))
            self.waiting.clear()


def longer_than_trained(n_positions: int, trained: float, length: int) -> str | None:
    """What to know of a text of ``length`` tokens if it is longer than what the model is made for.

    Args:
        n_positions: The training length.
        trained: The same times the interpolation in force.
        length: Prompt and continuation.
    """
    if length <= trained:
        return None
    factor = math.ceil(10 * length / n_positions) / 10
    return (
        f"the prompt and max_new_tokens make {length:,} tokens, more than the {trained:,.0f} that this model is made "
        f"for; the text gets better with context_scaling dynamic, or {factor:g}, which is faster"
    )


def write_text(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
