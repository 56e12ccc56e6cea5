"""Does the best learning rate stay where it is as the model gets wider? Loss against learning rate, on real text.

    python benchmarks/mup_learning_rate.py --input corpus/ --output runs/mup [--widths 64 128 256 512] [--steps 600]
        [--trials 24 | --values INIT EMB OUT --base-width 64] [--seeds 3] [--device cuda] [--together 16]

Trains models of two layers and one head size on bytes (``byte_stream.py``), in muP and in standard parametrization
(GPT-2's: the same standard deviation and learning rate for the matrices of every width, scores over the square root of
the head dimension). Both have an initialization, an embedding multiplier and an output multiplier, tuned for each at
the narrowest width by the same random search of ``--trials`` trials (learning rates are drawn too); the narrowest width
is the base width of muP. ``--values`` replaces the search: it gives both parametrizations their initialization,
embedding multiplier and output multiplier, found at ``--base-width``. With ``--trials 0``, muP has BTLM's values at
base width 256, and the standard parametrization GPT-2's. Then each is trained at every width with learning rates at
powers of two, first on the grid of ``--grid``, then on until both neighbours of the best learning rate are worse, so
that no optimum lies on an edge. Further seeds are run at the best learning rate of each width, at its neighbours, and
at the learning rate that was best at the narrowest width. A seed changes the weights and the order of the data.

All runs of a seed read the same batches, and the held-out loss is of the same text, every source counting the same. A
run that diverges counts as worse than any. On a GPU, runs of one width are trained side by side
(``models_together.py``). ``--output`` gets ``runs.jsonl``, one line per run, and ``loss.png``.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_stream import END_OF_TEXT, VOCAB_SIZE, ByteStream
from models_together import train_together
from tiny_inputs import add_smoke, write_documents

from btlm.plots import pyplot, save_figure
from btlm.train import Recipe
from btlm.train.recipe import Checkpoints, Evaluation, Optimizer, Precision, Schedule, Stage, Watching

HEAD_DIM = 32
SEQUENCE_LENGTH = 256
# Without tuning: the values of BTLM, which hold at width 256, and those of GPT-2.
BASE_WIDTH = 256
VALUES = {
    "muP": {"initializer_range": 0.073, "mup_embeddings_scale": 14.6, "mup_output_alpha": 2.22},
    "standard": {"initializer_range": 0.02, "mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0},
}
# Ranges of the search; values are drawn log-uniformly.
SPACE = {
    "lr": (2.0**-11, 2.0**-4),
    "initializer_range": (0.01, 0.3),
    "mup_embeddings_scale": (1.0, 30.0),
    "mup_output_alpha": (0.3, 10.0),
}
Run = dict[str, Any]
# By width, then log2 of the learning rate: the losses of all seeds, the first seed first.
Losses = dict[int, dict[int, list[float]]]


def recipe(run: Run, args: argparse.Namespace) -> Recipe:
    """One training run, evaluated at its end."""
    width = run["width"]
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
        "mup_width_scale": run["base_width"] / width if run["parametrization"] == "muP" else 1.0,
        "mup_scale_qk_dot_by_d": run["parametrization"] == "muP",
        **{name: value for name, value in run["values"].items() if name != "lr"},
    }
    tokens = args.steps * args.batch_tokens
    return Recipe(
        model=model,
        optimizer=Optimizer(lr=run["values"]["lr"]),
        schedule=Schedule(warmup_tokens=args.warmup_steps * args.batch_tokens),
        stages=[Stage(SEQUENCE_LENGTH, args.batch_tokens, tokens)],
        micro_batch_tokens=args.batch_tokens,
        seed=run["seed"],
        evaluation=Evaluation(every_tokens=2 * tokens, tokens_per_source=args.eval_tokens),
        checkpoints=Checkpoints(every_steps=2 * args.steps),
        watching=Watching(tensorboard=False),
        precision=Precision(dtype=args.dtype),
    )


class Runs:
    """The runs of a sweep: those on file, and the means to train what is missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._file = args.output / "runs.jsonl"
        self._stream = ByteStream(args.input, int(args.megabytes * 1e6))
        self._setting = {key: getattr(args, key) for key in ("steps", "warmup_steps", "batch_tokens", "eval_tokens")}
        self._setting["data"] = "".join(self._stream.fingerprint(split)[:8] for split in ("train", "validation"))
        self._known: dict[str, float] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            run = json.loads(line)
            if run["setting"] == self._setting:
                self._known[_key(run)] = run["loss"]

    def losses(self, runs: Iterable[Run]) -> list[float]:
        """Held-out losses in nats per byte, in the order of the runs; infinite where one diverged."""
        runs = list(runs)
        missing = {_key(run): run for run in runs if _key(run) not in self._known}
        device = torch.device(self._args.device)
        at_once = self._args.together if device.type == "cuda" else 1
        for _, group in groupby(sorted(missing.values(), key=_width), key=_width):
            of_width = list(group)
            for start in range(0, len(of_width), at_once):
                part = of_width[start : start + at_once]
                losses = train_together([recipe(run, self._args) for run in part], self._stream, device)
                for run, loss in zip(part, losses, strict=True):
                    self._keep(run, loss)
        return [self._known[_key(run)] for run in runs]

    def _keep(self, run: Run, loss: float) -> None:
        self._known[_key(run)] = loss
        with self._file.open("a") as lines:
            lines.write(json.dumps({**run, "setting": self._setting, "loss": loss}) + "\n")
        values = "  ".join(f"{name} {value:.4g}" for name, value in run["values"].items())
        print(f"{run['parametrization']} {run['width']} seed {run['seed']}  {values}: {loss:.4f}", flush=True)


