"""The stage `tokenize`: turns documents into token shards, in their order."""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btlm.model.architecture_btlm import END_OF_TEXT, TOKENIZER_FOLDER

from .parts import read_groups
from .shards import tokenizer_sha256, write_manifest, write_shard
from .stage import DOCUMENTS, Run, begin, finish, load_stage, stage_digest
from .tasks import run_tasks

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
    before = load_stage(source)
    key = {"tokenizer": tokenizer_sha256(), "input": stage_digest(source)}
    if begin(folder, "tokenize", key, run):
        return dict(load_stage(folder)["manifest"])
    splits: list[str] = before.get("splits") or ["train"] * len(before["parts"])
    numbers: dict[str, int] = {}
    shards: list[tuple[str, str]] = []
    for (part, _, _), split in zip(before["parts"], splits, strict=True):
        shards.append((part, f"{split}-{numbers.setdefault(split, 0):05d}"))
        numbers[split] += 1
    names = sorted(before["sources"])
    sizes = [size for _, _, size in before["parts"]]
    written = run_tasks(folder, "tokenize", partial(_tokenize_part, source, folder, shards, names), sizes, run)
    by_split: dict[str, list[Any]] = {}
    for split, shard in zip(splits, written, strict=True):
        by_split.setdefault(split, []).append(shard)
    manifest = write_manifest(folder, by_split, sources=names, extra={"history": before["history"]})
    finish(folder, {"manifest": manifest}, source)
    return manifest


def _tokenize_part(
    source: Path,
    folder: Path,
    shards: list[tuple[str, str]],
    sources: list[str],
    task: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    part, name = shards[task]
    numbers = {source_name: number for number, source_name in enumerate(sources)}

    def documents() -> Iterator[tuple[NDArray[np.uint32], int, int]]:
        for group in read_groups(source / DOCUMENTS / part, ["text", "source", "bytes"]):
            for text, source_name, size in zip(*(column.to_pylist() for column in group.columns), strict=True):
                yield encode(text), numbers[source_name], size
                advance(size)

    return write_shard(folder, name, documents())


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
