"""Batches from token shards: this package's loader against two plain ways to read the same files at random.

    python benchmarks/token_loader.py [--tokens 64_000_000] [--lengths 2048 8192] [--repeats 7] [--folder DIR]

Writes four shards of random documents of 1,000 tokens on average, and reads all tokens in batches of 524,288, int64, on
one thread from files in the page cache:

- loader: :class:`btlm.data.loader.TokenLoader`; and with document ids;
- memmap: ``get_batch`` of nanoGPT without its targets: rows at random offsets of one memory-mapped file;
- datatrove: ``DatatroveFolderDataset`` in torch's ``DataLoader`` with ``shuffle=True``, in this process.

All take turns, A B C D A B C D. Prints medians, and the medians of the ratios of each turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tiny_inputs import add_smoke
from torch import Tensor

from btlm.data.loader import TokenLoader
from btlm.data.shards import TokenShards, write_manifest, write_shard

BATCH_TOKENS = 524_288


class Stage(NamedTuple):
    """Rows of one length."""

    sequence_length: int
    batch_tokens: int
    tokens: int


def write(folder: Path, num_tokens: int) -> None:
    """Write four shards of documents whose lengths have an exponential distribution."""
    rng = np.random.default_rng(0)

    def documents() -> Iterator[tuple[np.ndarray, int, int]]:
        left = num_tokens // 4
        while left > 0:
            ids = rng.integers(0, 50256, min(left, 1 + int(rng.exponential(1000))) - 1, dtype=np.uint16)
            left -= len(ids) + 1
            yield ids, 0, 4 * len(ids)

    shards = {"train": [write_shard(folder, f"train-{i:05d}", documents()) for i in range(4)]}
    write_manifest(folder, shards, ["random"])
    with (folder / "joined").open("wb") as joined:
        for shard in shards["train"]:
            joined.write((folder / f"{shard['name']}.bin").read_bytes())


def loader(folder: Path, length: int, num_tokens: int, document_ids: bool = False) -> Iterator[Tensor]:
    """Batches of this package's loader."""
    stages = [Stage(length, BATCH_TOKENS, num_tokens)]
    for batch in TokenLoader(TokenShards(folder, verify=False), stages, seed=1, document_ids=document_ids):
        yield torch.from_numpy(batch.input_ids)


def memmap(folder: Path, length: int, num_tokens: int) -> Iterator[Tensor]:
    """Batches as nanoGPT's ``train.py`` reads them."""
    for _ in range(num_tokens // BATCH_TOKENS):
        data = np.memmap(folder / "joined", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - length, (BATCH_TOKENS // length,))
        yield torch.stack([torch.from_numpy((data[i : i + length]).astype(np.int64)) for i in ix])


def datatrove(folder: Path, length: int, num_tokens: int) -> Iterator[Tensor]:
    """Batches from datatrove's data set for torch, whose rows are one token longer than asked for."""
    from datatrove.utils.dataset import DatatroveFolderDataset

    rows = DatatroveFolderDataset(str(folder), length - 1, "*.bin")
    batches = iter(torch.utils.data.DataLoader(rows, BATCH_TOKENS // length, shuffle=True))
    for _ in range(num_tokens // BATCH_TOKENS):
        yield next(batches)["input_ids"]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write the shards during the run")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.lengths, args.repeats = 4 * BATCH_TOKENS, [2048], 1
    torch.set_num_threads(1)
    forms: dict[str, Callable[[Path, int, int], Iterator[Tensor]]] = {
        "loader": loader,
        "loader, document ids": lambda folder, length, count: loader(folder, length, count, document_ids=True),
        "memmap": memmap,
        "datatrove": datatrove,
    }
    print(f"torch {torch.__version__}, NumPy {np.__version__}, datatrove {version('datatrove')}, ", end="")
    print(f"{args.tokens:,} tokens, medians of {args.repeats}\n")
    print("| tokens per row | read by | M tokens/s | time to the loader's |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        write(Path(name), args.tokens)
        # The last batch is not read, since datatrove drops the remainder of each file.
        num_tokens = (args.tokens // BATCH_TOKENS - 1) * BATCH_TOKENS
        for length in args.lengths:
            seconds: dict[str, list[float]] = {form: [] for form in forms}
            for _ in range(args.repeats):
                for form, read in forms.items():
                    started = time.perf_counter()
                    total = sum(batch.numel() for batch in read(Path(name), length, num_tokens))
                    seconds[form].append(time.perf_counter() - started)
                    assert total == num_tokens
            for form, taken in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(taken, seconds["loader"], strict=True))
                speed = num_tokens / statistics.median(taken) / 1e6
                print(f"| {length:,} | {form} | {speed:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
