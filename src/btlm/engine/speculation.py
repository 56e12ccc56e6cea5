"""Guesses of the next tokens, found by looking for the last ones earlier in the request (prompt-lookup decoding)."""

from collections.abc import Sequence

import numpy as np

_LONGEST = 4  # tokens to look for; if they are not found, fewer are
_SHORTEST = 2
_MEMORY = 0.9  # weight of the past in the running share of right guesses
_ENOUGH = 0.15  # below this share guessing costs more than it saves; measured by benchmarks/engine.py
_TRY_AGAIN = 32  # tokens until guessing is tried again


class PromptLookup:
    """Guesses for one request, and how often they were right.

    Args:
        most: Tokens per guess at most; 0 turns guessing off.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.accepted = self.guessed = 0
        self._share = 0.5
        self._pause = 0

    def guess(self, ids: Sequence[int]) -> list[int]:
        """Guess the tokens that follow ``ids``; at most ``most``, often none."""
        if self.most == 0:
            return []
        if self._pause:
            self._pause -= 1
            return []
        tokens = np.asarray(ids, np.int64)
        for size in range(min(_LONGEST, len(tokens) - 1), _SHORTEST - 1, -1):
            last = tokens[-size:]
            starts = np.flatnonzero(tokens[: len(tokens) - size] == last[0])
            for i in range(1, size):
                starts = starts[tokens[starts + i] == last[i]]
            if len(starts):
                after = int(starts[-1]) + size
                guess: list[int] = tokens[after : after + self.most].tolist()
                return guess
        return []

    def learn(self, guessed: int, accepted: int) -> None:
        """Record how many tokens of a guess were right."""
        if not guessed:
            return
        self.guessed += guessed
        self.accepted += accepted
        self._share = _MEMORY * self._share + (1 - _MEMORY) * accepted / guessed
        if self._share < _ENOUGH:
            self._share, self._pause = 2 * _ENOUGH, _TRY_AGAIN
