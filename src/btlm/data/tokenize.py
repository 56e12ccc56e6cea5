"""The stage `tokenize`: turns documents into token shards, in their order."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btlm.model.architecture_btlm import END_OF_TEXT, TOKENIZER_FOLDER

from .parts import read_groups, rows_of
from .shards import tokenizer_sha256, write_manifest, write_shard
from .stage import Documents, Run, begin, finish, load_stage, stage_digest
from .tasks import Advance, run_tasks

# How GPT-2 splits text before byte-pair encoding, in tiktoken's form, which avoids backtracking.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def tokenize(source: Path, folder: Path, run: Run) -> dict[str, Any]:
    """Write one shard per part of the previous stage, then the manifest.

    Args:
        source: Folder of the previous stage. If it was not mixed, all documents belong to the split ``train``.
        folder: Folder that receives the shards.
        run: How to execute the tasks.

    Returns:
        The manifest; its ``history`` holds the settings and counts of the earlier stages.
    """
    before = Documents(source)
    key = {"tokenizer": tokenizer_sha256(), "input": stage_digest(source)}
    if begin(folder, "tokenize", key, run):
        return dict(load_stage(folder)["manifest"])
    splits: list[str] = before.stage.get("splits") or ["train"] * len(before.names)
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    shards = [f"{split}-{next(numbers[split]):05d}" for split in splits]
    sources = sorted(before.stage["sources"])
    task = partial(_tokenize_part, before, folder, shards, sources)
    written = run_tasks(folder, "tokenize", task, before.sizes, run)
    by_split: dict[str, list[Any]] = {}
    for split, shard in zip(splits, written, strict=True):
        by_split.setdefault(split, []).append(shard)
    manifest = write_manifest(folder, by_split, sources, extra={"history": before.stage["history"]})
    finish(folder, {"manifest": manifest}, source)
    return manifest


def _tokenize_part(
    before: Documents, folder: Path, shards: list[str], sources: list[str], task: int, advance: Advance
) -> dict[str, Any]:
    numbers = {source: number for number, source in enumerate(sources)}

    def documents() -> Iterator[tuple[NDArray[np.uint32], int, int]]:
        for group in read_groups(before.path(task), ["text", "source", "bytes"]):
            for text, source, size in rows_of(group, "text", "source", "bytes"):
                yield encode(text), numbers[source], size
                advance(size)

    return write_shard(folder, shards[task], documents())


def encode(text: str) -> NDArray[np.uint32]:
    """Token ids of a text, uint32 ``[tokens]``; ``<|endoftext|>`` in the text is encoded as ordinary text."""
    try:
        tokens: NDArray[np.uint32] = _encoding().encode_to_numpy(text, disallowed_special=())
    except ValueError:  # a run of white space so long that tiktoken's regular expressions give up
        tokens = np.array(_slow_encoding().encode(text).ids, dtype=np.uint32)
    return tokens


def decode(tokens: NDArray[np.unsignedinteger[Any]]) -> str:
    """The text of token ids; incomplete characters become U+FFFD."""
    return str(_encoding().decode(tokens.tolist()))


@cache
def _encoding() -> Any:
    """The bundled vocabulary in tiktoken, which gives the same ids as tokenizers and is several times as fast."""
    import tiktoken

    # The vocabulary writes bytes that are not printable characters of Latin-1 as the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = json.loads((TOKENIZER_FOLDER / "vocab.json").read_text(encoding="utf-8"))
    end_of_text = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
    # GPT-2 numbered its tokens in the order in which they are merged.
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding("gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=end_of_text)


@cache
def _slow_encoding() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    return ByteLevelBPETokenizer.from_file(str(TOKENIZER_FOLDER / "vocab.json"), str(TOKENIZER_FOLDER / "merges.txt"))
