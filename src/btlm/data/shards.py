"""Token shards: streams of uint16 tokens on disk, from which rows of any length are read.

A folder holds for each shard of a split:

- ``{split}-{index:05d}.bin``: uint16 little-endian tokens, every document followed by end-of-text;
- ``{split}-{index:05d}.offsets.npy``: int64 ``[documents + 1]``, start of each document, then the end of the last;
- ``{split}-{index:05d}.sources.npy``: uint16 ``[documents]``, index of each document's source in the manifest's
  ``sources``;

and ``manifest.json``, written last. The stream of a split is the concatenation of its shards in the manifest's order.
Workers of the data pipeline import this module, so it imports neither torch nor Transformers.
"""

import hashlib
import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from btlm.files import file_sha256, whole_file, write_json
from btlm.model.architecture_btlm import END_OF_TEXT_ID, TOKENIZER_FOLDER, VOCAB_SIZE
from btlm.settings import did_you_mean_path

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
MAX_SOURCES = 2**16

# Every open map takes a file descriptor, and a process may have 1024 by default.
_OPEN_MAPS = 512
_NPY_HEADER = 128
_COUNTS = ("documents", "bytes", "tokens")


def tokenizer_sha256() -> str:
    """SHA-256 of the bytes of the bundled ``vocab.json`` and ``merges.txt``."""
    files = [TOKENIZER_FOLDER / name for name in ("vocab.json", "merges.txt")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write_shard(folder: Path | str, name: str, documents: Iterable[tuple[ArrayLike, int, int]]) -> dict[str, Any]:
    """Write one shard. Its files appear only when complete; the same documents give the same bytes.

    Args:
        folder: An existing folder.
        name: Name of the shard, ``{split}-{index:05d}``.
        documents: For each document, its token ids without end-of-text ``[tokens]``, the index of its source, and its
            bytes of text.

    Returns:
        The entry for :func:`write_manifest`: name, documents, bytes, tokens, SHA-256 by suffix, and the counts per
        source, by its index (a string, as in JSON).
    """
    folder = Path(folder)
    offsets, source_of = [0], []
    sources: dict[str, dict[str, int]] = {}
    digest = hashlib.sha256()
    with whole_file(folder / f"{name}.bin") as partial, partial.open("wb") as file:
        for ids, source, size in documents:
            tokens = np.append(np.asarray(ids), END_OF_TEXT_ID)
            assert (tokens[:-1] < END_OF_TEXT_ID).all(), "a document holds end-of-text, or ids beyond the vocabulary"
            content = tokens.astype("<u2").tobytes()
            file.write(content)
            digest.update(content)
            offsets.append(offsets[-1] + len(tokens))
            source_of.append(source)
            counts = sources.setdefault(str(source), dict.fromkeys(_COUNTS, 0))
            counts["documents"] += 1
            counts["bytes"] += size
            counts["tokens"] += len(tokens)
    sha256 = {".bin": digest.hexdigest()}
    arrays = {".offsets.npy": np.array(offsets, "<i8"), ".sources.npy": np.array(source_of, "<u2")}
    for suffix, array in arrays.items():
        np.save(buffer := io.BytesIO(), array)
        sha256[suffix] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        with whole_file(folder / f"{name}{suffix}") as partial:
            partial.write_bytes(buffer.getbuffer())
    return {"name": name, **_total([*sources.values()]), "sha256": sha256, "sources": sources}


def write_manifest(
    folder: Path | str,
    shards: Mapping[str, Sequence[Mapping[str, Any]]],
    sources: Sequence[str],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest, which makes a folder of shards complete.

    Args:
        folder: Folder that holds the shards.
        shards: Results of :func:`write_shard` per split, in the order of the stream.
        sources: Names of the sources, by index.
        extra: Further keys of the manifest.

    Returns:
        The manifest.
    """
    splits: dict[str, Any] = {}
    for split, entries in shards.items():
        by_source = {
            source: _total([entry["sources"].get(str(index), {}) for entry in entries])
            for index, source in enumerate(sources)
        }
        kept = [{key: value for key, value in entry.items() if key != "sources"} for entry in entries]
        splits[split] = {**_total(entries), "sources": by_source, "shards": kept}
    manifest = {
        "format": FORMAT,
        "dtype": "uint16",
        "tokenizer": {"sha256": tokenizer_sha256(), "vocab_size": VOCAB_SIZE, "end_of_text": END_OF_TEXT_ID},
        "sources": list(sources),
        "splits": splits,
        **(extra or {}),
    }
    write_json(Path(folder) / MANIFEST, manifest, indent=2)
    return manifest


class TokenShards:
    """The streams of a folder of shards, memory-mapped.

    Args:
        folder: Folder that :func:`write_shard` and :func:`write_manifest` wrote.
        verify: Whether to read every file once and compare its SHA-256.

    Raises:
        ValueError: A file is missing, damaged, of another format or of another tokenizer; the message names it.
    """

    def __init__(self, folder: Path | str, verify: bool = True) -> None:
        self._folder = Path(folder)
        self.manifest = _read_manifest(self._folder / MANIFEST)
        self.sources: list[str] = self.manifest["sources"]
        self._shards: dict[str, list[dict[str, Any]]] = {}
        self._starts: dict[str, list[int]] = {}
        for split, content in self.manifest["splits"].items():
            self._shards[split] = [shard for shard in content["shards"] if shard["tokens"]]
            self._starts[split] = list(accumulate((shard["tokens"] for shard in self._shards[split]), initial=0))
        self._map: Callable[[str], NDArray[Any]] = lru_cache(_OPEN_MAPS)(self._open)
        self._check(verify)

    def num_tokens(self, split: str) -> int:
        """Number of tokens of a split; 0 if there is no such split."""
        return self._starts.get(split, [0])[-1]

    def fingerprint(self, split: str) -> str:
        """SHA-256 that identifies the tokens and the documents of a split."""
        parts = [
            shard["sha256"][suffix] for shard in self._shards.get(split, []) for suffix in (".bin", ".offsets.npy")
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def tokens(self, split: str, start: int, count: int) -> NDArray[np.uint16]:
        """``count`` tokens of the stream from ``start``, uint16 ``[tokens]``; fewer if the stream ends before."""
        count = max(0, min(count, self.num_tokens(split) - start))
        row: NDArray[np.uint16] = self.rows(split, np.array([start]), count)[0]
        return row

    def rows(self, split: str, offsets: NDArray[np.int64], length: int) -> NDArray[np.uint16]:
        """Rows of the stream, which is read cyclically.

        Args:
            split: A split that has tokens.
            offsets: Start of each row in the stream, int64 ``[rows]``, below the number of tokens of the split.
            length: Tokens per row.

        Returns:
            uint16 ``[rows, length]``.
        """
        result = np.empty((len(offsets), length), dtype=np.uint16)
        for row, offset in zip(result, offsets.tolist(), strict=True):
            done = 0
            for shard, start, stop in self._spans(split, offset, length):
                row[done : done + stop - start] = self._map(f"{shard['name']}.bin")[start:stop]
                done += stop - start
        return result

    def document_starts(self, split: str, start: int, count: int) -> NDArray[np.int64]:
        """Which of ``count`` tokens from ``start`` begin a document: positions from 0 to ``count - 1``, int64.

        The positions ascend. The stream is read cyclically, as in :meth:`rows`.
        """
        parts, done = [np.empty(0, dtype=np.int64)], 0
        for shard, first, stop in self._spans(split, start, count):
            offsets = self._map(f"{shard['name']}.offsets.npy")
            low, high = np.searchsorted(offsets, (first, stop))
            parts.append(offsets[low:high] - first + done)
            done += stop - first
        return np.concatenate(parts)

    def source_tokens(self, split: str, source: str, limit: int) -> NDArray[np.uint16]:
        """The first ``limit`` tokens of the documents of one source, in their order, uint16."""
        index = self.sources.index(source)
        parts, missing = [np.empty(0, dtype=np.uint16)], limit
        for shard in self._shards.get(split, []):
            offsets = self._map(f"{shard['name']}.offsets.npy")
            for document in np.flatnonzero(self._map(f"{shard['name']}.sources.npy") == index):
                if missing <= 0:
                    break
                tokens = self._map(f"{shard['name']}.bin")[offsets[document] : offsets[document + 1]]
                parts.append(tokens[:missing])
                missing -= len(parts[-1])
        return np.concatenate(parts)

    def _spans(self, split: str, start: int, count: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """The shards that a piece of the stream covers, with its start and stop in each."""
        shards, starts = self._shards.get(split, []), self._starts.get(split, [0])
        index = bisect_right(starts, start) - 1
        while count > 0:
            first = start - starts[index]
            stop = min(first + count, shards[index]["tokens"])
            yield shards[index], first, stop
            count -= stop - first
            index = (index + 1) % len(shards)
            start = starts[index]

    def _open(self, name: str) -> NDArray[Any]:
        path = self._folder / name
        opened = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, dtype="<u2", mode="r")
        return np.asarray(opened)  # Slicing a memmap takes four times as long as slicing an array.

    def _check(self, verify: bool) -> None:
        """Raise for the first file that is not what the manifest says."""
        sha256 = {}
        again = "copy the folder again, or tokenize the documents again"
        for shard in (shard for content in self.manifest["splits"].values() for shard in content["shards"]):
            sizes = {
                ".bin": 2 * shard["tokens"],
                ".offsets.npy": _NPY_HEADER + 8 * (shard["documents"] + 1),
                ".sources.npy": _NPY_HEADER + 2 * shard["documents"],
            }
            for suffix, size in sizes.items():
                path = self._folder / f"{shard['name']}{suffix}"
                if not path.exists():
                    raise ValueError(f"{path} is missing; {again}.")
                if path.stat().st_size != size:
                    raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}; {again}.")
                sha256[path] = shard["sha256"][suffix]
        if not verify:
            return
        with ThreadPoolExecutor() as pool:
            for (path, wanted), actual in zip(sha256.items(), pool.map(file_sha256, sha256), strict=True):
                if actual != wanted:
                    raise ValueError(f"{path} is damaged: its SHA-256 is {actual}, not {wanted}; {again}.")


# Helpers


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}{did_you_mean_path(path.parent, '*/') or '.'}")
    if not path.exists():
        near = next(path.parent.glob(f"*/{path.name}"), None)
        remedy = f": did you mean {near.parent}?" if near else "; tokenize documents into it first."
        raise ValueError(f"{path.parent} holds no {path.name}{remedy}")
    try:
        manifest = json.loads(path.read_bytes())
        version, tokenizer = manifest.get("format"), manifest.get("tokenizer", {}).get("sha256")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a manifest of token shards ({error}); tokenize the documents again."
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, but this version reads {FORMAT}; tokenize the documents again.")
    if tokenizer != tokenizer_sha256():
        raise ValueError(
            f"{path} was written with another tokenizer (SHA-256 {tokenizer}, BTLM's is {tokenizer_sha256()}); "
            "tokenize the documents with this version."
        )
    assert isinstance(manifest, dict)
    return manifest


def _total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(part.get(key, 0) for part in counts) for key in _COUNTS}
