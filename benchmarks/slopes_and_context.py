"""Why interpolation hurts a model, and how much context it uses, measured on the models of ``variable_length.py``.

    python benchmarks/slopes_and_context.py runs/variable_length/long/model --input corpus/book.jsonl.zst

Prints the loss of the same held-out bytes with the slopes of all heads, or of one head, divided by two, at a length
below the training length; and the loss with more and more bytes before them.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from byte_stream import VOCAB_SIZE, ByteStream
from tiny_inputs import add_smoke, write_documents
from torch import Tensor
from variable_length import held_out_windows, loss_at_end

from btlm import BTLMConfig, BTLMLMHeadModel
from btlm.model import attention_btlm

SMOKE_MODEL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
}
LENGTHS = (12, 16, 32, 64, 128, 256, 512)


def main() -> None:
    """Print both as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model that reads bytes")
    parser.add_argument("--input", nargs="+", help="files or folders of long documents")
    parser.add_argument("--megabytes", type=float, default=40, help="megabytes of text per source")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows of 512 bytes")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.windows = 2
        with tempfile.TemporaryDirectory() as folder:
            model = BTLMLMHeadModel(BTLMConfig(**SMOKE_MODEL)).eval()
            measure_all(model, ByteStream([write_documents(Path(folder))], 1_000_000), args.windows)
        return
    if not args.model or not args.input:
        print("Nothing is measured without a model and documents: give MODEL and --input.")
        return
    model = BTLMLMHeadModel.from_pretrained(args.model).eval()
    measure_all(model, ByteStream(args.input, int(args.megabytes * 1e6)), args.windows)


def measure_all(model: BTLMLMHeadModel, stream: ByteStream, num_windows: int) -> None:
    """Print both tables."""
    windows = held_out_windows(stream, max(LENGTHS), num_windows)
    heads = model.config.n_head
    print("| slopes divided by 2 | nats per byte of the last 128 of 512 |\n|---|---|")
    settings = {"none": torch.ones(heads), "all": torch.full((heads,), 2.0)}
    for head in range(heads):
        settings[f"head {head + 1}, steepest first"] = torch.ones(heads).index_fill(0, torch.tensor(head), 2.0)
    for name, divisors in settings.items():

        def divided(slopes_H: Tensor, *_: object, divisors: Tensor = divisors) -> Tensor:
            return (slopes_H / divisors)[None]

        with patch.object(attention_btlm, "interpolated_slopes", divided):
            print(f"| {name} | {float(loss_at_end(model, windows, 512, 128).mean()):.3f} |", flush=True)
    print("\n| bytes of context | nats per byte of the last 8 |\n|---|---|")
    for length in LENGTHS:
        print(f"| {length} | {float(loss_at_end(model, windows, length, 8).mean()):.3f} |", flush=True)


if __name__ == "__main__":
    main()
