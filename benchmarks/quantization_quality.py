"""Perplexity on held-out text of a model and of its quantized copies, and what they take.

    python benchmarks/quantization_quality.py MODEL --data shards/ [--tokens 16384] [--context 2048]
        [--methods nearest gptq] [--group-sizes 64 128] [--table-bits 8 4] [--calibration TEXT]

``MODEL`` is a plain folder, and ``--data`` the shards that ``btlm data prepare`` wrote: the loss is of their held-out
text, every source the same in the mean, in fp32. The text for calibration is of their training text if none is given.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from btlm.checkpoint import load_model
from btlm.convert.calibrate import CALIBRATION_TOKENS
from btlm.convert.quantize import quantize
from btlm.data import TokenShards
from btlm.data.tokenize import decode
from btlm.engine import Engine
from btlm.train import evaluate_held_out
from btlm.train.command import token_bytes
from btlm.train.distributed import join_ranks
from btlm.train.step import LossModel

# Tokens in a row that calibration takes from one place.
_PIECE = 4096

Measure = Callable[[Path | str, TokenShards, int, int], dict[str, float]]


def transformers_loss(folder: Path | str, shards: TokenShards, context: int, tokens: int) -> dict[str, float]:
    """Nats a token and bits a byte of held-out text, the mean of the sources, with weights decoded to fp32."""
    model, _ = load_model(folder, dtype="float32", device="cpu")
    loss_model = LossModel(model, torch.float32)
    held_out = evaluate_held_out(loss_model, shards, context, tokens, token_bytes(), join_ranks("cpu"))
    return {unit: by_source["mean"] for unit, by_source in held_out.items()}


def engine_loss(
    folder: Path | str, shards: TokenShards, context: int, tokens: int, cache_dtype: str = "auto"
) -> dict[str, float]:
    """The same in the engine: eight-bit activations and cache where the weights are quantized, else fp32."""
    engine = Engine.open(folder, context=context, cache_dtype=cache_dtype)
    bytes_of, means = token_bytes(), []
    for source in shards.sources:
        ids = shards.source_tokens("validation", source, tokens).astype(np.int64)
        rows = [row for row in np.split(ids, range(context, len(ids), context)) if len(row) > 1]
        if rows:
            nats = -sum(float(engine.score(row.tolist()).sum(dtype=np.float64)) for row in rows)
            size = sum(int(bytes_of[row[1:]].sum()) for row in rows)
            means.append((nats / sum(len(row) - 1 for row in rows), nats / math.log(2) / size))
    nats_per_token, bits_per_byte = np.mean(means, axis=0)
    return {"nats_per_token": float(nats_per_token), "bits_per_byte": float(bits_per_byte)}


# What runs the folders; each is a column of its own.
ENGINES: dict[str, Measure] = {
    "transformers": transformers_loss,
    "engine": engine_loss,
    "engine, int4 cache": partial(engine_loss, cache_dtype="int4"),
}


def training_text(shards: TokenShards, tokens: int) -> str:
    """Training text from all over each source, as many tokens of each."""
    texts = []
    for source in shards.sources:
        stream = shards.source_tokens("train", source, 100 * tokens)
        pieces = max(1, tokens // len(shards.sources) // _PIECE)
        for start in np.linspace(0, max(0, len(stream) - _PIECE), pieces).astype(int):
            piece = stream[start : start + _PIECE]
            documents = np.split(piece, np.flatnonzero(piece == 50256))
            texts += [decode(document[document != 50256]).replace("\ufffd", "") for document in documents]
    return "\n\n".join(texts)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="plain folder, or id on the Hugging Face Hub")
    parser.add_argument("--data", help="folder of token shards")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens of each source, at most")
    parser.add_argument("--context", type=int, default=2048, help="tokens a row")
    parser.add_argument("--methods", nargs="+", choices=("nearest", "gptq"), default=["nearest", "gptq"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--table-bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--calibration", metavar="TEXT", help="text for gptq, not held out")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    args = parser.parse_args()
    if not args.model or not args.data:
        print("Nothing is measured without a model and held-out text: give MODEL and --data.")
        return
    shards = TokenShards(args.data)
    print(
        f"torch {torch.__version__}, fp32, up to {args.tokens:,} tokens a source in rows of {args.context:,}; "
        f"{args.calibration_tokens:,} tokens for calibration\n"
    )
    losses = " | ".join(f"{name}: perplexity | change | bits a byte" for name in ENGINES)
    print(f"| blocks | group | table bits | MB | {losses} |\n|---|---|---|---|{'---|---|---|' * len(ENGINES)}")
    reference: float | None = None  # the model as it is, in Transformers

    def show(*cells: object, folder: Path | str) -> None:
        nonlocal reference
        for measure in ENGINES.values():
            loss = measure(folder, shards, args.context, args.tokens)
            perplexity = math.exp(loss["nats_per_token"])
            reference = reference or perplexity
            cells += (f"{perplexity:.3f}", f"{perplexity / reference - 1:+.2%}", f"{loss['bits_per_byte']:.4f}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    show("as they are", "", "", "", folder=args.model)
    with tempfile.TemporaryDirectory() as temporary:
        text = args.calibration
        if text is None and "gptq" in args.methods:
            text = Path(temporary) / "calibration.txt"
            text.write_text(training_text(shards, 2 * args.calibration_tokens), encoding="utf-8")
        for method, group_size, table_bits in product(args.methods, args.group_sizes, args.table_bits):
            folder = Path(temporary) / f"{method}-{group_size}-{table_bits}"
            quantize(
                args.model,
                folder,
                group_size=group_size,
                table_bits=table_bits,
                calibration=text if method == "gptq" else None,
                calibration_tokens=args.calibration_tokens,
            )
            size = (folder / "model.safetensors").stat().st_size
            show(f"4 bits, {method}", group_size, table_bits, f"{size / 1e6:.1f}", folder=folder)


if __name__ == "__main__":
    main()
