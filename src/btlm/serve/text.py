"""Tokens to text, each token with its place, as far as the text is sure."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import NamedTuple

from btlm.engine.request import Token
from btlm.generate.text import StopStrings

from .vocabulary import Vocabulary

_Decoder = getincrementaldecoder("utf-8")


class Placed(NamedTuple):
    """A token and where it stands.

    Args:
        token: What the engine told.
        scored: Whether its log-probability is known; that of the very first token is not.
        start, end: Number of characters of the text before it, and with it.
    """

    token: Token
    scored: bool
    start: int
    end: int


class Continuation:
    """Makes text of the tokens of a continuation.

    A piece of text is passed on when its last character is whole and it surely is not part of a stop text; a token is
    passed on with the last piece of its text.

    Args:
        vocabulary: Bytes of tokens.
        stop: Texts that end it, which are not part of it.
        start: Number of characters before it.
        begun: Bytes before it that begin a character, which its own ones go on with.

    Attributes:
        num_tokens: Tokens so far, up to the one that completed a stop text.
        stopped: Whether a stop text was found.
        total: Sum of the log-probabilities of these tokens.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str], start: int = 0, begun: bytes = b"") -> None:
        self._vocabulary, self._stop = vocabulary, StopStrings(stop)
        self._decoder = _Decoder("replace")
        self._decoder.decode(begun)
        self._decoded = self._passed = start
        self._held: list[Placed] = []
        self._text = ""
        self.num_tokens = 0
        self.total = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found."""
        return self._stop.found is not None

    def add(self, token: Token) -> None:
        """Add a token; nothing happens after a stop text."""
        if self.stopped:
            return
        self.num_tokens += 1
        self.total += token.logprob
        start = self._decoded
        piece = self._decoder.decode(self._vocabulary.written(token.id))
        self._decoded += len(piece)
        self._held.append(Placed(token, True, start, self._decoded))
        self._pass_on(self._stop.pass_on(piece))

    def end(self) -> None:
        """No token follows."""
        self._pass_on(self._stop.pass_on(self._decoder.decode(b"", final=True)))
        self._pass_on(self._stop.end())

    def take(self, last: bool = False) -> tuple[str, list[Placed]]:
        """What became sure since the last call.

        Args:
            last: Whether it has ended. The token in which a stop text begins is passed on, too, if some of its text is.
        """
        text, self._text = self._text, ""
        sure = 0
        for placed in self._held:
            inside = placed.start < self._passed or placed.start == placed.end == self._passed
            if not (inside if last else placed.end <= self._passed):
                break
            sure += 1
        tokens, self._held = self._held[:sure], self._held[sure:]
        return text, tokens

    def _pass_on(self, text: str) -> None:
        self._text += text
        self._passed += len(text)


def placed_prompt(
    vocabulary: Vocabulary, ids: Sequence[int], scores: Sequence[Token], *, ends: bool = True
) -> list[Placed]:
    """The tokens of a prompt with their places.

    Args:
        vocabulary: Bytes of tokens.
        ids: The prompt.
        scores: Its tokens after the first one.
        ends: Whether the text ends with it, so that a character that it only begins is shown, too.
    """
    decoder, decoded, placed = _Decoder("replace"), 0, []
    for i, token in enumerate(ids):
        start = decoded
        decoded += len(decoder.decode(vocabulary.bytes[token], final=ends and i == len(ids) - 1))
        placed.append(Placed(scores[i - 1] if i else Token(token, 0.0), i > 0, start, decoded))
    return placed