def _key(run: Run) -> str:
    return json.dumps({key: value for key, value in run.items() if key not in ("setting", "loss")}, sort_keys=True)


def _width(run: Run) -> int:
    return int(run["width"])


def tune(runs: Runs, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The best values of each parametrization at the narrowest width, without the learning rate; by random search."""
    rng = np.random.default_rng(1)
    draws = [
        {name: float(f"{np.exp(rng.uniform(*np.log(limits))):.4g}") for name, limits in SPACE.items()}
        for _ in range(args.trials)
    ]
    width = args.widths[0]
    trials = [
        {"parametrization": name, "width": width, "base_width": width, "seed": 1, "values": values}
        for name in VALUES
        for values in draws
    ]
    losses = runs.losses(trials)
    print(
        "\n| parametrization | learning rate | initialization | embeddings x | logits x | loss at width", width, end=""
    )
    print(f" | best of |\n|---{'|---' * 6}|")
    best = {}
    for i, name in enumerate(VALUES):
        of_name = losses[i * len(draws) : (i + 1) * len(draws)]
        place = int(np.argmin(of_name))
        best[name] = {key: value for key, value in draws[place].items() if key != "lr"}
        print(f"| {name} | {' | '.join(map(str, draws[place].values()))} | {of_name[place]:.4f} | {len(draws)} |")
    return best


def values_and_base_width(runs: Runs, args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], int]:
    """The values of each parametrization, without the learning rate, and the base width of muP."""
    if args.values:
        given = {name: dict(zip(defaults, args.values, strict=True)) for name, defaults in VALUES.items()}
        return given, args.base_width or args.widths[0]
    return (tune(runs, args), args.widths[0]) if args.trials else (VALUES, BASE_WIDTH)


def sweep(runs: Runs, args: argparse.Namespace) -> dict[str, Losses]:
    """Losses by parametrization, width and log2 of the learning rate."""
    values_of, base_width = values_and_base_width(runs, args)

    def run(name: str, width: int, log2_lr: int, seed: int) -> Run:
        values = {**values_of[name], "lr": 2.0**log2_lr}
        return {"parametrization": name, "width": width, "base_width": base_width, "seed": seed, "values": values}

    wanted = {
        (name, width, log2_lr, 1)
        for name in VALUES
        for width in args.widths
        for log2_lr in range(args.grid[0], args.grid[1] + 1)
    }
    while True:
        found = sorted(wanted)
        losses = runs.losses(run(*place) for place in found)
        results: dict[str, Losses] = {name: {width: {} for width in args.widths} for name in VALUES}
        for (name, width, log2_lr, _), loss in zip(found, losses, strict=True):
            results[name][width].setdefault(log2_lr, []).append(loss)
        more = set()
        for name, widths in results.items():
            first = best_rate(widths[args.widths[0]])
            for width, by_rate in widths.items():
                best = best_rate(by_rate)
                more |= {(name, width, near, 1) for near in (best - 1, best + 1, first)}
                for seed in range(2, args.seeds + 1):
                    more |= {(name, width, near, seed) for near in (best - 1, best, best + 1, first)}
        more = {place for place in more if place[3] > 1 or place not in wanted} - wanted
        # Where the first seed is not finished, the others wait: their places follow from it.
        edges = {place for place in more if place[3] == 1}
        if not more:
            return {
                name: {width: dict(sorted(by_rate.items())) for width, by_rate in widths.items()}
                for name, widths in results.items()
            }
        wanted |= edges or more


def best_rate(by_rate: dict[int, list[float]]) -> int:
    """log2 of the learning rate with the lowest loss, by the mean over seeds among those with the most seeds."""
    most = max(map(len, by_rate.values()))
    return min(
        (rate for rate in by_rate if len(by_rate[rate]) == most), key=lambda rate: statistics.fmean(by_rate[rate])
    )


def vertex(by_rate: dict[int, list[float]]) -> tuple[float, float]:
    """Where the parabola through the best mean loss and its two neighbours is lowest, and how low."""
    best = best_rate(by_rate)
    left, middle, right = (statistics.fmean(by_rate.get(best + step, [math.inf])) for step in (-1, 0, 1))
    if not math.isfinite(left + right):
        return float(best), middle
    slope, curvature = (right - left) / 2, left - 2 * middle + right
    return best - slope / curvature, middle - slope**2 / (2 * curvature)


def mean_and_error(losses: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; the error is NaN for one seed."""
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return statistics.fmean(losses), error


def plot(results: dict[str, Losses], path: Path) -> None:
    """A panel for each parametrization, a curve for each width, a ring at the best learning rate of each."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    plt = pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(9, 4.2), layout="constrained", sharey=True, squeeze=False)
    means = [
        statistics.fmean(losses)
        for widths in results.values()
        for rates in widths.values()
        for losses in rates.values()
    ]
    lowest = min(means)
    highest = max(loss for loss in means if loss < lowest + 1.0)
    for axis, (name, widths) in zip(axes[0], results.items(), strict=True):
        for i, (width, rates) in enumerate(widths.items()):
            color = plt.get_cmap("viridis")(0.9 - 0.9 * i / max(1, len(widths) - 1))
            best = best_rate(rates)
            centers = [statistics.fmean(losses) for losses in rates.values()]
            spread = [max(losses) - min(losses) for losses in rates.values()]
            axis.errorbar(
                rates.keys(),
                centers,
                yerr=np.nan_to_num(spread) / 2,
                fmt=".-",
                color=color,
                capsize=2,
                label=f"width {width}",
            )
            axis.plot(best, statistics.fmean(rates[best]), "o", markersize=10, markerfacecolor="none", color=color)
        axis.set_ylim(lowest - 0.05, highest + 0.05)
        axis.xaxis.set_major_locator(MultipleLocator(1))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:.0f}}}$"))
        axis.set_title("muP" if name == "muP" else f"{name} parametrization")
        axis.set_xlabel("learning rate" if name == "standard" else "learning rate at base width")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out loss, nats per byte (bars: range over seeds)")
    axes[0, 0].legend(frameon=False)
    save_figure(figure, path, dpi=150)


def report(results: dict[str, Losses]) -> None:
    """Losses and optima as Markdown tables, and how far each optimum moves."""
    for name, widths in results.items():
        columns = sorted({rate for rates in widths.values() for rate in rates})
        print(f"\n{name}: held-out loss in nats per byte, by width and log2 of the learning rate, mean of the seeds\n")
        print(f"| width | {' | '.join(map(str, columns))} | lowest point of the parabola | its loss |")
        print(f"|---{'|---' * len(columns)}|---|---|")
        for width, rates in widths.items():
            best, cells = best_rate(rates), []
            for column in columns:
                text = f"{statistics.fmean(rates[column]):.3f}" if column in rates else ""
                cells.append(f"**{text}**" if column == best else text)
            place, loss = vertex(rates)
            print(f"| {width} | {' | '.join(cells)} | {place:.2f} | {loss:.3f} |")
    print("\n| parametrization | width | best rate | loss there | loss at the rate of the narrowest width | seeds |")
    print("|---|---|---|---|---|---|")
    for name, widths in results.items():
        first = best_rate(widths[min(widths)])
        for width, rates in widths.items():
            best = best_rate(rates)
            cells = []
            for rate in (best, first):
                mean, error = mean_and_error(rates[rate]) if rate in rates else (math.nan, math.nan)
                cells.append(f"{mean:.4f} ± {error:.4f}")
            print(f"| {name} | {width} | 2^{best} | {' | '.join(cells)} | {len(rates[best])} |")
    for name, widths in results.items():
        bests = {width: best_rate(rates) for width, rates in widths.items()}
        places = {width: vertex(rates)[0] for width, rates in widths.items()}
        first, last = min(widths), max(widths)
        print(
            f"\n{name}: the best power of two lies between 2^{min(bests.values())} and 2^{max(bests.values())} (grid "
            f"steps: {max(bests.values()) - min(bests.values())}); from width {first} to {last} the lowest point of "
            f"the parabola moves by {places[last] - places[first]:+.2f} grid steps."
        )


def main() -> None:
    """Train what is missing, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="files or folders of documents")
    parser.add_argument("--output", type=Path, default=Path("runs/mup"), help="folder of the results")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--grid", type=int, nargs=2, default=[-11, -5], help="log2 of the learning rates at first")
    parser.add_argument("--trials", type=int, default=24, help="trials of the search, for each parametrization")
    values = "initialization, embedding and output multiplier of both parametrizations; nothing is searched"
    parser.add_argument("--values", type=float, nargs=3, metavar=("INIT", "EMB", "OUT"), help=values)
    parser.add_argument("--base-width", type=int, help="width at which --values were found (default: the narrowest)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds near the optimum")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="bytes per step")
    parser.add_argument("--megabytes", type=float, default=4, help="text of each source")
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="held-out tokens of each source")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the products; float32 where bf16 is slow")
    parser.add_argument("--together", type=int, default=16, help="models that a GPU trains side by side")
    add_smoke(parser)
    args = parser.parse_args()
    if args.base_width and not args.values:
        parser.error("--base-width belongs to --values, which are missing.")
    if args.smoke:
        args.widths, args.grid, args.seeds, args.trials = [32, 64], [-7, -7], 1, 1
        args.steps, args.warmup_steps, args.batch_tokens, args.eval_tokens, args.dtype = 2, 1, 256, 512, "float32"
        with tempfile.TemporaryDirectory() as folder:
            args.input, args.output = [str(write_documents(Path(folder)))], Path(folder) / "output"
            measure_all(args)
        return
    if not args.input:
        print("Nothing is measured without documents: give --input.")
        return
    measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Sweep and report."""
    args.widths.sort()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(args)
    results = sweep(runs, args)
    print(f"\ntorch {torch.__version__}, {args.device}, {args.dtype}; ", end="")
    print(f"{args.steps} steps of {args.batch_tokens:,} bytes in rows of {SEQUENCE_LENGTH}")
    report(results)
    plot(results, args.output / "loss.png")


if __name__ == "__main__":
    main()
