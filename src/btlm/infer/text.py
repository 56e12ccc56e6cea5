"""Between text and token ids, without torch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .shape import Shape


def open_tokenizer(name_or_path: Path | str, folder: Path, shape: Shape) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        name_or_path: What the user calls the checkpoint.
        folder: Where it lies.
        shape: Of its network.

    Raises:
        ValueError: It has none, or one with more tokens than its vocabulary.
    """
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception:  # the library raises bare exceptions; the slower way below names the problem
            tokenizer = None
    if tokenizer is None or tokenizer.get_vocab_size() > shape.vocab_size:
        from .load import load_config, load_tokenizer_of

        loaded: Any = load_tokenizer_of(folder, load_config(folder), name_or_path)
        tokenizer = loaded.backend_tokenizer
        assert isinstance(tokenizer, Tokenizer)
    return tokenizer


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
