"""Text of a prompt and of its continuation, without torch."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer


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
    last character lacks. At such a boundary byte-level BPE decodes each side for itself.

    Args:
        decode: Ids to text, without special tokens.
        write: Receives the pieces.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self.decode = decode
        self.write = write
        self.waiting: list[int] = []

    def put(self, ids: list[int]) -> None:
        """Take the next ids."""
        self.waiting += ids
        text = self.decode(self.waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.waiting.clear()
            self.write(text)

    def end(self) -> None:
        """Write what is left, which may be part of a character."""
        if self.waiting:
            self.write(self.decode(self.waiting))
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
        f"the prompt and --max-new-tokens make {length:,} tokens, more than the {trained:,.0f} that this model is made "
        f"for; the text gets better with --context-scaling dynamic, or --context-scaling {factor:g} which is faster"
    )


def name_of(model: Path | str) -> str:
    """What messages call a model."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def write_text(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
