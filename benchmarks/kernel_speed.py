"""Speed of the engine's kernels at the shapes of BTLM-3B: products by the number of tokens, attention by the context.

Several layers are computed in turn, so that their weights and caches come from memory, as in a step of the engine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
from tiny_inputs import add_smoke

from btlm.kernels import Kernels, PageTable, load_kernels
from btlm.kernels.arrays import DTYPES, PACKED

WIDTH, INNER, HEADS, GROUP = 2560, 6912, 32, 128
SHAPES = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
LAYERS = 8
READ_BYTES = 1 << 29


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", default="native", help="native, torch, or an instruction set (default: native)")
    parser.add_argument("--threads", type=int, help="number of threads (default: one per core)")
    parser.add_argument("--dtypes", nargs="+", default=["int4", "int8", "bfloat16"], help="dtypes of weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 64, 256], help="tokens per product")
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 576, 2048], help="keys per query")
    parser.add_argument("--repeats", type=int, default=5, help="measurements per figure (default: 5)")
    add_smoke(parser)
    arguments = parser.parse_args()
    layers, read_bytes = LAYERS, READ_BYTES
    if arguments.smoke:
        layers, read_bytes = 1, 1 << 20
        arguments.tokens, arguments.contexts, arguments.repeats = [1], [65], 1
    kernels = load_kernels(arguments.kernels, arguments.threads)
    memory = np.ones(read_bytes, np.uint8)

    def read_seconds() -> float:
        """Seconds per byte in which the memory is read."""
        return seconds(lambda: kernels.sum_bytes(memory)) / read_bytes

    read_s = min(read_seconds() for _ in range(arguments.repeats))
    print(f"{kernels.name}, {kernels.threads} threads, memory read at {1e-9 / read_s:.1f} GB/s")
    for dtype in arguments.dtypes:
        products(kernels, dtype, layers, arguments.tokens, arguments.repeats, read_seconds)
    attention(kernels, layers, arguments.contexts, arguments.repeats)


def products(
    kernels: Kernels,
    dtype: str,
    num_layers: int,
    tokens: list[int],
    repeats: int,
    read_seconds: Callable[[], float],
) -> None:
    """Print the speed of the products of one layer.

    The read rate is measured before each step, since it drifts. Where the kernels use tiles, torch's product of 8-bit
    integers is timed on the same shapes.
    """
    layers = [[matrix(kernels, dtype, *shape) for shape in SHAPES] for _ in range(num_layers)]
    weights = sum(rows * columns for rows, columns in SHAPES)
    peer = kernels.name == "amx"
    print(f"\n| {dtype}, tokens | ms per layer | GB/s of weights | share of read rate | GOP/s |", end="")
    print(f"{' `torch._int_mm` GOP/s |' if peer else ''}\n|---|---|---|---|---|{'---|' if peer else ''}")
    for count in tokens:
        x, inner = normal(count, WIDTH), np.empty((count, INNER), np.float32)
        qkv, out = np.empty((count, 3 * WIDTH), np.float32), np.empty((count, WIDTH), np.float32)

        def step() -> None:
            for c_attn, c_proj, c_fc, c_fc2, mlp_c_proj in layers:
                kernels.linear(x, c_attn, qkv)  # noqa: B023 - called before the loop goes on
                kernels.linear(x, c_proj, out)  # noqa: B023
                kernels.linear(x, c_fc, inner, gate=c_fc2)  # noqa: B023
                kernels.linear(inner, mlp_c_proj, out)  # noqa: B023

        step()
        size = weights * (DTYPES[dtype] / 8 + (2 / GROUP if dtype in PACKED else 0))
        turns = [(read_seconds() * size, seconds(step) / num_layers) for _ in range(repeats)]
        taken = statistics.median(turn[1] for turn in turns)
        share = statistics.median(read / step for read, step in turns)
        rates = [2 * weights * count / taken / 1e9]
        if peer:
            rates.append(2 * weights * count / torch_seconds(count, kernels.threads, repeats) / 1e9)
        print(f"| {count} | {taken * 1e3:.2f} | {size / taken / 1e9:.1f} | {share:.0%} |", end="")
        print("".join(f" {rate:.0f} |" for rate in rates))


def torch_seconds(tokens: int, threads: int, repeats: int) -> float:
    """Time that torch takes for the integer products of one layer; it wants more than 16 tokens."""
    import torch

    torch.set_num_threads(threads)
    count = max(tokens, 17)
    pairs = [
        (
            torch.randint(-127, 128, (count, columns), dtype=torch.int8),
            torch.randint(-127, 128, (columns, rows), dtype=torch.int8),
        )
        for rows, columns in SHAPES
    ]

    def step() -> None:
        for x, weight in pairs:
            torch._int_mm(x, weight)

    step()
    return statistics.median(seconds(step) for _ in range(repeats)) * tokens / count


def attention(kernels: Kernels, num_layers: int, contexts: list[int], repeats: int) -> None:
    """Print the speed of attention for one query; short contexts are measured over more layers."""
    head_dim = WIDTH // HEADS
    slopes = np.full(HEADS, 0.1, np.float32)
    print("\n| cache | keys | us per layer, one query | GB/s of keys and values |\n|---|---|---|---|")
    for dtype, context in product(("int8", "int4"), contexts):
        layers = []
        for _ in range(max(4, num_layers * 4096 // context) if num_layers > 1 else 1):
            layers.append(kernels.cache(dtype, PageTable(1, context), heads=HEADS, head_dim=head_dim))
            first = normal(context - 1, 3 * WIDTH)
            kernels.attend(
                first, layers[-1], segment(0, context - 1), slopes, 0.0125, np.empty_like(first[:, :WIDTH], order="C")
            )
        query, out, last = normal(1, 3 * WIDTH), np.empty((1, WIDTH), np.float32), segment(context - 1, 1)

        def step() -> None:
            for layer in layers:  # noqa: B023 - called before the loop goes on
                kernels.attend(query, layer, last, slopes, 0.0125, out)  # noqa: B023

        step()
        taken = statistics.median(seconds(step) for _ in range(4 * repeats)) / len(layers)
        size = 2 * HEADS * context * (head_dim * DTYPES[dtype] / 8 + 2)
        print(f"| {dtype} | {context:,} | {taken * 1e6:.0f} | {size / taken / 1e9:.1f} |")


def matrix(kernels: Kernels, dtype: str, rows: int, columns: int) -> Any:
    """A random matrix, stored as checkpoints store projections."""
    rng, bias = np.random.default_rng(0), np.zeros(rows, np.float32)
    if dtype not in PACKED:
        plain = rng.integers(0x3C00, 0x3D00, (columns, rows), dtype=np.uint16)
        return kernels.matrix(dtype, plain, bias=bias, input_major=True)
    weight = rng.integers(0, 256, (rows // 16, columns * DTYPES[dtype] // 32, 64), dtype=np.uint8)
    scale = np.full((rows // 16, columns // GROUP, 16), 0x3C00, np.uint16)
    return kernels.matrix(dtype, weight, scale, bias)


def segment(start: int, count: int) -> Any:
    """Consecutive tokens of one sequence."""
    return np.array([[0, 0, start, count]])


def normal(rows: int, columns: int) -> Any:
    """Random activations."""
    return np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)


def seconds(function: Callable[[], object]) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
