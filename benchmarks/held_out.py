"""Held-out loss of checkpoints in bits per byte of text, by source.

    python benchmarks/held_out.py [MODEL ...] --data shards/ [--tokens 65536] [--context 2048]

``--data`` is the folder of shards that ``btlm data prepare`` wrote; every source counts the same in the mean.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tiny_inputs import add_smoke, write_shards

from btlm.checkpoint import BUNDLED_MODEL
from btlm.data import TokenShards
from btlm.evaluate.held_out import transformers_loss


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=[BUNDLED_MODEL])
    parser.add_argument("--data", help="folder of token shards")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens of each source, at most")
    parser.add_argument("--context", type=int, default=2048, help="tokens per row")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.data, args.tokens, args.context = write_shards(Path(folder)), 64, 32
            measure(args)
        return
    if not args.data:
        print("Nothing is measured without documents: give --data.")
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Load each model in turn."""
    shards = TokenShards(args.data)
    print(f"torch {torch.__version__}, up to {args.tokens:,} tokens per source in rows of {args.context:,}\n")
    for i, name in enumerate(args.models):
        loss = transformers_loss(name, shards, args.context, args.tokens, dtype="auto", compute_dtype=torch.float32)
        result = loss["bits_per_byte"]
        if i == 0:
            print(f"| | {' | '.join(result)} |\n|---{'|---' * len(result)}|")
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in result.values())} |", flush=True)


if __name__ == "__main__":
    main()
