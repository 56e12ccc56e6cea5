"""MinHash signatures per core: this package, datatrove's own stage, and datasketch as SlimPajama used it.

    python benchmarks/minhash.py [--input FILE ...] [--megabytes 4] [--repeats 3]

Each computes signatures of the same documents with 128 permutations (datatrove: 9 x 13), in one process, on one thread,
in turn A B C A B C. datatrove runs twice: with its 5-grams of words, which are a sixth as many as shingles of
characters, and which need `pip install spacy`, and with 13-character shingles as here. datasketch gets one shingle at a
time, as in `to_hash.py` of Cerebras modelzoo. Without ``--input`` the documents are random words.
"""

import argparse
import os
import random
import re
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice

os.environ.setdefault("OMP_NUM_THREADS", "1")

from loguru import logger
from tiny_inputs import add_smoke

from btlm.data.documents import Document, list_units, read_unit
from btlm.data.minhash import band_keys, signatures
from btlm.data.recipe import Dedup, Read


def load(inputs: list[str], size: int) -> list[str]:
    """About ``size`` bytes of documents, in equal parts from all files."""
    rng = random.Random(0)
    if not inputs:
        words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(20_000)]
        return [" ".join(rng.choices(words, k=1000)) for _ in range(size // 6500)]
    units = list_units(inputs, Read())[0]
    readers = [(item.text for item in read_unit(unit, Read()) if isinstance(item, Document)) for unit in units]
    texts: list[str] = []
    for reader in readers:
        part = 0
        for text in reader:
            texts.append(text)
            part += len(text.encode())
            if part >= size / len(readers):
                break
    return texts


def ours(texts: list[str]) -> None:
    """This package's computation, without reading and writing."""
    for start in range(0, len(texts), 256):
        signature, _ = signatures(texts[start : start + 256], Dedup())
        band_keys(signature, 9, 13)


def with_datatrove(words: bool) -> Callable[[list[str]], None]:
    """datatrove's stage, writing and sorting its signatures as it always does."""

    class Characters:
        def word_tokenize(self, text: str) -> list[str]:
            return list(text)

    def run(texts: list[str]) -> None:
        from datatrove.data import Document as DatatroveDocument
        from datatrove.pipeline.dedup import minhash

        config = minhash.MinhashConfig(n_grams=5 if words else 13, num_buckets=9, hashes_per_bucket=13)
        with tempfile.TemporaryDirectory() as folder:
            if not words:
                minhash.load_word_tokenizer = lambda _: Characters()
            step = minhash.MinhashDedupSignature(folder, config=config)
            step.run((DatatroveDocument(text=text, id="") for text in texts), 0, 1)

    return run


def datasketch(texts: list[str]) -> None:
    """Datasketch, with one update per shingle."""
    from datasketch import MinHash

    for text in texts:
        normal = text.lower().translate(str.maketrans("", "", string.punctuation))
        normal = re.sub(r"\s+", " ", normal.strip())
        minhash = MinHash(num_perm=128)
        for i in range(len(normal) - 12):
            minhash.update(normal[i : i + 13].encode())


def main() -> None:
    """Print a Markdown table."""
    logger.disable("datatrove")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=[], help="documents, as for btlm data prepare")
    parser.add_argument("--megabytes", type=float, default=4, help="text for this package; peers get a part of it")
    parser.add_argument("--repeats", type=int, default=3)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.megabytes, args.repeats = 0.1, 1
    texts = load(args.input, int(args.megabytes * 1e6))
    # The peers' time, too, is proportional to the text, so a tenth of it is enough to measure their rate.
    few = list(islice(texts, 0, None, 10))
    forms: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {"btlm": (ours, texts)}
    peers = {
        "datatrove, 5 words": (with_datatrove(words=True), "spacy"),
        "datatrove, 13 characters": (with_datatrove(words=False), "datatrove"),
        "datasketch, one at a time": (datasketch, "datasketch"),
    }
    for name, (run, package) in peers.items():
        if find_spec(package):
            forms[name] = run, few
        else:
            print(f"{name}: left out, {package} is not installed")
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(args.repeats):
        for name, (run, documents) in forms.items():
            started = time.perf_counter()
            run(documents)
            seconds = time.perf_counter() - started
            rates[name].append(sum(len(text.encode()) for text in documents) / 1e6 / seconds)
    print(f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB\n")
    print("| | MB/s per core | btlm is faster by |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [mine / other for mine, other in zip(rates["btlm"], values, strict=True)]
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.1f} |")


if __name__ == "__main__":
    main()
