"""Training at two lengths against one: loss by position up to eight times the short length, on real text.

    python benchmarks/variable_length.py --input corpus/book.jsonl.zst --output runs/variable_length [--short 256]

Trains three models of BTLM's shape and muP values on the same number of bytes (``byte_stream.py``), with the same batch
in bytes and one schedule of the learning rate over all of them:

- short: rows of ``--short`` bytes;
- variable: three quarters of the bytes in those rows, then one quarter in rows four times as long, as BTLM-3B-8k's
  2,048 and 8,192;
- long: rows four times as long.

A small model that has read little text uses little context, and where it uses none, no length is a test of anything:
``--short`` has to be near the number of bytes that still help it.

Every point of a curve is the loss of the *same* bytes, the last ones of windows of held-out documents, each window
within one document. What varies is how many bytes the forward pass is given, ``L``, which ends with them: with ``n``
bytes, half of ``--short``, the loss is that of the positions ``L - n`` to ``L``. Without interpolation a position does
not depend on what follows, so this is the usual loss by position, freed of the differences between the texts at
different positions. With dynamic interpolation (``alibi_scaling`` with ``train_seq_len``, the longest rows of the
model's training) all slopes of a forward pass depend on its length: only its end tells what a model that reads ``L``
bytes predicts next, and every length needs a pass of its own. Up to ``train_seq_len`` the two are the same computation.

``--output`` gets a folder for each model, with its training and ``curves.json``, from which a run that was stopped goes
on, and ``loss.png``.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from byte_stream import END_OF_TEXT, VOCAB_SIZE, ByteStream, token_bytes
from torch import Tensor
from transformers.utils import logging

from btlm import BTLMLMHeadModel
from btlm.model.mup import scale_logits
from btlm.train import Recipe, train
from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Schedule, Stage, Watching

BASE_WIDTH = 256
# Rows of each stage in multiples of the short ones, and their share of the bytes.
MODELS = {
    "short": [(1, 1.0)],
    "variable": [(1, 0.75), (4, 0.25)],
    "long": [(4, 1.0)],
}
# Lengths of the forward passes in halves of the short rows.
HALVES = [1, 2, 3, 4, 6, 8, 10, 12, 16]
EVAL_BATCH_TOKENS = 16_384


def recipe(name: str, args: argparse.Namespace) -> Recipe:
    """One training run."""
    model = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": trained_at(name, args.short),
        "n_embd": args.width,
        "n_layer": args.layers,
        "n_head": args.heads,
        "n_inner": round(8 / 3 * args.width),
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "initializer_range": 0.073,
        "mup_width_scale": BASE_WIDTH / args.width,
        "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True,
    }
    tokens = args.steps * args.batch_tokens
    return Recipe(
        model=model,
        optimizer=Optimizer(lr=args.lr),
        schedule=Schedule(warmup_tokens=args.warmup_steps * args.batch_tokens),
        stages=[Stage(rows * args.short, args.batch_tokens, round(share * tokens)) for rows, share in MODELS[name]],
        micro_batch_tokens=args.batch_tokens,
        seed=args.seed,
        evaluation=Evaluation(every_tokens=max(1, tokens // 4)),
        checkpoints=Checkpoints(every_steps=200),
        watching=Watching(tensorboard=False),
    )


def trained_at(name: str, short: int) -> int:
    """Bytes of the longest rows of a model's training."""
    return short * max(rows for rows, _ in MODELS[name])


def held_out_windows(stream: ByteStream, length: int, num_windows: int) -> Tensor:
    """Windows of ``length`` bytes without overlap, int64 ``[num_windows, length]``, spread over the documents.

    Raises:
        ValueError: The held-out documents have fewer.
    """
    windows = np.concatenate(
        [
            text[: len(text) // length * length].reshape(-1, length)
            for source in stream.sources
            for text in stream.documents("validation", source)
        ]
    )
    if len(windows) < num_windows:
        raise ValueError(f"The held-out documents have {len(windows)} windows, not {num_windows}; read more text.")
    chosen = np.linspace(0, len(windows) - 1, num_windows).round().astype(np.int64)
    return torch.from_numpy(windows[chosen].astype(np.int64))


@torch.no_grad()
def loss_at_end(model: BTLMLMHeadModel, windows: Tensor, length: int, num_bytes: int) -> Tensor:
    """Loss of the last bytes of each window in a pass over its last ``length`` bytes, nats a byte, ``[windows]``.

    The first byte of a pass has nothing before it and is not predicted, so a pass of ``num_bytes`` counts one less.
    """
    losses = []
    predicted = min(num_bytes, length - 1)
    for part in windows[:, -length:].split(max(1, EVAL_BATCH_TOKENS // length)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.transformer(part, use_cache=False).last_hidden_state
        hidden = scale_logits(hidden[:, -predicted - 1 : -1], model.config).float()
        logits = hidden @ model.lm_head.weight.T
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, -predicted:], reduction="none").mean(dim=1))
    return torch.cat(losses)


def curves(model: BTLMLMHeadModel, windows: Tensor, lengths: list[int], train_seq_len: int) -> dict[str, Any]:
    """Mean loss by length, and the standard error of its difference to that at ``train_seq_len``, paired by window."""
    num_bytes = lengths[0]
    plain = {length: loss_at_end(model, windows, length, num_bytes) for length in lengths}
    model.config.alibi_scaling = {"type": "linear", "train_seq_len": train_seq_len}
    scaled = {length: loss_at_end(model, windows, length, num_bytes) for length in lengths if length > train_seq_len}
    model.config.alibi_scaling = None
    return {
        form: {
            "loss": [float(losses[length].mean()) for length in lengths],
            "error": [
                float((losses[length] - losses[train_seq_len]).std()) / math.sqrt(len(windows)) for length in lengths
            ],
        }
        for form, losses in (("plain", plain), ("dynamic", plain | scaled))
    }


