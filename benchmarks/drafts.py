"""The speed of text with a draft, as a function of how many of its guesses are right.

    python benchmarks/drafts.py [--model FOLDER --draft FOLDER] [--right 0 0.5 0.7 0.9] [--streams 1 4]
    python benchmarks/drafts.py --model FOLDER --draft FOLDER --text FILE [--streams 1 4] [--guesses 1]

At the shape of BTLM-3B with a draft of the sizes of Cerebras-GPT-111M (768 wide, 10 layers, 12 heads), in four bits
with random weights, unless folders are given. The draft reads and guesses as always, which takes its time, but this
program replaces what it guesses: by the token that the model will write, with the given probability, else by another
one. Each turn writes the texts once without the draft and once with it, in the same engine; the speed is that of the
tokens after the first ones, until the first text ends. Printed are medians over the turns, and the ratio per turn.

With ``--text`` the guesses are the draft's own: prompts come from all over a text, and each turn continues others,
greedily and with samples. ``--guesses`` fixes their number per step, which otherwise follows from what they cost: with
one guess, the share of right ones is that of the tokens on which the models agree.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_inputs import SIZES, add_smoke

from btlm.checkpoint import Checkpoint
from btlm.engine import Engine, GenerationOptions
from btlm.engine.request import Request
from btlm.evaluate.random_checkpoint import SHAPES, write_random_model
from btlm.generate.text import encode

DRAFT_SIZES = {"n_embd": 768, "n_layer": 10, "n_head": 12, "n_inner": 2048}  # SwiGLU of 2,048 has GELU's 3,072 weights


def write(
    engine: Engine, prompts: Sequence[list[int]], new: int, draft: bool, **rules: Any
) -> tuple[float, list[list[int]], list[Request]]:
    """Write the texts together; returns tokens per second while all are written, the texts, and the requests."""
    options = GenerationOptions(max_new_tokens=new, lookup_tokens=0, draft_tokens=8 if draft else 0, **rules)
    running = [engine.add(prompt, options, stop_ids=frozenset()) for prompt in prompts]
    while any(request.new_tokens == 0 for request in running):
        engine.step()
    start, before = time.perf_counter(), sum(request.new_tokens for request in running)
    while all(request.finished is None for request in running):
        engine.step()
    seconds = time.perf_counter() - start
    speed = (sum(request.new_tokens for request in running) - before) / seconds
    while any(request.finished is None for request in running):
        engine.step()
    return speed, [request.ids for request in running], running


def impose(engine: Engine, texts: Sequence[list[int]], right: float) -> None:
    """Let guesses be right with a probability."""
    assert engine.draft is not None
    rng = np.random.default_rng(0)

    def choose(before: Sequence[int], guess: int) -> int:
        true = next(text for text in texts if text[0] == before[0])[len(before)]
        return true if rng.random() < right else (true + 1) % engine.architecture.vocab_size

    engine.draft.choose = choose  # type: ignore[method-assign]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="instead of random weights of BTLM-3B's shape")
    parser.add_argument("--draft", type=Path, metavar="FOLDER", help="instead of a random draft")
    parser.add_argument("--right", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.9], help="shares of right guesses")
    parser.add_argument("--text", type=Path, help="text file to continue, with the guesses of the draft itself")
    parser.add_argument("--guesses", type=int, help="guesses per step with --text (default: as many as pay)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1], help="texts at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a text")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_smoke(parser)
    args = parser.parse_args()
    shape, small = SHAPES["btlm-3b"], {**SHAPES["btlm-3b"], **DRAFT_SIZES}
    if args.smoke:
        args.prompt, args.new, args.turns = 8, 8, 1
        shape, small = {**SIZES, "n_layer": 2}, SIZES
    with tempfile.TemporaryDirectory(prefix="btlm-drafts-") as name:
        folders = {"model": args.model, "draft": args.draft}
        for kind, sizes in (("model", shape), ("draft", small)):
            if folders[kind] is None:
                folders[kind] = Path(name) / kind
                folders[kind].mkdir()
                write_random_model(folders[kind], sizes, "4bit")
        engine = Engine.open(
            folders["model"],
            draft=folders["draft"],
            context=args.prompt + args.new,
            num_requests=max(args.streams),
            threads=args.threads,
        )
        print("| texts | right guesses | accepted per guess | alone, tokens/s | with draft | ratio | lowest, highest |")
        print("|---|---|---|---|---|---|---|")
        for streams in args.streams:
            if args.text is None:
                measure_imposed(engine, streams, args)
            else:
                measure_text(
                    engine, streams, encode(Checkpoint.open(folders["model"]).tokenizer, args.text.read_text()), args
                )


def measure_imposed(engine: Engine, streams: int, args: argparse.Namespace) -> None:
    """Print a row for each share of right guesses."""
    rng = np.random.default_rng(0)
    vocabulary = engine.architecture.vocab_size
    prompts = [[first, *rng.integers(0, vocabulary, args.prompt - 1).tolist()] for first in range(streams)]
    _, texts, _ = write(engine, prompts, args.new, draft=False)
    for right in args.right:
        impose(engine, [[*text, 0] for text in texts], right)
        compare(engine, [prompts] * args.turns, args.new, f"{right:.0%}")


def measure_text(engine: Engine, streams: int, ids: list[int], args: argparse.Namespace) -> None:
    """Print a row for greedy text and one for samples."""
    places = np.linspace(0, len(ids) - args.prompt, args.turns * streams).astype(int)
    prompts = [ids[place : place + args.prompt] for place in places]
    turns = [prompts[turn :: args.turns] for turn in range(args.turns)]
    if args.guesses is not None:
        assert engine.draft is not None
        engine.draft.costs.best = lambda share, most, writing: min(most, args.guesses)  # type: ignore[method-assign]
    compare(engine, turns, args.new, "its own, greedy")
    compare(engine, turns, args.new, "its own, temperature 1", temperature=1.0, seed=1)
    compare(engine, turns, args.new, "its own, temperature 0.8, top-p 0.95", temperature=0.8, top_p=0.95, seed=1)


def compare(engine: Engine, turns: Sequence[Sequence[list[int]]], new: int, title: str, **rules: Any) -> None:
    """Write the texts of each turn without the draft and with it, and print a row."""
    alone, drafted, ratios, guessed, accepted = [], [], [], 0, 0
    for prompts in turns:
        speed, texts, _ = write(engine, prompts, new, draft=False, **rules)
        alone.append(speed)
        speed, written, requests = write(engine, prompts, new, draft=True, **rules)
        assert written == texts, "the draft has changed the text"
        drafted.append(speed)
        ratios.append(drafted[-1] / alone[-1])
        guessed += sum(request.draft.guessed for request in requests)
        accepted += sum(request.draft.accepted for request in requests)
    share = accepted / max(guessed, 1)
    speeds = f"{statistics.median(alone):.1f} | {statistics.median(drafted):.1f} | {statistics.median(ratios):.2f}"
    bounds = f"{min(ratios):.2f}, {max(ratios):.2f}"
    print(f"| {len(turns[0])} | {title} | {share:.2f} of {guessed} | {speeds} | {bounds} |", flush=True)


if __name__ == "__main__":
    main()
