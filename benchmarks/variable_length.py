"""Training at two lengths against one: loss by position up to eight times the short length, on real text.

    python benchmarks/variable_length.py --input corpus/book.jsonl.zst --output runs/variable_length [--short 256]
        [--seeds 3] [--device cuda] [--workers 3]

Trains three models of BTLM's shape and muP values on the same number of bytes (``byte_stream.py``), with the same batch
in bytes and one schedule of the learning rate over all of them, for each seed:

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
With fixed interpolation (``factor``) the slopes are those of twice the training length at every length.

Why interpolation costs what it costs is asked head by head: the loss with the slope of one head divided by two, at the
training length and at twice that length, and with the slopes of only the flattest heads divided.

``--output`` gets a folder for each model and seed, with its training and ``curves.json``, from which a run that was
stopped goes on, and ``loss.png``.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from byte_stream import END_OF_TEXT, VOCAB_SIZE, ByteStream, token_bytes
from tiny_inputs import add_smoke, write_documents
from torch import Tensor
from transformers.utils import logging

from btlm import BTLMLMHeadModel
from btlm.model import attention_btlm
from btlm.model.mup import scale_logits
from btlm.plots import pyplot, save_figure
from btlm.train import Recipe, train
from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Precision, Schedule, Stage, Watching

BASE_WIDTH = 256
# Rows of each stage in multiples of the short ones, and their share of the bytes.
MODELS = {
    "short": [(1, 1.0)],
    "variable": [(1, 0.75), (4, 0.25)],
    "long": [(4, 1.0)],
}
# Lengths of the forward passes in halves of the short rows.
HALVES = [1, 2, 3, 4, 6, 8, 10, 12, 16]
EVAL_BATCH_TOKENS = 65_536
# The factor of fixed interpolation, and the divisor of the slopes of single heads.
FACTOR = 2.0


def recipe(name: str, seed: int, args: argparse.Namespace) -> Recipe:
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
        seed=seed,
        evaluation=Evaluation(every_tokens=max(1, tokens // 4)),
        checkpoints=Checkpoints(every_steps=200),
        watching=Watching(tensorboard=False),
        precision=Precision(dtype=args.dtype),
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
    """Loss of the last bytes of each window in a pass over its last ``length`` bytes, nats per byte, ``[windows]``.

    The first byte of a pass has nothing before it and is not predicted, so a pass of ``num_bytes`` counts one less.
    """
    losses = []
    predicted = min(num_bytes, length - 1)
    for part in windows[:, -length:].to(model.device).split(max(1, EVAL_BATCH_TOKENS // length)):
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model.transformer(part, use_cache=False).last_hidden_state
        hidden = scale_logits(hidden[:, -predicted - 1 : -1], model.config).float()
        logits = hidden @ model.lm_head.weight.T
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, -predicted:], reduction="none").mean(dim=1))
    return torch.cat(losses)


def curves(model: BTLMLMHeadModel, windows: Tensor, lengths: list[int], train_seq_len: int) -> dict[str, Any]:
    """Mean loss by length, and the standard error of its difference to that at ``train_seq_len``, paired by window."""
    num_bytes = lengths[0]
    scalings = {
        "none": None,
        "fixed": {"type": "linear", "factor": FACTOR},
        "dynamic": {"type": "linear", "train_seq_len": train_seq_len},
    }
    losses: dict[str, dict[int, Tensor]] = {}
    for form, scaling in scalings.items():
        model.config.alibi_scaling = scaling
        losses[form] = {length: loss_at_end(model, windows, length, num_bytes).cpu() for length in lengths}
    model.config.alibi_scaling = None
    base = losses["none"][train_seq_len]
    return {
        form: {
            "loss": [float(by_length[length].mean()) for length in lengths],
            "error": [float((by_length[length] - base).std()) / math.sqrt(len(windows)) for length in lengths],
        }
        for form, by_length in losses.items()
    }


def heads(model: BTLMLMHeadModel, windows: Tensor, train_seq_len: int, num_bytes: int) -> dict[str, dict[str, Any]]:
    """What interpolation does to which heads: the loss with some slopes divided by ``FACTOR``, minus that with none.

    Returns:
        By length (``train_seq_len`` and twice that): ``single``, the change for each head, steepest first, and
        ``flattest``, the change when only the ``n`` flattest heads are divided, ``n`` from 1 to all.
    """
    num_heads = model.config.n_head

    def loss(length: int, divided: range) -> float:
        divisors = torch.ones(num_heads, device=model.device)
        divisors[divided.start : divided.stop] = FACTOR

        def slopes(slopes_H: Tensor, *_: object) -> Tensor:
            return (slopes_H.to(divisors.device) / divisors)[None]

        with patch.object(attention_btlm, "interpolated_slopes", slopes):
            return float(loss_at_end(model, windows, length, num_bytes).mean())

    result = {}
    for length in (train_seq_len, 2 * train_seq_len):
        plain = loss(length, range(0))
        result[str(length)] = {
            "single": [loss(length, range(head, head + 1)) - plain for head in range(num_heads)],
            "flattest": [loss(length, range(num_heads - n, num_heads)) - plain for n in range(1, num_heads + 1)],
        }
    return result


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model, or what is left of it, and evaluate it."""
    logging.disable_progress_bar()
    stream = ByteStream(args.input, int(args.megabytes * 1e6))
    lengths = [half * args.short // 2 for half in HALVES]
    windows = held_out_windows(stream, lengths[-1], args.windows)
    setting = {key: getattr(args, key) for key in ("steps", "warmup_steps", "batch_tokens", "lr", "windows", "layers")}
    setting |= {"width": args.width, "heads": args.heads, "lengths": lengths, "seed": seed}
    setting["data"] = "".join(stream.fingerprint(split)[:8] for split in ("train", "validation"))
    folder = args.output / f"{name}-{seed}"
    file = folder / "curves.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("setting") == setting:
        return dict(known)
    started = time.perf_counter()
    loss = math.nan
    for record in train(recipe(name, seed, args), stream, folder, token_bytes(), args.device):  # type: ignore[arg-type]
        if "bits_per_byte" in record:
            loss = record["bits_per_byte"]["mean"] * math.log(2)
    trained = time.perf_counter()
    model = BTLMLMHeadModel.from_pretrained(folder / "model").eval().to(torch.device(args.device))
    train_seq_len = trained_at(name, args.short)
    result = {
        "setting": setting,
        "trained_at": train_seq_len,
        "held_out": loss,
        "curves": curves(model, windows, lengths, train_seq_len),
        "heads": heads(model, windows, train_seq_len, lengths[0]),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{name}, seed {seed}: held-out loss {loss:.4f} nats per byte; trained in {trained - started:.0f} s, "
        f"evaluated in {time.perf_counter() - trained:.0f} s",
        flush=True,
    )
    return result


FORMS = {"none": "-", "fixed": ":", "dynamic": "--"}


def plot(results: dict[str, list[dict[str, Any]]], lengths: list[int], path: Path) -> None:
    """Loss by position, the mean over seeds with their range; and what halved slopes do, head by head."""
    plt = pyplot()
    short, places = 2 * lengths[0], np.array(lengths)
    labels = {
        "short": f"short: rows of {short}",
        "variable": f"variable: 75% rows of {short}, then 25% of {4 * short:,}",
        "long": f"long: rows of {4 * short:,}",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=[3, 2])
    for name, seeds in results.items():
        color = f"C{list(MODELS).index(name)}"
        for form, line in FORMS.items():
            losses = np.array([result["curves"][form]["loss"] for result in seeds])
            shown = places >= (seeds[0]["trained_at"] if form == "dynamic" else 0)
            center = losses.mean(axis=0)[shown]
            left.plot(places[shown], center, line, color=color, label=labels[name] if form == "none" else None)
            left.fill_between(
                places[shown],
                losses.min(axis=0)[shown],
                losses.max(axis=0)[shown],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        changes = np.array([result["heads"][str(seeds[0]["trained_at"])]["single"] for result in seeds])
        right.plot(range(1, changes.shape[1] + 1), changes.mean(axis=0), ".-", color=color, label=name)
    left.plot([], [], ":", color="0.3", label=f"fixed interpolation, factor {FACTOR:g}")
    left.plot([], [], "--", color="0.3", label="dynamic interpolation")
    for length in (short, 4 * short):
        left.axvline(length, color="0.7", linewidth=1, zorder=0)
    left.set_xticks([short * i for i in range(1, lengths[-1] // short + 1)])
    left.set_xlabel(f"position (bytes; the {lengths[0]} up to here)")
    left.set_ylabel("held-out loss, nats per byte")
    right.set_xlabel("head, steepest slope first")
    right.set_ylabel(
        f"change of the loss at the training length\nwhen its slope is divided by {FACTOR:g}, nats per byte"
    )
    for axis in (left, right):
        axis.grid(alpha=0.2, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    save_figure(figure, path, dpi=150)


def _cell(values: list[float], sign: str = "") -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{sign}.4f} ± {error:.4f}"


def report(results: dict[str, list[dict[str, Any]]], lengths: list[int]) -> None:
    """Tables in Markdown; every cell is the mean over the seeds, with its standard error where there is one."""
    print(f"\n| model | interpolation | {' | '.join(f'{length:,}' for length in lengths)} |")
    print(f"|---|---{'|---' * len(lengths)}|")
    for name, seeds in results.items():
        for form in FORMS:
            cells = [
                f"{statistics.fmean(result['curves'][form]['loss'][i] for result in seeds):.4f}"
                if form != "dynamic" or length > seeds[0]["trained_at"]
                else ""
                for i, length in enumerate(lengths)
            ]
            print(f"| {name} | {form} | {' | '.join(cells)} |")
    print("\nAgainst the loss without interpolation at the end of the longest rows of training (negative is better):\n")
    print(
        f"| model | interpolation | at that length | at twice that length | at {lengths[-1]:,} |\n|---|---|---|---|---|"
    )
    for name, seeds in results.items():
        place = lengths.index(seeds[0]["trained_at"])
        for form in FORMS:
            columns = (place, lengths.index(2 * seeds[0]["trained_at"]), len(lengths) - 1)
            base = [result["curves"]["none"]["loss"][place] for result in seeds]
            cells = [
                _cell([r["curves"][form]["loss"][i] - b for r, b in zip(seeds, base, strict=True)], "+")
                for i in columns
            ]
            print(f"| {name} | {form} | {' | '.join(cells)} |")
    print(f"\nChange of the loss when slopes are divided by {FACTOR:g}, nats per byte:\n")
    num_heads = next(iter(results.values()))[0]["setting"]["heads"]
    print(f"| model | length | which heads | {' | '.join(str(head) for head in range(1, num_heads + 1))} |")
    print(f"|---|---|---{'|---' * num_heads}|")
    for name, seeds in results.items():
        for length in seeds[0]["heads"]:
            for kind, label in (("single", "head n alone"), ("flattest", "the n flattest")):
                means = np.array([result["heads"][length][kind] for result in seeds]).mean(axis=0)
                print(f"| {name} | {length} | {label} | {' | '.join(f'{value:+.4f}' for value in means)} |")


def main() -> None:
    """Train what is missing, evaluate, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="files or folders of long documents")
    parser.add_argument("--output", type=Path, default=Path("runs/variable_length"), help="folder of the results")
    parser.add_argument("--width", type=int, default=256, help="of the models (default: 256, the base of muP)")
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument("--heads", type=int, default=16, help="(default: 16)")
    parser.add_argument("--short", type=int, default=256, help="bytes of the short rows; even")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=768)
    parser.add_argument("--warmup-steps", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=2.0**-8)
    parser.add_argument("--megabytes", type=float, default=40, help="text of each source")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--seeds", type=int, default=1, help="models of each kind")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the products; float32 where bf16 is slow")
    parser.add_argument("--workers", type=int, default=1, help="processes that train at the same time")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.width, args.layers, args.heads, args.short = 32, 1, 4, 16
        args.steps, args.warmup_steps, args.batch_tokens, args.windows, args.dtype = 4, 1, 256, 4, "float32"
        with tempfile.TemporaryDirectory() as folder:
            args.input, args.output = [str(write_documents(Path(folder)))], Path(folder) / "output"
            measure_all(args)
        return
    if not args.input:
        print("Nothing is measured without documents: give --input.")
        return
    measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Train and evaluate what is missing, and report."""
    args.output.mkdir(parents=True, exist_ok=True)
    todo = [(name, seed) for seed in range(1, args.seeds + 1) for name in args.models]
    if args.workers > 1:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(measure, *zip(*todo, strict=True), [args] * len(todo)))
    else:
        found = [measure(name, seed, args) for name, seed in todo]
    results = {
        name: [result for (other, _), result in zip(todo, found, strict=True) if other == name] for name in args.models
    }
    lengths = [half * args.short // 2 for half in HALVES]
    print(
        f"\ntorch {torch.__version__}, {args.device}, {args.dtype}; {args.steps} steps of {args.batch_tokens:,} bytes,",
        end=" ",
    )
    print(f"{args.seeds} seeds, {args.windows} windows, nats per byte")
    report(results, lengths)
    plot(results, lengths, args.output / "loss.png")


if __name__ == "__main__":
    main()
