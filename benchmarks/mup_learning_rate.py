"""Does the best learning rate stay where it is as the model gets wider? Loss against learning rate, on real text.

    python benchmarks/mup_learning_rate.py --input corpus/ --output runs/mup [--widths 64 128 256 512] [--steps 150]

Trains models of two layers and one head size on bytes (``byte_stream.py``) at powers of two of the learning rate, with
the muP values of BTLM-3B (base width 256) and in standard parametrization: every multiplier 1, weights of standard
deviation 0.02, one learning rate for all. What differs between the runs of one parametrization is the width and the
learning rate: they read the same batches, and the held-out loss is of the same text, every source counting the same.

A width starts at the best learning rate of the width before and goes on to both sides until ``--neighbours`` runs on
either side of its best one are worse, so that no optimum lies on the edge of a grid. A run that diverges counts as
worse than any. ``--output`` gets ``runs.jsonl``, a line a run, from which a sweep that was stopped goes on, and
``loss.png``.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_stream import END_OF_TEXT, VOCAB_SIZE, ByteStream, token_bytes
from transformers.utils import logging

from btlm.train import Recipe, train
from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Schedule, Stage, Watching

BASE_WIDTH = 256
HEAD_DIM = 32
SEQUENCE_LENGTH = 256
PARAMETRIZATIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "muP": lambda width: {
        "initializer_range": 0.073,
        "mup_width_scale": BASE_WIDTH / width,
        "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22,
        "mup_scale_qk_dot_by_d": True,
    },
    "standard": lambda width: {"initializer_range": 0.02},
}
# log2 of the learning rate that the narrowest width starts at.
START = {"muP": -7, "standard": -7}
Run = dict[str, Any]


def recipe(parametrization: str, width: int, log2_lr: int, args: argparse.Namespace) -> Recipe:
    """One training run, evaluated at its end."""
    model = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": SEQUENCE_LENGTH,
        "n_embd": width,
        "n_layer": 2,
        "n_head": width // HEAD_DIM,
        "n_inner": round(8 / 3 * width),
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        **PARAMETRIZATIONS[parametrization](width),
    }
    tokens = args.steps * args.batch_tokens
    return Recipe(
        model=model,
        optimizer=Optimizer(lr=2.0**log2_lr),
        schedule=Schedule(warmup_tokens=args.warmup_steps * args.batch_tokens),
        stages=[Stage(SEQUENCE_LENGTH, args.batch_tokens, tokens)],
        micro_batch_tokens=args.batch_tokens,
        seed=args.seed,
        evaluation=Evaluation(every_tokens=2 * tokens, tokens_per_source=args.eval_tokens),
        checkpoints=Checkpoints(every_steps=2 * args.steps),
        watching=Watching(tensorboard=False),
    )


def measure(run: Run, stream: ByteStream, args: argparse.Namespace) -> Run:
    """The held-out loss of one run in nats a byte; infinite where it diverges."""
    started, loss = time.perf_counter(), math.inf
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        settings = recipe(run["parametrization"], run["width"], run["log2_lr"], args)
        try:
            for record in train(settings, stream, folder, token_bytes()):  # type: ignore[arg-type]
                if "bits_per_byte" in record:
                    loss = record["bits_per_byte"]["mean"] * math.log(2)
        except FloatingPointError:
            pass
    return {**run, "loss": loss, "seconds": round(time.perf_counter() - started, 1)}


def sweep(start: int, neighbours: int, losses: dict[int, float], loss_at: Callable[[int], float]) -> dict[int, float]:
    """Losses by log2 of the learning rate, with the best one ``neighbours`` or more from both ends.

    Args:
        start: Where to begin.
        neighbours: On either side.
        losses: Known already.
        loss_at: Trains a model.
    """
    losses = dict(losses)
    while True:
        best = min(losses, key=lambda x: losses[x], default=start)
        missing = [x for x in range(best - neighbours, best + neighbours + 1) if x not in losses]
        if not missing:
            return dict(sorted(losses.items()))
        # The nearest first: where it is better than the best one, the farther ones may not be needed.
        nearest = min(missing, key=lambda x: abs(x - best))
        losses[nearest] = loss_at(nearest)


def vertex(losses: dict[int, float]) -> tuple[float, float]:
    """Where the parabola through the best loss and its two neighbours is lowest, and how low."""
    best = min(losses, key=lambda log2_lr: losses[log2_lr])
    left, middle, right = (losses[best + step] for step in (-1, 0, 1))
    if not math.isfinite(left + right):
        return float(best), middle
    slope, curvature = (right - left) / 2, left - 2 * middle + right
    return best - slope / curvature, middle - slope**2 / (2 * curvature)


def plot(results: dict[str, dict[int, dict[int, float]]], path: Path) -> None:
    """A panel for each parametrization, a curve for each width, a ring at the best learning rate of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    figure, axes = plt.subplots(1, len(results), figsize=(9, 3.8), layout="constrained", sharey=True, squeeze=False)
    shown = [loss for widths in results.values() for losses in widths.values() for loss in losses.values()]
    lowest, highest = min(shown), max(loss for loss in shown if loss < min(shown) + 1.5)
    for axis, (name, widths) in zip(axes[0], results.items(), strict=True):
        for i, (width, losses) in enumerate(widths.items()):
            color = plt.get_cmap("viridis")(0.9 - 0.9 * i / max(1, len(widths) - 1))
            best = min(losses, key=lambda log2_lr: losses[log2_lr])
            axis.plot(losses.keys(), losses.values(), ".-", color=color, label=f"width {width}")
            axis.plot(best, losses[best], "o", markersize=10, markerfacecolor="none", color=color)
        axis.set_ylim(lowest - 0.05, highest + 0.05)
        axis.xaxis.set_major_locator(MultipleLocator(1))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:.0f}}}$"))
        axis.set_title("muP" if name == "muP" else f"{name} parametrization")
        axis.set_xlabel("learning rate" if name == "standard" else "learning rate at base width")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out loss, nats a byte")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def report(results: dict[str, dict[int, dict[int, float]]]) -> None:
    """Losses and optima as Markdown tables, and how far each optimum moves."""
    for name, widths in results.items():
        columns = sorted({log2_lr for losses in widths.values() for log2_lr in losses})
        print(f"\n{name}: held-out loss in nats a byte, by width and log2 of the learning rate\n")
        print(
            f"| width | {' | '.join(map(str, columns))} | best | of the parabola | loss |\n|---{'|---' * len(columns)}",
            end="",
        )
        print("|---|---|---|")
        bests = {width: min(losses, key=lambda log2_lr: losses[log2_lr]) for width, losses in widths.items()}
        for width, losses in widths.items():
            cells = [
                (f"**{losses[column]:.3f}**" if column == bests[width] else f"{losses[column]:.3f}")
                if column in losses
                else ""
                for column in columns
            ]
            place, loss = vertex(losses)
            print(f"| {width} | {' | '.join(cells)} | {bests[width]} | {place:.2f} | {loss:.3f} |")
        places = {width: vertex(losses)[0] for width, losses in widths.items()}
        first, last = min(widths), max(widths)
        print(
            f"\n{name}: the best power of two is from 2^{min(bests.values())} to 2^{max(bests.values())} (grid steps: "
            f"{max(bests.values()) - min(bests.values())}); from width {first} to {last} the lowest point of the "
            f"parabola moves by {places[last] - places[first]:+.2f} grid steps."
        )
        # What it costs to tune at the narrowest width and train the widest one.
        if (copied := widths[last].get(bests[first])) is not None:
            print(
                f"Width {last} at the best learning rate of width {first}: {copied - min(widths[last].values()):+.3f}."
            )
        else:
            print(f"Width {last} was not trained at the best learning rate of width {first}: too far from its own.")


