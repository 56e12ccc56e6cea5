"""Real text as a stream of bytes, for experiments that train many small models on a CPU.

:class:`ByteStream` has the interface of :class:`btlm.data.TokenShards` that training needs. A token is a byte, and
end-of-text is number 256. Such a vocabulary puts the compute of a small model into its blocks, where muP and ALiBi act,
instead of into a head of 50,257 rows; and a loss in nats per token is one in nats per byte of text.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btlm.data.documents import Document, list_units, read_unit
from btlm.data.recipe import Read

END_OF_TEXT = 256
VOCAB_SIZE = 257
# One document in this many is held out, and at least one per source.
HELD_OUT_EVERY = 20


def token_bytes() -> NDArray[np.int64]:
    """Bytes of text per token: 1, and 0 for end-of-text."""
    sizes: NDArray[np.int64] = (np.arange(VOCAB_SIZE) != END_OF_TEXT).astype(np.int64)
    return sizes


class ByteStream:
    """The first documents of every source, in memory; whole documents are held out.

    Args:
        inputs: Files or folders, as ``btlm data prepare`` takes them.
        bytes_per_source: Bytes of text to read per source; the document that reaches this number is the last.
        seed: Seed of the order of the documents, in which all sources are mixed.

    Raises:
        ValueError: An input does not exist or is of no known kind, or a source has fewer than two documents.
    """

    def __init__(self, inputs: Iterable[Path | str], bytes_per_source: int, seed: int = 1) -> None:
        texts = _read(inputs, bytes_per_source)
        self.sources = sorted(texts)
        rng = np.random.default_rng(seed)
        documents: dict[str, list[tuple[int, bytes]]] = {"train": [], "validation": []}
        for index, source in enumerate(self.sources):
            if len(texts[source]) < 2:
                raise ValueError(f"{source} has fewer than two documents, one to train on and one to hold out.")
            shuffled = [texts[source][i] for i in rng.permutation(len(texts[source]))]
            for i, text in enumerate(shuffled):
                documents["train" if i % HELD_OUT_EVERY else "validation"].append((index, text))
        self._stream: dict[str, NDArray[np.uint16]] = {}
        self._starts: dict[str, NDArray[np.int64]] = {}
        self._source_of: dict[str, NDArray[np.int64]] = {}
        for split, content in documents.items():
            mixed = [content[i] for i in rng.permutation(len(content))]
            tokens = [np.append(np.frombuffer(text, np.uint8).astype(np.uint16), END_OF_TEXT) for _, text in mixed]
            self._stream[split] = np.concatenate(tokens).astype(np.uint16)
            self._starts[split] = np.cumsum([0, *map(len, tokens)])
            self._source_of[split] = np.array([source for source, _ in mixed])

    def num_tokens(self, split: str) -> int:
        """Tokens of a split."""
        return len(self._stream[split])

    def fingerprint(self, split: str) -> str:
        """SHA-256 of the stream of a split."""
        return hashlib.sha256(self._stream[split].tobytes()).hexdigest()

    def rows(self, split: str, offsets: NDArray[np.int64], length: int) -> NDArray[np.uint16]:
        """Rows of the stream, uint16 ``[rows, length]``, from offsets ``[rows]``; it is read cyclically."""
        rows: NDArray[np.uint16] = self._stream[split][(offsets[:, None] + np.arange(length)) % self.num_tokens(split)]
        return rows

    def tokens(self, split: str, start: int, count: int) -> NDArray[np.uint16]:
        """``count`` tokens of the stream from ``start``; fewer if the stream ends before."""
        return self._stream[split][start : start + count]

    def document_starts(self, split: str, start: int, count: int) -> NDArray[np.int64]:
        """Which of ``count`` tokens from ``start`` begin a document: ascending positions from 0 to ``count - 1``."""
        places = (start + np.arange(count)) % self.num_tokens(split)
        return np.flatnonzero(np.isin(places, self._starts[split]))

    def documents(self, split: str, source: str) -> list[NDArray[np.uint16]]:
        """The documents of one source, each with its end-of-text."""
        starts = self._starts[split]
        chosen = np.flatnonzero(self._source_of[split] == self.sources.index(source))
        return [self._stream[split][starts[i] : starts[i + 1]] for i in chosen]

    def source_tokens(self, split: str, source: str, limit: int) -> NDArray[np.uint16]:
        """The first ``limit`` tokens of the documents of one source."""
        return np.concatenate(self.documents(split, source))[:limit]


def _read(inputs: Iterable[Path | str], bytes_per_source: int) -> dict[str, list[bytes]]:
    """UTF-8 text of the first documents, by source; from each file, no more is read than a source may have."""
    read = Read()
    texts: dict[str, list[bytes]] = {}
    sizes: dict[str, int] = {}
    for unit in list_units(inputs, read)[0]:
        in_file = 0
        for document in read_unit(unit, read):
            if not isinstance(document, Document):
                continue
            text = document.text.encode()
            in_file += len(text)
            if sizes.get(document.source, 0) < bytes_per_source:
                texts.setdefault(document.source, []).append(text)
                sizes[document.source] = sizes.get(document.source, 0) + len(text)
            elif in_file >= bytes_per_source and len(unit.names) == 1:
                break
    return texts
