"""Small random inputs for ``--smoke``, which runs a benchmark from end to end in seconds and without a network."""

import argparse
import shutil
import string
from pathlib import Path

import numpy as np

# A model that every command takes: plain weights, groups of 128 columns.
SIZES = {
    "vocab_size": 50257,
    "n_positions": 128,
    "n_embd": 128,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": 256,
    "mup_width_scale": 1.0,
    "tie_word_embeddings": True,
}
SOURCES = ("books", "code")


def add_smoke(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option ``--smoke``."""
    parser.add_argument("--smoke", action="store_true", help="run everything once, with tiny inputs, in seconds")


def write_documents(folder: Path) -> Path:
    """A file of 40 documents of 200 random words, of two sources."""
    import json

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 9))) for _ in range(500)]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(40)]
    records = [{"id": str(i), "text": text, "source": SOURCES[i % 2]} for i, text in enumerate(texts)]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_shards(folder: Path) -> Path:
    """Token shards: in training and held out, 20 documents of 63 random tokens of each of two sources."""
    from btlm.data.shards import write_manifest, write_shard

    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    shards = {}
    for split in ("train", "validation"):
        documents = ((rng.integers(0, 2000, 63), i % 2, 250) for i in range(40))
        shards[split] = [write_shard(folder / "shards", f"{split}-00000", documents)]
    write_manifest(folder / "shards", shards, SOURCES)
    return folder / "shards"


def write_model(folder: Path) -> Path:
    """A folder of a model with one block and random weights in fp32, with GPT-2's tokenizer."""
    from btlm.checkpoint import BUNDLED_MODEL
    from btlm.evaluate.random_checkpoint import write_random_model

    (folder / "model").mkdir()
    write_random_model(folder / "model", SIZES, "float32")
    for path in BUNDLED_MODEL.glob("tokenizer*.json"):
        shutil.copy(path, folder / "model")
    return folder / "model"
