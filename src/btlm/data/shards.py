"""Token shards: one uint16 stream a source, documents ended by end-of-text, and a manifest that describes them.

A shard is cut into rows of any length when it is read: :meth:`TokenShards.rows` gives the order of a whole run.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .documents import Document

END_OF_TEXT = 50256
MANIFEST = "manifest.json"


def write_shards(
    documents: Iterable[Document], folder: Path | str, tokenizer: Tokenizer, *, holdout: float = 0.01, batch: int = 256
) -> dict[str, Any]:
    """Tokenize documents into ``folder``: a training and a held-out stream for every source.

    Line ends become ``\\n`` and exact copies of a document are dropped. The held-out documents of a source are those
    with the smallest SHA-256, at least one, so that the choice depends on neither their order nor a seed. A special
    token that a text spells out is encoded as text.

    Args:
        documents: With their sources.
        folder: Must not exist; appears when it is complete.
        tokenizer: With a vocabulary below 65,536.
        holdout: Share of the documents of each source to hold out.
        batch: Documents encoded at a time.

    Returns:
        The manifest.

    Raises:
        ValueError: ``folder`` exists, there are no documents, or the name of a source is no file name.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; give a new folder or remove it.")
    by_source: dict[str, dict[bytes, str]] = {}
    for document in documents:
        text = document.text.replace("\r\n", "\n")
        by_source.setdefault(document.source, {})[hashlib.sha256(text.encode()).digest()] = text
    if not by_source:
        raise ValueError("The input holds no documents.")
    if bad := sorted(source for source in by_source if Path(source).name != source):
        raise ValueError(f"{', '.join(map(repr, bad))}: not usable in a file name; rename the source.")
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.encode_special_tokens = True
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest: dict[str, Any] = {
        "tokenizer_sha256": tokenizer_sha256,
        "holdout": holdout,
        "sources": {},
    }
    for source, texts in sorted(by_source.items()):
        order = sorted(texts)
        held_out = max(1, round(len(order) * holdout)) if holdout else 0
        entry = {}
        for split, digests in (("valid", order[:held_out]), ("train", order[held_out:])):
            with (partial / f"{source}.{split}.bin").open("wb") as file:
                for start in range(0, len(digests), batch):
                    for encoding in tokenizer.encode_batch_fast([texts[d] for d in digests[start : start + batch]]):
                        np.array([*encoding.ids, END_OF_TEXT], dtype=np.uint16).tofile(file)
                tokens = file.tell() // 2
            size = sum(len(texts[d].encode()) for d in digests)
            entry[split] = {"documents": len(digests), "bytes": size, "tokens": tokens}
        manifest["sources"][source] = entry
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    partial.rename(folder)
    return manifest


class TokenShards:
    """Shards on disk, memory-mapped.

    Args:
        folder: What :func:`write_shards` wrote.

    Raises:
        ValueError: The folder has no manifest, or a shard does not have the length that the manifest gives.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds no {MANIFEST}; write shards into it first.")
        self.manifest = json.loads((folder / MANIFEST).read_text())
        self.sources = sorted(self.manifest["sources"])
        self._tokens: dict[tuple[str, str], NDArray[np.uint16]] = {}
        for source, splits in self.manifest["sources"].items():
            for split, counts in splits.items():
                file = folder / f"{source}.{split}.bin"
                if not file.exists() or file.stat().st_size != 2 * counts["tokens"]:
                    raise ValueError(f"{file} is missing or does not hold {counts['tokens']} tokens; write it again.")
                if counts["tokens"]:
                    self._tokens[source, split] = np.memmap(file, dtype=np.uint16, mode="r")

    def tokens(self, source: str, split: str) -> NDArray[np.uint16]:
        """The whole stream of a source, uint16 ``[tokens]``."""
        return self._tokens.get((source, split), np.empty(0, dtype=np.uint16))

    def rows(
        self, stages: Iterable[tuple[int, int]], weights: Mapping[str, float], seed: int
    ) -> list[NDArray[np.int64]]:
        """Which rows each stage of a run reads, in order; no token is read twice in the run.

        The streams are cut into units of the longest row, shuffled within their source. Stages take units in turn, a
        source's share by its weight, cut them into their own rows and shuffle these over all sources.

        Args:
            stages: ``(sequence_length, tokens)`` of each; lengths must divide the longest one.
            weights: Relative share of tokens for each source.
            seed: Of all shuffles.

        Returns:
            For each stage, int64 ``[rows, 2]`` of source index (in ``sources``) and offset of the first token.

        Raises:
            ValueError: A source is unknown or has fewer tokens than its share, or a length does not divide the longest.
        """
        stages = list(stages)
        if unknown := sorted(set(weights) - set(self.sources)):
            raise ValueError(
                f"No source named {', '.join(unknown)} in the shards; they have {', '.join(self.sources)}."
            )
        unit = max(length for length, _ in stages)
        if uneven := sorted({length for length, _ in stages if unit % length}):
            raise ValueError(f"Rows of {unit} tokens cannot be cut into rows of {', '.join(map(str, uneven))}.")
        rng = np.random.default_rng(seed)
        order = {source: rng.permutation(len(self.tokens(source, "train")) // unit) for source in self.sources}
        taken = dict.fromkeys(self.sources, 0)
        total_weight = sum(weights.values())
        result = []
        for length, tokens in stages:
            parts = []
            shares = [tokens / length * weights.get(source, 0.0) / total_weight for source in self.sources]
            counts = [round(share) for share in shares]
            # Where rounding leaves the stage short, those that it cut most have one row more.
            by_cut = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
            for index in by_cut[: max(0, tokens // length - sum(counts))]:
                counts[index] += 1
            for index, (source, num_rows) in enumerate(zip(self.sources, counts, strict=True)):
                num_units = -(-num_rows * length // unit)
                if taken[source] + num_units > len(order[source]):
                    raise ValueError(
                        f"{source} has {len(order[source]) * unit:,} training tokens, fewer than its share of the run; "
                        "lower its weight or the tokens of the stages."
                    )
                units = order[source][taken[source] : taken[source] + num_units]
                taken[source] += num_units
                offsets = (units[:, None] * unit + np.arange(0, unit, length)).reshape(-1)
                offsets = rng.permutation(offsets)[:num_rows]
                parts.append(np.stack([np.full_like(offsets, index), offsets], axis=1))
            result.append(rng.permutation(np.concatenate(parts)))
        return result

    def batch(self, rows: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Training rows, int64 ``[rows, length]``."""
        streams = [self.tokens(self.sources[source], "train")[start : start + length] for source, start in rows]
        return np.stack(streams).astype(np.int64)
