"""BTLM-3B's blocks in training on one GPU: the share of the GPU's matrix rate that they reach (MFU).

    python benchmarks/training_gpu.py [--contexts 2048 8192] [--tokens 8192] [--blocks 4 8] [--repeats 5] [--no-compile]

Forward, loss and backward of the trainer (:class:`btlm.train.step.LossModel`: fp32 weights, bf16 products) for models
of BTLM-3B's width with few blocks, so that they fit one GPU. Two models of different depth give the time of a block:
the difference of their times divided by the difference of their numbers of blocks. Embeddings, head and loss take the
remaining time. The time of all 32 blocks is estimated from both, without the optimizer and communication.

FLOPs are those of the model (``BTLMConfig.flops_per_token`` in training, attention counted causal); recomputation by
activation checkpointing counts as time, not as FLOPs. MFU is over the rate of a bf16 product of 8,192 x 8,192 matrices
measured in the same run, before and after; TFLOP/s are printed for other denominators. Also prints which kernel torch
takes for attention with 88 dimensions per head (80, and 8 that carry ALiBi), and the time of each kernel that supports
this shape. Without a GPU, nothing is measured.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_inputs import add_smoke
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from btlm import BTLMConfig
from btlm.train import Recipe, load_recipe
from btlm.train.metrics import matrix_rate
from btlm.train.model import prepare_model
from btlm.train.recipe import Precision
from btlm.train.step import LossModel

RECIPE = Path(__file__).parents[1] / "recipes" / "btlm-3b.yaml"
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# A tiny shape, to try this program on any CPU.
SMOKE = {"vocab_size": 512, "n_positions": 256, "n_embd": 80, "n_layer": 4, "n_head": 1, "n_inner": 216}


@dataclass(frozen=True)
class Setting:
    """The settings of a row of the table."""

    context: int
    checkpointing: bool
    compiled: bool


def trainer(recipe: Recipe, num_blocks: int, setting: Setting, device: torch.device) -> LossModel:
    """The trainer's model and loss with some blocks of the recipe's model."""
    precision = Precision("bfloat16", activation_checkpointing=setting.checkpointing, compile=setting.compiled)
    recipe = replace(recipe, model=recipe.model | {"n_layer": num_blocks}, precision=precision)
    with device:
        network = prepare_model(recipe).network
    return LossModel(network, torch.bfloat16).to(device)


def measure(
    recipe: Recipe, num_blocks: int, setting: Setting, args: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Median seconds of forward and backward, and peak memory of the GPU in GB."""
    torch.compiler.reset()
    model = trainer(recipe, num_blocks, setting, device)
    rows = max(1, args.tokens // setting.context)
    input_ids = torch.randint(0, recipe.config.vocab_size, (rows, setting.context), device=device)

    def step() -> None:  # the gradients stay and are added to, as between the micro-batches of a step
        model(input_ids).div(input_ids.numel()).backward()

    if device.type != "cuda":
        return median_seconds(step, args.repeats, device), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(step, args.repeats, device)
    return seconds, torch.cuda.max_memory_allocated(device) / 1e9


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of some runs, after two that warm up and compile."""
    taken = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def wait(device: torch.device) -> None:
    """Wait until the GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_kernel(recipe: Recipe, context: int, device: torch.device) -> str:
    """The attention operator that a forward pass of one block calls, and its kernels on the GPU."""
    model = trainer(recipe, 1, Setting(context, checkpointing=False, compiled=False), device)
    input_ids = torch.zeros(1, context, dtype=torch.int64, device=device)
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        model(input_ids)
        wait(device)
    names = [event.name for event in profiler.events()]
    operators = {name for name in names if name.startswith("aten::_scaled_dot_product")}
    words = ("flash", "fmha", "sdpa", "attention")
    kernels = {name for name in names if "::_" not in name and any(word in name.lower() for word in words)}
    return ", ".join([*sorted(operators), *(name[:80] for name in sorted(kernels - operators) if "aten::" not in name)])


def attention_rows(config: BTLMConfig, args: argparse.Namespace, device: torch.device) -> list[str]:
    """Lines of the second table, one per length and kernel."""
    rows = []
    width = config.head_dim + 8
    for context in args.contexts:
        shape = (max(1, args.tokens // context), config.n_head, context, width)
        query, key, value = (
            torch.randn(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)
        )
        grad = torch.randn(shape, dtype=torch.bfloat16, device=device)

        def step(query=query, key=key, value=value, grad=grad) -> None:  # type: ignore[no-untyped-def]
            F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(grad)

        # Query-key products and the weighted sum, two operations each, forward and twice backward, half of them causal.
        flops = 3 * 4 * query.shape[0] * config.n_embd * context * (context + 1) / 2
        for kernel in KERNELS:
            try:
                with sdpa_kernel(kernel):
                    seconds = median_seconds(step, args.repeats, device)
            except RuntimeError:  # torch only says that it has no kernel
                rows.append(f"| {context:,} | {kernel.name} | not for this shape or device | |")
                continue
            rows.append(f"| {context:,} | {kernel.name} | {1e3 * seconds:,.2f} | {flops / seconds / 1e12:,.1f} |")
    return rows


def table_row(recipe: Recipe, setting: Setting, rate: float, args: argparse.Namespace, device: torch.device) -> str:
    """A line of the first table."""
    few, many = args.blocks
    config = {blocks: replace(recipe, model=recipe.model | {"n_layer": blocks}).config for blocks in args.blocks}
    tokens = max(1, args.tokens // setting.context) * setting.context
    start = (
        f"| {setting.context:,} | {'on' if setting.checkpointing else 'off'} | {'on' if setting.compiled else 'off'} |"
    )
    try:
        measured = {blocks: measure(recipe, blocks, setting, args, device) for blocks in args.blocks}
    except torch.OutOfMemoryError:
        return f"{start} out of memory | | | | | | |"
    flops = {blocks: config[blocks].flops_per_token(setting.context, training=True) * tokens for blocks in args.blocks}
    block_seconds = (measured[many][0] - measured[few][0]) / (many - few)
    block_flops = (flops[many] - flops[few]) / (many - few)
    rest_seconds = measured[few][0] - few * block_seconds
    rest_flops = flops[few] - few * block_flops
    num_blocks = recipe.config.n_layer
    whole_seconds = rest_seconds + num_blocks * block_seconds
    whole_flops = recipe.config.flops_per_token(setting.context, training=True) * tokens
    return (
        f"{start} {1e3 * block_seconds:,.2f} | {block_flops / block_seconds / 1e12:,.1f} "
        f"| {block_flops / block_seconds / rate:.1%} | {1e3 * rest_seconds:,.2f} "
        f"| {rest_flops / rest_seconds / rate:.1%} | {whole_flops / whole_seconds / rate:.1%} "
        f"| {measured[many][1]:,.1f} |"
    )


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192], help="tokens per row")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per forward pass, in rows of each length")
    parser.add_argument("--blocks", type=int, nargs=2, default=[4, 8], metavar=("FEW", "MANY"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled rows, which take minutes")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.device, args.no_compile, args.repeats = "cpu", True, 1
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("training_gpu.py measures on a CUDA device, and torch finds none here.", file=sys.stderr)
        return
    recipe = load_recipe(RECIPE)
    if args.smoke:
        recipe = replace(recipe, model=recipe.model | SMOKE, mup_base_width=80)
        args.contexts, args.tokens, args.blocks = [64, 128], 128, [1, 2]
    torch.manual_seed(0)
    rate = matrix_rate(device, torch.bfloat16) or 1e12  # on a CPU, where this only tries the program
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}; {args.tokens:,} tokens per pass, ", end="")
    print(f"{args.blocks[0]} and {args.blocks[1]} blocks, medians of {args.repeats}")
    for context in args.contexts:
        print(f"attention at {context:,} tokens: {attention_kernel(recipe, context, device)}")
    whole = f"MFU of {recipe.config.n_layer} blocks (estimate)"
    print(
        "\n| context | checkpointing | compile | block ms | TFLOP/s | MFU of a block | embeddings, head, loss ms ",
        end="",
    )
    print(f"| their MFU | {whole} | peak GB at {args.blocks[1]} blocks |\n|---|---|---|---|---|---|---|---|---|---|")
    for context in args.contexts:
        for checkpointing in (False, True):
            for compiled in (False,) if args.no_compile else (False, True):
                setting = Setting(context, checkpointing, compiled)
                print(table_row(recipe, setting, rate, args, device), flush=True)
    width = recipe.config.head_dim + 8
    print(f"\n| context | kernel at {width} | forward + backward ms | TFLOP/s of {recipe.config.head_dim} |")
    print("|---|---|---|---|")
    print("\n".join(attention_rows(recipe.config, args, device)))
    after = matrix_rate(device, torch.bfloat16) or rate
    print(f"\nbf16 matrix rate: {rate / 1e12:,.1f} TFLOP/s before (the denominator), {after / 1e12:,.1f} after")


if __name__ == "__main__":
    main()