def main() -> None:
    """Train what is missing, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="files or folders of documents")
    parser.add_argument("--output", type=Path, default=Path("runs/mup"), help="folder of the results")
    names = list(PARAMETRIZATIONS)
    parser.add_argument("--parametrizations", nargs="+", choices=names, default=names)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--neighbours", type=int, default=2, help="at least 1")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warmup-steps", type=int, default=15)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--megabytes", type=float, default=4, help="text of each source")
    parser.add_argument("--eval-tokens", type=int, default=10_880, help="held-out tokens of each source")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.input:
        print("Nothing is measured without documents: give --input.")
        return
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    stream = ByteStream(args.input, int(args.megabytes * 1e6))
    setting = {key: getattr(args, key) for key in ("steps", "warmup_steps", "batch_tokens", "eval_tokens", "seed")}
    setting["data"] = "".join(stream.fingerprint(split)[:8] for split in ("train", "validation"))
    file = args.output / "runs.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def loss_at(here: Run, log2_lr: int) -> float:
        run = measure({**here, "log2_lr": log2_lr}, stream, args)
        done.append(run)
        with file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
        print(
            f"{here['parametrization']} {here['width']} 2^{log2_lr}: {run['loss']:.4f} in {run['seconds']} s",
            flush=True,
        )
        return float(run["loss"])

    results: dict[str, dict[int, dict[int, float]]] = {name: {} for name in args.parametrizations}
    best = dict(START)
    for width in sorted(args.widths):
        for name, widths in results.items():
            here = {"parametrization": name, "width": width, **setting}
            known = {run["log2_lr"]: run["loss"] for run in done if here.items() <= run.items()}
            losses = widths[width] = sweep(best[name], args.neighbours, known, partial(loss_at, here))
            best[name] = min(losses, key=lambda log2_lr: losses[log2_lr])
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, bf16, {args.steps} steps of ", end="")
    print(f"{args.batch_tokens:,} bytes in rows of {SEQUENCE_LENGTH}")
    report(results)
    plot(results, args.output / "loss.png")


if __name__ == "__main__":
    main()
