"""Token shards written by hand, byte for byte, so that tests know every token in them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from btlm.data.shards import TokenShards

TOKENIZER = Path(__file__).parents[2] / "src/btlm/model/tokenizer"


def write_documents(folder: Path, splits: Mapping[str, Sequence[Sequence[tuple[str, ArrayLike]]]]) -> TokenShards:
    """Write shards of documents, given by split and shard as a source and tokens; returns the opened shards."""
    folder.mkdir(parents=True)
    sources = sorted({source for shards in splits.values() for shard in shards for source, _ in shard})
    manifest: dict[str, Any] = {
        "format": 1,
        "tokenizer": {"sha256": hashlib.sha256(b"".join(map(Path.read_bytes, vocabulary_files()))).hexdigest()},
        "sources": sources,
        "splits": {},
    }
    for split, shards in splits.items():
        entries = []
        for index, documents in enumerate(shards):
            name = f"{split}-{index:05d}"
            tokens = [np.asarray(ids, dtype="<u2") for _, ids in documents]
            offsets = list(accumulate(map(len, tokens), initial=0))
            (folder / f"{name}.bin").write_bytes(b"".join(ids.tobytes() for ids in tokens))
            np.save(folder / f"{name}.offsets.npy", np.array(offsets, dtype=np.int64))
            np.save(folder / f"{name}.sources.npy", np.array([sources.index(s) for s, _ in documents], dtype=np.uint16))
            sha256 = {file.name.removeprefix(name): _sha256(file) for file in folder.glob(f"{name}.*")}
            entries.append({"name": name, "documents": len(tokens), "tokens": offsets[-1], "sha256": sha256})
        manifest["splits"][split] = {"shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenShards(folder)


def write_streams(folder: Path, streams: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> TokenShards:
    """Write one training and one held-out document per source, each in its own shard."""
    splits: dict[str, list[list[tuple[str, ArrayLike]]]] = {}
    for source, documents in streams.items():
        for split, document in zip(("train", "validation"), documents, strict=True):
            splits.setdefault(split, []).append([(source, document)] if np.size(document) else [])
    return write_documents(folder, splits)


def vocabulary_files() -> list[Path]:
    """The files that identify the tokenizer of shards."""
    return [TOKENIZER / "vocab.json", TOKENIZER / "merges.txt"]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
