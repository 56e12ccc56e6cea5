"""All of `btlm data prepare`: text per second and core, and the memory of its largest worker as the corpus grows.

    python benchmarks/data_pipeline.py --input FILE ... [--copies 1 4 16] [--workers 2] [--repeats 1]

In a copy of the corpus, every word is changed (its letters are shifted in the alphabet), so that no document is a
duplicate of the original. Peak memory is that of a single worker, as Linux counts it (VmHWM), including imports.
Without ``--input`` the corpus is 32 MB of random words.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import psutil
from tiny_inputs import add_smoke, write_documents

from btlm.data.documents import Document, list_units, read_unit
from btlm.data.recipe import Read


def documents(inputs: list[str]) -> Iterator[Document]:
    """The documents of the corpus."""
    if inputs:
        for unit in list_units(inputs, Read())[0]:
            yield from (item for item in read_unit(unit, Read()) if isinstance(item, Document))
        return
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(20_000)]
    for i in range(5000):
        yield Document(" ".join(rng.choices(words, k=1000)), str(i), "words")


def write_copies(inputs: list[str], folder: Path, copies: int) -> int:
    """Write the corpus ``copies`` times, in Zstandard files of at most 64 MB of text; returns the bytes of text."""
    import zstandard

    folder.mkdir()
    total = 0
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    for copy in range(copies):
        shifted = lower[copy:] + lower[:copy] + upper[copy:] + upper[:copy]
        table = str.maketrans(lower + upper, shifted)
        lines: list[bytes] = []
        size = parts = 0
        for text, id_, source in chain(documents(inputs), [Document("", "", "")]):
            if size > 64e6 or not source:
                compressed = zstandard.compress(b"".join(lines), 1)
                (folder / f"{copy:02d}-{parts:02d}.jsonl.zst").write_bytes(compressed)
                lines, size, parts = [], 0, parts + 1
            record = {"text": text.translate(table), "id": f"{copy}/{id_}", "source": source}
            lines.append(json.dumps(record).encode() + b"\n" if source else b"")
            size += len(text)
            total += len(text.encode())
    return total


def run(corpus: Path, output: Path, workers: int) -> tuple[float, int]:
    """Seconds, and peak resident bytes of the largest worker process."""
    command = [sys.executable, "-m", "btlm", "data", "prepare", str(corpus), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen([*command, f"--workers={workers}"], stderr=subprocess.DEVNULL, env=environment)
    peak = 0
    while process.poll() is None:
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error, OSError):
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                        peak = max(peak, 1024 * int(found[1]))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; run it by itself to see why.")
    return seconds, peak


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=[], help="documents, as for btlm data prepare")
    parser.add_argument("--copies", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.copies, args.workers, args.repeats = [2], 1, 1
    print("| copies | MB of text | workers | s | MB/s per core | largest worker, MB |\n|---|---|---|---|---|---|")
    for copies in args.copies:
        with tempfile.TemporaryDirectory() as folder:
            if args.smoke:
                args.input = [str(write_documents(Path(folder)))]
            size = write_copies(args.input, Path(folder) / "corpus", copies)
            runs = []
            for _ in range(args.repeats):
                runs.append(run(Path(folder) / "corpus", Path(folder) / "out", args.workers))
                shutil.rmtree(Path(folder) / "out")
        seconds = statistics.median(seconds for seconds, _ in runs)
        rate = size / 1e6 / seconds / args.workers
        peak = max(peak for _, peak in runs) / 1e6
        print(
            f"| {copies} | {size / 1e6:,.1f} | {args.workers} | {seconds:.1f} | {rate:.2f} | {peak:,.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
