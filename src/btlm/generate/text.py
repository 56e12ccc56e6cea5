"""Text of a prompt and of its continuation, without torch."""

import sys
from collections.abc import Sequence

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
    """Makes text of token ids, as soon as it ends in a whole character.

    Transformers' ``TextStreamer`` holds text back until the next space; here a piece waits only for the bytes that its
    last character lacks.

    Args:
        tokenizer: Decodes the ids; special tokens are skipped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.waiting: list[int] = []

    def put(self, ids: list[int]) -> str:
        """The text that is known with the next ids, often none."""
        self.waiting += ids
        piece = self.stream.step(self.tokenizer, ids)
        if piece is not None:
            self.waiting.clear()
        return piece or ""

    def end(self) -> str:
        """What is left, which may be part of a character."""
        waiting, self.waiting = self.waiting, []
        return self.tokenizer.decode(waiting, skip_special_tokens=True) if waiting else ""


class StopStrings:
    """Passes text on up to the first of some texts that end it.

    Args:
        stop: The texts.

    Attributes:
        found: The text that was found, if any.

    Raises:
        ValueError: One of them is empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ValueError("A stop text is empty; give texts of at least one character.")
        self.stop = tuple(stop)
        self.found: str | None = None
        self._held = ""

    def pass_on(self, piece: str) -> str:
        """The text that is surely not part of a stop text, with the next piece; nothing once one was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        places = [(place, stop) for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            end, self.found = min(places)
        else:  # hold back the longest end that may be the beginning of a stop text
            end = next((i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self.stop)), len(text))
        self._held = "" if places else text[end:]
        return text[:end]

    def end(self) -> str:
        """What was held back and is not part of a stop text."""
        held, self._held = self._held, ""
        return held


def longer_than_trained(trained: float, length: int) -> str | None:
    """What to know of a text of ``length`` tokens if it is longer than what the model is made for.

    Args:
        trained: The training length times the interpolation in force.
        length: Prompt and continuation.
    """
    if length <= trained:
        return None
    return (
        f"the prompt and max_new_tokens make {length:,} tokens, more than the {trained:,.0f} that this model is made "
        "for, so the text may get worse; context_scaling (dynamic, or a factor) helps some models and harms others"
    )


def write_text(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
