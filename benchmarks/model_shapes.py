"""Which shape makes the best small model in a given training time? Trains shapes equally long; prints held-out loss.

    python benchmarks/model_shapes.py recipes/btlm-tiny.yaml --data data/shards --output runs/shapes --seconds 1800
        --shapes 256x6x4 256x12x4 384x4x6 [--seeds 2] [--together] [--device cuda]

A shape is WIDTHxLAYERSxHEADS; the inner width of the feed-forward network is 8/3 of the width. Each shape first trains
for some seconds to measure its speed, then trains by the recipe with as many tokens as that speed makes in
``--seconds``, so that its learning-rate schedule comes to its end. With ``--together`` all shapes and seeds train at
the same time and share the machine; otherwise one after the other, which is about as fast on a GPU.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import add_smoke, write_shards
from transformers.utils import logging

from btlm.data import TokenShards
from btlm.train import Recipe, load_recipe, train
from btlm.train.held_out import token_bytes
from btlm.train.recipe import Checkpoints, Evaluation, Watching

SMOKE_RECIPE = """
model: {vocab_size: 50257, n_positions: 128, activation_function: swiglu, position_embedding_type: alibi}
optimizer: {lr: 1.0e-3}
schedule: {warmup_tokens: 128}
stages:
  - {sequence_length: 64, batch_tokens: 128, tokens: 768}
  - {sequence_length: 128, batch_tokens: 128, tokens: 256}
precision: {dtype: float32}
evaluation: {tokens_per_source: 256}
"""
_barrier: Any = None


def shaped(recipe: Recipe, shape: str, tokens_per_stage: list[int]) -> Recipe:
    """The recipe with another shape and other numbers of tokens, whole steps of each stage."""
    width, layers, heads = map(int, shape.split("x"))
    model = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": round(8 / 3 * width)}
    stages = [
        replace(stage, tokens=max(1, tokens // stage.batch_tokens) * stage.batch_tokens)
        for stage, tokens in zip(recipe.stages, tokens_per_stage, strict=True)
    ]
    total = sum(stage.tokens for stage in stages)
    return replace(
        recipe,
        model=recipe.model | model,
        stages=stages,
        schedule=replace(recipe.schedule, warmup_tokens=min(recipe.schedule.warmup_tokens, total // 10)),
        evaluation=Evaluation(every_tokens=2 * total, tokens_per_source=recipe.evaluation.tokens_per_source),
        checkpoints=Checkpoints(every_steps=10**9),
        watching=Watching(tensorboard=False),
    )


def _share(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def speed_of(recipe: Recipe, stage: int, shards: TokenShards, folder: Path, args: argparse.Namespace) -> float:
    """Tokens per second in the rows of one stage; runs that share the machine measure it at the same time."""
    probing = replace(recipe, stages=[replace(recipe.stages[stage], tokens=10**9 * recipe.stages[stage].batch_tokens)])
    if _barrier is not None:
        _barrier.wait()
    started, speeds = time.perf_counter(), []
    for record in train(probing, shards, folder, token_bytes(), args.device):
        speeds.append(record["tokens_per_s"])
        if time.perf_counter() - started > args.probe_seconds and len(speeds) >= 4:
            break
    median: float = statistics.median(speeds[len(speeds) // 2 :])
    return median


def measure(run: tuple[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Probe the speed of a shape, train it with a seed, and return its held-out loss."""
    logging.disable_progress_bar()
    shape, seed = run
    name = f"{shape}-{seed}"
    recipe, shards = replace(load_recipe(args.recipe), seed=seed), TokenShards(args.data, verify=False)
    wanted = [stage.tokens for stage in recipe.stages]
    probing = replace(shaped(recipe, shape, wanted), evaluation=Evaluation(every_tokens=10**18))
    speeds = [speed_of(probing, i, shards, args.output / f"probe-{name}-{i}", args) for i in range(len(wanted))]
    # As many tokens as take the time, in the proportions of the recipe's stages.
    seconds = sum(tokens / speed for tokens, speed in zip(wanted, speeds, strict=True))
    recipe = shaped(recipe, shape, [round(tokens * args.seconds / seconds) for tokens in wanted])
    if _barrier is not None:
        _barrier.wait()
    records = list(train(recipe, shards, args.output / name, token_bytes(), args.device))
    spent, before = 0.0, 0
    for record in records:
        spent += (record["tokens"] - before) / record["tokens_per_s"]
        before = record["tokens"]
    result = {
        "shape": shape,
        "seed": seed,
        "parameters": recipe.config.num_parameters(),
        "tokens": records[-1]["tokens"],
        "seconds": spent,
        "tokens_per_s": speeds,
        "bits_per_byte": records[-1]["bits_per_byte"],
    }
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{shape}, seed {seed}: {result['bits_per_byte']['mean']:.4f} bits per byte after {before:,} tokens "
        f"in {spent:.0f} s",
        flush=True,
    )
    return result


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="recipe that all shapes are trained by")
    parser.add_argument("--data", help="folder of token shards")
    parser.add_argument("--output", type=Path, default=Path("runs/shapes"), help="folder of the results")
    parser.add_argument("--shapes", nargs="+", default=["256x6x4", "256x12x4", "384x4x6"])
    parser.add_argument("--seconds", type=float, default=1800, help="time of training of each shape")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each shape")
    parser.add_argument("--probe-seconds", type=float, default=60, help="time that measures the speed in each stage")
    parser.add_argument("--together", action="store_true", help="train all shapes and seeds at the same time")
    parser.add_argument("--device", default="cpu", help="torch device")
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.seconds, args.probe_seconds = ["32x1x1", "32x2x2"], 0.2, 0.1
        with tempfile.TemporaryDirectory() as folder:
            args.recipe, args.output = Path(folder) / "recipe.yaml", Path(folder) / "output"
            args.recipe.write_text(SMOKE_RECIPE)
            args.data = write_shards(Path(folder))
            measure_all(args)
        return
    if not args.recipe or not args.data:
        print("Nothing is measured without a recipe and shards: give RECIPE and --data.")
        return
    measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Train the shapes, and print the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    runs = [(shape, seed) for shape in args.shapes for seed in range(1, args.seeds + 1)]
    if args.together:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(len(runs))
        with ProcessPoolExecutor(len(runs), context, initializer=_share, initargs=(barrier,)) as pool:
            results = list(pool.map(measure, runs, [args] * len(runs)))
    else:
        results = [measure(run, args) for run in runs]
    print(f"\ntorch {torch.__version__}, {args.device}, {args.seconds:g} s of training each\n")
    sources = list(results[0]["bits_per_byte"])
    print(
        f"| shape | seed | parameters | tokens | seconds | {' | '.join(sources)} |\n"
        f"|---|---|---|---|---{'|---' * len(sources)}|"
    )
    for result in results:
        losses = " | ".join(f"{value:.4f}" for value in result["bits_per_byte"].values())
        print(
            f"| {result['shape']} | {result['seed']} | {result['parameters'] / 1e6:.1f} M "
            f"| {result['tokens'] / 1e6:.1f} M | {result['seconds']:.0f} | {losses} |"
        )


if __name__ == "__main__":
    main()
