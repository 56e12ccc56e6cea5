"""Bytes and names of tokens. A token may be part of a character, so that only bytes tell exactly what it is."""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from btlm.errors import NotSupported


class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer: A byte-level tokenizer, such as GPT-2's.
        size: Number of tokens of the model; those that the tokenizer lacks stand for nothing.

    Attributes:
        bytes: Bytes of each token; those of a special token are its name.
        special: Tokens that are no text.

    Raises:
        NotSupported: The tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        content = json.loads(tokenizer.to_str())
        if (content["decoder"] or {}).get("type") != "ByteLevel":
            raise NotSupported("The server needs a byte-level tokenizer, such as GPT-2's; this one is of another kind.")
        self.tokenizer, self.size = tokenizer, size
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, what in added.items() if what.special)
        byte_of = _byte_of_letter()
        self.bytes = [b""] * size
        for name, token in tokenizer.get_vocab().items():
            self.bytes[token] = name.encode() if token in added else bytes(byte_of[letter] for letter in name)
        self.longest = max(map(len, self.bytes))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts; names of special tokens in them stand for these tokens. Other threads go on meanwhile."""
        # Unlike `encode`, this gives up the lock of the interpreter.
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in found]

    def text(self, ids: Iterable[int]) -> str:
        """Text of token ids, with the names of special tokens."""
        return b"".join(self.bytes[token] for token in ids).decode(errors="replace")

    def split(self, ids: Iterable[int]) -> tuple[str, bytes]:
        """Text of token ids as far as its characters are whole, and the bytes behind it that begin another one."""
        decoder = getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(self.bytes[token] for token in ids))
        return text, decoder.getstate()[0]

    def written(self, token: int) -> bytes:
        """What a token adds to a text that is written: special tokens add nothing."""
        return b"" if token in self.special else self.bytes[token]

    def name(self, token: int) -> str:
        r"""A token as it is named beside its log-probability: its text, or ``bytes:\xe2\x80`` for part of a character.

        This is how OpenAI's API names them; no two tokens of a vocabulary have the same name.
        """
        content = self.bytes[token]
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def can_fit(self, text: str, tokens: int) -> bool:
        """Whether a text may have at most a number of tokens, judged without encoding it."""
        return len(text) <= tokens * self.longest


def _byte_of_letter() -> dict[str, int]:
    """The bytes that the letters of byte-level vocabularies stand for.

    Bytes that are visible in Latin-1 stand for themselves; the others have the letters from 256 on, in their order.
    """
    alphabet = ByteLevel.alphabet()
    themselves = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}
    others = [byte for byte in range(256) if byte not in themselves.values()]
    return {**themselves, **{chr(256 + i): byte for i, byte in enumerate(others)}}
