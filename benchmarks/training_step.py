"""One training step on a CPU: this package's trainer against litgpt and Transformers' ``Trainer``, speed and memory.

    pip install accelerate && pip install --no-deps litgpt lightning lightning-utilities torchmetrics
    python benchmarks/training_step.py [--repeats 5] [--steps 3] [--dtypes float32 bfloat16]

Eight layers of width 256, four heads, a vocabulary of 50,304 (litgpt pads to it; all have it), tied head, feed-forward
layers of the same number of weights, no dropout. A step is forward, loss, backward, clipping to norm 1 and fused AdamW
on 4 rows of 1,024 random tokens in one pass, with fp32 weights and products in fp32 or, by autocast, in bf16:

- btlm: :func:`btlm.train.train` as it is, reading token shards and writing its records: SwiGLU of 683, ALiBi;
- litgpt: its ``GPT`` (SwiGLU of 683, rotary positions) and ``chunked_cross_entropy``, as its ``pretrain.py`` combines
  them, but without Fabric, whose bf16 would copy the logits to fp32, and with the fused optimizer;
- transformers: GPT-2 (GELU of 1,024, learned positions, SDPA) under ``transformers.Trainer`` on rows in memory.

Each run has its own process, in turn A B C A B C, so that peak resident memories (VmHWM) are separate. It takes one
step to warm up, and reports the median of ``--steps`` more. "Beyond imports" subtracts the memory that is resident
before the model is built. Prints medians, and the medians of the ratios of each turn. litgpt is installed without its
dependencies, which would replace installed versions. Linux.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tiny_inputs import add_smoke

LAYERS, WIDTH, HEADS, VOCABULARY = 8, 256, 4, 50304
ROWS, LENGTH = 4, 1024
SWIGLU, GELU = 683, 1024
LEARNING_RATE = 1e-3
# Packages that each trainer needs besides this package's own dependencies.
PACKAGES = {"btlm": (), "litgpt": ("lightning", "litgpt"), "transformers": ("accelerate",)}


def btlm(dtype: str, steps: int) -> dict[str, Any]:
    """The loop of ``btlm train``, without its last step, which evaluates and saves."""
    import numpy as np

    from btlm.data.shards import TokenShards, write_manifest, write_shard
    from btlm.train import Recipe, train
    from btlm.train.recipe import Optimizer, Precision, Schedule, Stage, Watching

    base = resident_mb("VmRSS")
    tokens = ROWS * LENGTH
    recipe = Recipe(
        model={
            "vocab_size": VOCABULARY,
            "n_positions": LENGTH,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": SWIGLU,
            "activation_function": "swiglu",
            "position_embedding_type": "alibi",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        optimizer=Optimizer(lr=LEARNING_RATE, clip_norm=1.0),
        schedule=Schedule(warmup_tokens=0),
        stages=[Stage(LENGTH, tokens, tokens * (steps + 1))],
        micro_batch_tokens=tokens,
        precision=Precision(dtype=dtype),  # type: ignore[arg-type]
        watching=Watching(tensorboard=False),
    )
    rng = np.random.default_rng(0)
    documents = ((rng.integers(0, 50256, LENGTH - 1), 0, LENGTH) for _ in range(ROWS * (steps + 1)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder, {"train": [write_shard(folder, "train-00000", documents)]}, ["random"])
        records = train(recipe, TokenShards(folder), folder / "run", np.ones(50257, np.int64))
        ends = [(time.perf_counter(), record["loss"]) for record in islice(records, steps)]
        records.close()  # type: ignore[attr-defined]
    return result(recipe.config.num_parameters(), ends, base)


def litgpt(dtype: str, steps: int) -> dict[str, Any]:
    """The step of litgpt's ``pretrain.py``."""
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    base = resident_mb("VmRSS")
    torch.manual_seed(0)
    config = Config(
        block_size=LENGTH,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_head=HEADS,
        n_embd=WIDTH,
        rotary_percentage=1.0,
        parallel_residual=False,
        mlp_class_name="LLaMAMLP",
        intermediate_size=SWIGLU,
    )
    model = GPT(config)
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    ends = []
    for _ in range(steps):
        rows = torch.randint(0, 50257, (ROWS, LENGTH + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = chunked_cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append((time.perf_counter(), float(loss.detach())))
    return result(sum(parameter.numel() for parameter in model.parameters()), ends, base)


def transformers(dtype: str, steps: int) -> dict[str, Any]:
    """``Trainer`` with its default optimizer, which is fused AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    base = resident_mb("VmRSS")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=GELU,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation("sdpa")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50257, (ROWS * steps, LENGTH))]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=LEARNING_RATE,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, options, train_dataset=rows, callbacks=[Clock()])
        loss = trainer.train().training_loss
    return result(model.num_parameters(), [(end, loss) for end in ends], base)


FORMS: dict[str, Callable[[str, int], dict[str, Any]]] = {"btlm": btlm, "litgpt": litgpt, "transformers": transformers}


def result(num_parameters: int, ends: list[tuple[float, float]], base: float) -> dict[str, Any]:
    """The result of one process, from the times and losses at the ends of its steps; the first step was a warm-up."""
    seconds = statistics.median(after - before for (before, _), (after, _) in pairwise(ends))
    peak = resident_mb("VmHWM")
    return {
        "parameters": num_parameters,
        "speed": ROWS * LENGTH / seconds,
        "peak": peak,
        "beyond": peak - base,
        "losses": [loss for _, loss in ends],
    }


def resident_mb(field: str) -> float:
    """Resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``); Linux."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def shrink() -> None:
    """Sizes for a run of seconds."""
    global LAYERS, WIDTH, ROWS, LENGTH, SWIGLU, GELU
    LAYERS, WIDTH, ROWS, LENGTH, SWIGLU, GELU = 1, 32, 2, 32, 43, 64


def run(form: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one form in a process; returns its result."""
    command = [sys.executable, __file__, "--one", form, dtype, "--steps", str(args.steps)]
    command += ["--smoke"] if args.smoke else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{form}, {dtype}:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    losses = measured["losses"]
    if not all(9 < loss < 13 for loss in losses):  # random tokens: near the log of the vocabulary, 10.8
        sys.exit(f"{form}, {dtype}: losses {losses}")
    return measured


def table_row(form: str, dtype: str, turns: list[dict[str, dict[str, Any]]]) -> str:
    """Medians of one form over the turns, and of its ratios to btlm in the same turn."""

    def median(key: str) -> float:
        return float(statistics.median(turn[form][key] for turn in turns))

    def ratio(key: str) -> float:
        return float(statistics.median(turn[form][key] / turn["btlm"][key] for turn in turns))

    return (
        f"| {dtype} | {form} | {turns[0][form]['parameters']:,} | {median('speed'):,.0f} | {1 / ratio('speed'):.2f} "
        f"| {median('peak'):,.0f} | {ratio('peak'):.2f} | {median('beyond'):,.0f} | {ratio('beyond'):.2f} |"
    )


def main() -> None:
    """Run all in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps per process")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    add_smoke(parser)
    parser.add_argument("--one", nargs=2, metavar=("FORM", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        shrink()
        args.steps, args.repeats, args.dtypes = 1, 1, ["float32"]
    if args.one:
        form, dtype = args.one
        print(json.dumps(FORMS[form](dtype, args.steps + 1)))
        return
    forms = []
    for form, packages in PACKAGES.items():
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            print(f"{form}: left out, {' and '.join(missing)} not installed; the first lines of this file tell how")
        else:
            forms.append(form)
    names = ["torch", "transformers", *(name for form in forms for name in PACKAGES[form])]
    print(", ".join(f"{name} {version(name)}" for name in names), end="")
    print(f"; {args.threads} threads, medians of {args.repeats} turns\n")
    print("| products | trainer | parameters | tokens/s | btlm faster by | peak MB | over btlm's | ", end="")
    print("beyond imports MB | over btlm's |\n|---|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        turns = [{form: run(form, dtype, args) for form in forms} for _ in range(args.repeats)]
        for form in forms:
            print(table_row(form, dtype, turns), flush=True)


if __name__ == "__main__":
    main()
