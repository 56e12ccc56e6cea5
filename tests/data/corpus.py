"""A small corpus with planted faults: three sources, near-duplicates across them, short and bad documents."""

import gzip
import json
import random
from pathlib import Path

import zstandard

WORDS = [
    "".join(syllables)
    for syllables in (
        (a, b, c)
        for a in ("ka", "lo", "mi", "ru", "te", "von")
        for b in ("da", "fe", "gu", "l")
        for c in ("", "n", "s", "rt")
    )
]


def text(rng: random.Random, num_words: int = 120) -> str:
    """Sentences of made-up words."""
    words = rng.choices(WORDS, k=num_words)
    return " ".join(word.capitalize() + "." if i % 9 == 8 else word for i, word in enumerate(words))


def edited(original: str, rng: random.Random, share: float) -> str:
    """The text with a share of its words replaced."""
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in original.split())


def write_corpus(folder: Path, documents: int = 120, seed: int = 0) -> Path:
    """JSON lines in SlimPajama's schema, plain, gzip and Zstandard.

    Among every ten documents, one is short, one is an exact copy of a document of another source, and one is a
    near-copy.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    originals = [text(rng, rng.randint(60, 400)) for _ in range(documents)]
    for source, (name, suffix) in enumerate((("Web", ".jsonl"), ("Books", ".jsonl.gz"), ("Code", ".jsonl.zst"))):
        lines = []
        for i in range(documents // 3):
            own = originals[3 * i + source]
            other = originals[3 * (i - 1) + (source + 1) % 3]
            kind = i % 10
            content = {3: "too short: " + own[:40], 5: other, 7: edited(other, rng, 0.01)}.get(kind, own)
            lines.append(json.dumps({"text": content, "meta": {"redpajama_set_name": name}}) + "\n")
        raw = "".join(lines).encode()
        if suffix.endswith(".gz"):
            raw = gzip.compress(raw, mtime=0)
        elif suffix.endswith(".zst"):
            raw = zstandard.compress(raw)
        (folder / f"{name.lower()}{suffix}").write_bytes(raw)
    return folder
