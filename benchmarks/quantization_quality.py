"""Perplexity of a model and of its quantized copies on held-out text, and their sizes.

    python benchmarks/quantization_quality.py MODEL --data shards/ [--tokens 16384] [--context 2048]
        [--methods nearest gptq] [--group-sizes 64 128] [--table-bits 8 4] [--calibration TEXT]

``MODEL`` is a plain folder, and ``--data`` the shards that ``btlm data prepare`` wrote: the loss is that of their
held-out text, in fp32, and every source has the same weight in the mean. The text for calibration comes from their
training text if none is given.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from tiny_inputs import add_smoke, write_model, write_shards

from btlm.convert.calibrate import CALIBRATION_TOKENS
from btlm.convert.quantize import quantize
from btlm.data import TokenShards
from btlm.evaluate.quantized_copies import ENGINES, calibration_text, compare_copies


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="plain folder, or id on the Hugging Face Hub")
    parser.add_argument("--data", help="folder of token shards")
    parser.add_argument("--tokens", type=int, default=16384, help="largest number of held-out tokens per source")
    parser.add_argument("--context", type=int, default=2048, help="tokens per row")
    parser.add_argument("--methods", nargs="+", choices=("nearest", "gptq"), default=["nearest", "gptq"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--table-bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--calibration", metavar="TEXT", help="text for gptq; must not be held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.model, args.data = write_model(Path(folder)), write_shards(Path(folder))
            args.tokens, args.context, args.calibration_tokens = 64, 32, 256
            args.group_sizes, args.table_bits = [128], [8]
            measure(args)
        return
    if not args.model or not args.data:
        print("Nothing is measured without a model and held-out text: give MODEL and --data.")
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Make and measure each copy in turn."""
    shards = TokenShards(args.data)
    print(
        f"torch {torch.__version__}, fp32, up to {args.tokens:,} tokens per source in rows of {args.context:,}; "
        f"{args.calibration_tokens:,} tokens for calibration\n"
    )
    losses = " | ".join(f"{name}: perplexity | change | bits per byte" for name in ENGINES)
    print(f"| blocks | group | table bits | MB | {losses} |\n|---|---|---|---|{'---|---|---|' * len(ENGINES)}")
    cells = [("as they are", "", "", "")]

    def copies(folder: Path) -> Iterator[Path]:
        text = args.calibration
        if text is None and "gptq" in args.methods:
            text = folder / "calibration.txt"
            text.write_text(calibration_text(shards, 2 * args.calibration_tokens), encoding="utf-8")
        for method, group_size, table_bits in product(args.methods, args.group_sizes, args.table_bits):
            copy = folder / f"{method}-{group_size}-{table_bits}"
            quantize(
                args.model,
                copy,
                group_size=group_size,
                table_bits=table_bits,
                calibration=text if method == "gptq" else None,
                calibration_tokens=args.calibration_tokens,
            )
            size = (copy / "model.safetensors").stat().st_size
            cells.append((f"4 bits, {method}", str(group_size), str(table_bits), f"{size / 1e6:.1f}"))
            yield copy

    with tempfile.TemporaryDirectory() as temporary:
        for row in compare_copies(args.model, copies(Path(temporary)), shards, args.context, args.tokens):
            shown = list(cells[-1])
            for quality in row.values():
                shown += [f"{quality.perplexity:.3f}", f"{quality.change:+.2%}", f"{quality.bits_per_byte:.4f}"]
            print(f"| {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