def measure(name: str, stream: ByteStream, windows: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model, or what is left of it, and evaluate it."""
    started = time.perf_counter()
    for record in train(recipe(name, args), stream, args.output / name, token_bytes()):  # type: ignore[arg-type]
        if "bits_per_byte" in record:
            loss = record["bits_per_byte"]["mean"] * math.log(2)
            print(f"{name}: {record['tokens']:,} bytes, held-out loss {loss:.4f} nats a byte", flush=True)
    trained = time.perf_counter()
    model = BTLMLMHeadModel.from_pretrained(args.output / name / "model").eval()
    train_seq_len = trained_at(name, args.short)
    lengths = [half * args.short // 2 for half in HALVES]
    result = {"trained_at": train_seq_len, **curves(model, windows, lengths, train_seq_len)}
    evaluated = time.perf_counter()
    print(f"{name}: trained in {trained - started:.0f} s, evaluated in {evaluated - trained:.0f} s", flush=True)
    return result


def plot(results: dict[str, Any], lengths: list[int], path: Path) -> None:
    """A curve for each model and form; the training lengths as vertical lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    short, places = 2 * lengths[0], np.array(lengths)
    labels = {
        "short": f"short: rows of {short}",
        "variable": f"variable: 75% rows of {short}, then 25% of {4 * short:,}",
        "long": f"long: rows of {4 * short:,}",
    }
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in results.items():
        color = f"C{list(MODELS).index(name)}"
        beyond = places >= result["trained_at"]
        axis.plot(places, result["plain"]["loss"], ".-", color=color, label=labels[name])
        axis.plot(places[beyond], np.array(result["dynamic"]["loss"])[beyond], ".--", color=color)
    axis.plot([], [], "--", color="0.3", label="with dynamic interpolation")
    for length in (short, 4 * short):
        axis.axvline(length, color="0.7", linewidth=1, zorder=0)
    axis.set_xticks([short * i for i in range(1, lengths[-1] // short + 1)])
    axis.set_xlabel(f"position (bytes; the {lengths[0]} up to here)")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.grid(alpha=0.2, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def report(results: dict[str, Any], lengths: list[int]) -> None:
    """Loss by position as a Markdown table, and what the positions beyond training cost."""
    print(f"\n| model | interpolation | {' | '.join(f'{length:,}' for length in lengths)} |")
    print(f"|---|---{'|---' * len(lengths)}|")
    forms = {"plain": "none", "dynamic": "dynamic"}
    for name, result in results.items():
        for form, label in forms.items():
            cells = [
                f"{loss:.3f}" if form == "plain" or length > result["trained_at"] else ""
                for length, loss in zip(lengths, result[form]["loss"], strict=True)
            ]
            print(f"| {name} | {label} | {' | '.join(cells)} |")
    print(
        "\nAgainst the loss at the end of the longest rows of training (negative is better), +- one standard error:\n"
    )
    print(f"| model | interpolation | at twice that length | at {lengths[-1]:,} |\n|---|---|---|---|")
    for name, result in results.items():
        for form, label in forms.items():
            losses, errors = result[form]["loss"], result[form]["error"]
            base = losses[lengths.index(result["trained_at"])]
            cells = [
                f"{losses[i] - base:+.4f} +- {errors[i]:.4f}"
                for i in (lengths.index(2 * result["trained_at"]), len(lengths) - 1)
            ]
            print(f"| {name} | {label} | {' | '.join(cells)} |")


def main() -> None:
    """Train what is missing, evaluate, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="files or folders of long documents")
    parser.add_argument("--output", type=Path, default=Path("runs/variable_length"), help="folder of the results")
    parser.add_argument("--width", type=int, default=256, help="of the models (default: 256, the base of muP)")
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--heads", type=int, default=4, help="(default: 4)")
    parser.add_argument("--short", type=int, default=256, help="bytes of the short rows; even")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=768)
    parser.add_argument("--warmup-steps", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=2.0**-8)
    parser.add_argument("--megabytes", type=float, default=40, help="text of each source")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.input:
        print("Nothing is measured without documents: give --input.")
        return
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    stream = ByteStream(args.input, int(args.megabytes * 1e6))
    lengths = [half * args.short // 2 for half in HALVES]
    windows = held_out_windows(stream, lengths[-1], args.windows)
    setting = {key: getattr(args, key) for key in ("steps", "warmup_steps", "batch_tokens", "lr", "windows", "seed")}
    setting |= {"lengths": lengths, "data": "".join(stream.fingerprint(split)[:8] for split in ("train", "validation"))}
    results: dict[str, Any] = {}
    for name in args.models:
        file = args.output / name / "curves.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("setting") != setting:
            known = {"setting": setting, **measure(name, stream, windows, args)}
            file.write_text(json.dumps(known, indent=2) + "\n")
        results[name] = known
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, bf16, {args.steps} steps of ", end="")
    print(f"{args.batch_tokens:,} bytes, {args.windows} windows, nats a byte")
    report(results, lengths)
    plot(results, lengths, args.output / "loss.png")


if __name__ == "__main__":
    main()
