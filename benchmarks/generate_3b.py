"""Speed and peak memory of generating with BTLM-3B-8k's shape, with random weights in bf16, by torch and Transformers.

    python benchmarks/generate_3b.py [--device cuda] [--prompts 512] [--new 32] [--repeats 3]

On a GPU, the rows are: Transformers' `generate` with a growing cache; with a static cache, whose steps are compiled and
captured in CUDA graphs, as `btlm generate` does; and the same with the blocks in torchao's four bits, if torchao is
installed. On a CPU there is only the first. The weights that a decoded token reads, per second, are stated beside the
rate at which the device copies memory, counting the bytes that are read and those that are written.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tiny_inputs import SIZES, add_smoke
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from btlm import BTLMConfig, BTLMLMHeadModel
from btlm.generate.cuda import to_int4
from btlm.train import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "btlm-3b.yaml"
GROUP_SIZE = 128


class _Clock(BaseStreamer):
    """Notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token, which is on the CPU."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def random_model(config: BTLMConfig, device: torch.device) -> BTLMLMHeadModel:
    """Random weights in bf16. The cost of a token does not depend on their values."""
    with torch.device("meta"):
        model = BTLMLMHeadModel(config)
    cast(Any, model).to(torch.bfloat16).to_empty(device=device).eval()
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def measure(model: BTLMLMHeadModel, static: bool, prompt: int, args: argparse.Namespace) -> tuple[float, float]:
    """Medians of prompt tokens per second and new tokens per second; two runs before them warm up and compile."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=model.device)
    prefill, decode = [], []
    for _ in range(args.repeats + 2):
        clock = _Clock()
        started = time.perf_counter()
        cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new,
            min_new_tokens=args.new,
            do_sample=False,
            cache_implementation="static" if static else None,
            pad_token_id=model.config.eos_token_id,
            streamer=clock,
        )
        first, last = clock.times[1], clock.times[-1]
        prefill.append(prompt / (first - started))
        decode.append((args.new - 1) / (last - first))
    return statistics.median(prefill[2:]), statistics.median(decode[2:])


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(2 * size / (time.perf_counter() - started))
    return max(rates)


def main() -> None:
    """Build, generate and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512], help="prompt tokens")
    parser.add_argument("--new", type=int, default=32, help="generated tokens")
    parser.add_argument("--repeats", type=int, default=3)
    add_smoke(parser)
    args = parser.parse_args()
    config, device = load_recipe(RECIPE).config, torch.device(args.device)
    if args.smoke:
        config = BTLMConfig(**config.to_dict() | SIZES)
        args.prompts, args.new, args.repeats = [8], 3, 1
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, bf16, medians of {args.repeats}", end="; ")
    print(f"memory is copied at {copy_rate(device) / 1e9:,.0f} GB/s\n", flush=True)
    model = random_model(config, device)
    print("| weights and cache | prompt tokens | prefill tok/s | decode tok/s | weights read GB/s | peak GB |")
    print("|---|---|---|---|---|---|")
    rows: list[tuple[str, bool, Callable[[BTLMLMHeadModel], BTLMLMHeadModel]]] = [
        ("bf16, growing cache", False, lambda model: model)
    ]
    if on_gpu:
        rows.append(("bf16, static cache, CUDA graphs", True, lambda model: model))
        if find_spec("torchao") is not None:
            rows.append(("int4, static cache, CUDA graphs", True, lambda model: to_int4(model, GROUP_SIZE)))
    for label, static, prepare in rows:
        model = prepare(model)
        # A token reads the blocks and the head, which is the token table.
        bits = 4 + 32 / GROUP_SIZE if label.startswith("int4") else 16
        size = config.num_parameters(embeddings=False) * bits / 8 + config.vocab_size * config.n_embd * 2
        for prompt in args.prompts:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            prefill, decode = measure(model, static, prompt, args)
            peak = torch.cuda.max_memory_allocated(device) if on_gpu else resource_peak()
            print(
                f"| {label} | {prompt:,} | {prefill:,.1f} | {decode:,.2f} | {decode * size / 1e9:,.0f} "
                f"| {peak / 1e9:.1f} |",
                flush=True,
            )


def resource_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
