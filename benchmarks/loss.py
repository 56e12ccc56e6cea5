"""Loss of the head: `btlm.train.loss` against torch's `linear_cross_entropy`; speed, memory, error of the gradients.

    python benchmarks/loss.py [--tokens 4096] [--repeats 5] [--passes 3] [--clock wall] [--dtypes float32]

The shape is that of `training_step.py`: width 256, a vocabulary of 50,304, and 4 rows of 1,024 tokens; weights are in
fp32, hidden states in the dtype of the products, and one label in 16 is ignored. A pass is the summed loss forward, and
backward into the hidden states and the weights. torch's function needs weights in the dtype of the hidden states, so
that in bf16 the copy is part of the pass. It is measured with all logits at once, as the reference, and in chunks, with
each of its policies for summing gradients.

Each measurement has its own process, in turn A B C A B C: the time is the median of its passes after a warm-up, the
memory is its peak (VmHWM) minus the memory that was resident before. `--clock cpu` counts the processor time of all
threads, for a machine that others use too. The error of a gradient is relative to fp64: the norm of the difference
divided by the norm. Prints medians of the turns, and of their ratios to btlm. Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import add_smoke
from torch import Tensor
from torch.nn import functional as F

WIDTH, VOCABULARY = 256, 50304
SMOKE_WIDTH, SMOKE_VOCABULARY = 16, 512
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_torch(hidden: Tensor, weight: Tensor, labels: Tensor, policy: str | None) -> Tensor:
    """torch's function with all logits (None), or in chunks with one of its policies."""
    options = None if policy is None else torch.nn.LinearCrossEntropyOptions(acc_policy=policy)  # type: ignore[arg-type]
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), labels, reduction="sum", options=options)


def forms() -> dict[str, Loss]:
    """The functions to compare, by name."""
    from btlm.train.loss import linear_cross_entropy

    policies = ("accurate", "balanced", "compact")
    chunked = {f"torch, {policy}": partial(of_torch, policy=policy) for policy in policies}
    return {"btlm": linear_cross_entropy, "torch, whole": partial(of_torch, policy=None), **chunked}


def inputs(args: argparse.Namespace, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights of the sizes that they have early in training, and random labels."""
    torch.manual_seed(0)
    width, vocabulary = (SMOKE_WIDTH, SMOKE_VOCABULARY) if args.smoke else (WIDTH, VOCABULARY)
    hidden = torch.randn(args.tokens, width).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(vocabulary, width).mul_(width**-0.5).requires_grad_()
    labels = torch.randint(vocabulary, (args.tokens,))
    labels[::16] = -100
    return hidden, weight, labels


def measure(form: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """Time and memory of passes in this process."""
    compute = forms()[form]
    hidden, weight, labels = inputs(args, dtype)
    base, seconds, clock = resident_mb("VmRSS"), [], CLOCKS[args.clock]
    for _ in range(1 + args.passes):
        hidden.grad = weight.grad = None
        started = clock()
        compute(hidden, weight, labels).backward()
        seconds.append(clock() - started)
    return {"ms": 1e3 * statistics.median(seconds[1:]), "mb": resident_mb("VmHWM") - base}


def errors(dtype: str, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Relative errors of both gradients, by form; the reference has the same rounded inputs."""
    hidden, weight, labels = inputs(args, dtype)
    rounded = weight.detach().to(hidden.dtype).double()
    expected = torch.empty(hidden.shape, dtype=torch.float64), torch.zeros_like(rounded)
    for start in range(0, args.tokens, 256):
        rows, target = hidden.detach()[start : start + 256].double(), labels[start : start + 256]
        logits_grad = (rows @ rounded.T).softmax(-1)
        logits_grad[torch.arange(len(rows)), target.clamp(min=0)] -= 1
        logits_grad[target == -100] = 0
        expected[0][start : start + 256] = logits_grad @ rounded
        expected[1].add_(logits_grad.T @ rows)
    found = {}
    for form, compute in forms().items():
        grads = torch.autograd.grad(compute(hidden, weight, labels), (hidden, weight))
        distances = [float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, expected, strict=True)]
        found[form] = distances[0], distances[1]
    return found


def resident_mb(field: str) -> float:
    """Resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def child(task: str, dtype: str, args: argparse.Namespace) -> Any:
    """Result of a task in a separate process, or in a smoke run in this one."""
    if args.smoke:
        return run(task, dtype, args)
    command = [
        sys.executable,
        __file__,
        "--one",
        task,
        dtype,
        f"--tokens={args.tokens}",
        f"--passes={args.passes}",
        f"--clock={args.clock}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{task}, {dtype}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(task: str, dtype: str, args: argparse.Namespace) -> Any:
    """Time and memory of one form, or the errors of all."""
    return errors(dtype, args) if task == "errors" else measure(task, dtype, args)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per pass")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each process")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is timed (default: wall)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--threads", type=int, default=2)
    add_smoke(parser)
    parser.add_argument("--one", nargs=2, metavar=("TASK", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.repeats, args.passes = 64, 1, 1
    if args.one:
        task, dtype = args.one
        print(json.dumps(run(task, dtype, args)))
        return
    print(f"torch {torch.__version__}, {args.tokens:,} tokens, {args.threads} threads, ", end="")
    print(f"{args.clock} time, medians of {args.repeats} turns\n")
    print("| products | loss | ms | over btlm's | peak MB | over btlm's | error of hidden states | of weights |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        distances = child("errors", dtype, args)
        turns = [{form: child(form, dtype, args) for form in distances} for _ in range(args.repeats)]
        for form, (of_hidden, of_weight) in distances.items():
            cells = []
            for key in ("ms", "mb"):
                cells.append(f"{statistics.median(turn[form][key] for turn in turns):,.0f}")
                ratio = statistics.median(turn[form][key] / max(turn["btlm"][key], 1e-9) for turn in turns)
                cells.append(f"{ratio:.2f}")
            print(f"| {dtype} | {form} | {' | '.join(cells)} | {of_hidden:.1e} | {of_weight:.1e} |", flush=True)


if __name__ == "__main__":
    main()
