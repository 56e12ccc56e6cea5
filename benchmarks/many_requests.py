"""Requests that share an engine: how long streams wait beside a long prompt, and what shared beginnings save.

    python benchmarks/many_requests.py [--model FOLDER] [--prompt 7000] [--streams 8] [--patience 1.6 2]

At BTLM-3B's shape with random 4-bit weights, unless a folder is given:

- streams: texts are being written when a long prompt arrives. The time of a step is what every stream waits for its
  next token. It is measured before the prompt arrives and while it is read, with values of the option ``patience`` of
  the engine, which bounds the prompt tokens of a step, and without it.
- continuations: several samples of one prompt, added together, against the same requests one after the other in an
  empty engine: seconds until all have their first token, and pages of the cache that are in use.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny_inputs import SIZES, add_smoke

from btlm.engine import Engine, GenerationOptions
from btlm.evaluate.random_checkpoint import SHAPES, write_random_model

SHARED = 512  # tokens of the prompt of the continuations


def steps(engine: Engine, until: Any) -> list[float]:
    """Seconds of each step until something holds."""
    seconds = []
    while not until():
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def beside_a_long_prompt(engine: Engine, args: argparse.Namespace, patience: float | None) -> str:
    """A row: what streams wait before and while a long prompt is read."""
    rng = np.random.default_rng(0)
    options = GenerationOptions(max_new_tokens=args.new, lookup_tokens=0)
    streams = [
        engine.add(rng.integers(0, args.vocabulary, 32).tolist(), options, stop_ids=frozenset())
        for _ in range(args.streams)
    ]
    steps(engine, lambda: all(stream.new_tokens for stream in streams))
    wanted = streams[0].new_tokens + args.steps
    usual = statistics.median(steps(engine, lambda: streams[0].new_tokens >= wanted))
    one = GenerationOptions(max_new_tokens=1)
    long = engine.add(rng.integers(0, args.vocabulary, args.prompt).tolist(), one, stop_ids=frozenset())
    waits = steps(engine, lambda: long.finished)
    for stream in streams:
        engine.remove(stream)
    bound = "without a bound" if patience is None else f"patience {patience:g}"
    name = f"{args.streams} streams, {args.prompt:,} tokens, {bound}"
    times = [usual, statistics.median(waits), float(np.quantile(waits, 0.99)), max(waits)]
    shown = " | ".join(f"{value * 1e3:.0f}" for value in times)
    return f"| {name} | {shown} | {max(waits) / usual:.1f} | {sum(waits):.1f} |"


def continuations(engine: Engine, args: argparse.Namespace, together: bool) -> str:
    """A row: several samples of one prompt, together or one after the other."""
    prompt = np.random.default_rng(1).integers(0, args.vocabulary, args.shared).tolist()
    start, running = time.perf_counter(), []
    for seed in range(args.streams):
        options = GenerationOptions(max_new_tokens=32, temperature=1.0, seed=seed, lookup_tokens=0)
        ids = prompt if together else [seed, *prompt[1:]]  # nothing in common
        running.append(engine.add(ids, options, stop_ids=frozenset()))
    steps(engine, lambda: all(request.new_tokens for request in running))
    seconds = time.perf_counter() - start
    pages = engine.cache.num_pages - engine.cache.free_pages
    for request in running:
        engine.remove(request)
    kind = "of one prompt" if together else "of different prompts"
    return f"| {args.streams} requests {kind} of {args.shared} tokens | {seconds:.1f} | {pages} |"


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="instead of random weights of BTLM-3B's shape")
    parser.add_argument("--prompt", type=int, default=7000, help="tokens of the long prompt")
    parser.add_argument("--streams", type=int, default=8, help="number of requests that are being written")
    parser.add_argument("--steps", type=int, default=20, help="steps from which the usual wait is taken")
    parser.add_argument("--patience", type=float, nargs="*", default=[1.6, 2], help="(default: 1.6 2)")
    parser.add_argument("--threads", type=int, default=2)
    add_smoke(parser)
    args = parser.parse_args()
    args.shared, args.new = SHARED, 2000
    if args.smoke:
        args.prompt, args.shared, args.new, args.steps = 60, 20, 60, 5
    with tempfile.TemporaryDirectory(prefix="btlm-requests-") as name:
        model = args.model
        if model is None:
            model = Path(name) / "model"
            model.mkdir()
            write_random_model(model, SIZES if args.smoke else SHAPES["btlm-3b"], "4bit")

        def opened(patience: float | None) -> Engine:
            engine = Engine.open(
                model,
                context=max(args.prompt, args.new) + 128,
                num_requests=args.streams + 1,
                cache_tokens=args.prompt + (args.streams + 1) * (args.new + 128),
                patience=patience,
                threads=args.threads,
            )
            args.vocabulary = engine.architecture.vocab_size
            return engine

        print("| milliseconds per step | usual | median | p99 | longest | over usual | prompt read in s |")
        print("|---|---|---|---|---|---|---|")
        for patience in (*args.patience, None):
            print(beside_a_long_prompt(opened(patience), args, patience), flush=True)
        print("\n| | first tokens of all, s | pages in use |\n|---|---|---|")
        for together in (True, False):
            print(continuations(opened(None), args, together), flush=True)


if __name__ == "__main__":
    main()
