"""Guessing the next tokens by looking for the last ones earlier in the text (prompt-lookup decoding)."""

from collections.abc import Sequence

import numpy as np

_LONGEST = 4  # tokens that are looked for; shorter runs are tried when the longer are not found
_SHORTEST = 2
_MEMORY = 0.9  # weight of the past in the share of guesses that were right
_ENOUGH = 0.15  # below that share guessing costs more than it brings; measured by benchmarks/engine.py
_TRY_AGAIN = 32  # tokens until it is tried again


class PromptLookup:
    """Guesses of one text, and how good they have been.

    Args:
        most: Tokens of one guess; 0 guesses nothing.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.accepted = self.guessed = 0
        self._share = 0.5
        self._pause = 0

    def guess(self, ids: Sequence[int]) -> list[int]:
        """What may follow a text."""
        if self.most == 0:
            return []
        if self._pause:
            self._pause -= 1
            return []
        text = np.asarray(ids, np.int64)
        for size in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
            last = text[-size:]
            starts = np.flatnonzero(text[: len(text) - size] == last[0])
            for i in range(1, size):
                starts = starts[text[starts + i] == last[i]]
            if len(starts):
                after = int(starts[-1]) + size
                guess: list[int] = text[after : after + self.most].tolist()
                return guess
        return []

    def learn(self, guessed: int, accepted: int) -> None:
        """Take note of how many tokens of a guess were right."""
        if not guessed:
            return
        self.guessed += guessed
        self.accepted += accepted
        self._share = _MEMORY * self._share + (1 - _MEMORY) * accepted / guessed
        if self._share < _ENOUGH:
            self._share, self._pause = 2 * _ENOUGH, _TRY_AGAIN
