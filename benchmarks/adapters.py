"""Training low-rank adapters against training every weight of btlm-tiny: processor time of forward and backward pass.

    python benchmarks/adapters.py [--rows 4] [--repeats 5]

The forms are those of `recipes/lora.yaml`: adapters with and without activation checkpointing and dropout. A pass is
the trainer's (:class:`btlm.train.step.LossModel`, bf16 products) over rows of 2,048 random tokens. The forms take turns
in one process; the time is the processor time of all threads, so that other work on the machine counts little. Prints
medians, and those of the ratios of each turn.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tiny_inputs import add_smoke

from btlm.model import BTLMLMHeadModel
from btlm.train import load_recipe
from btlm.train.model import prepare_model
from btlm.train.recipe import Lora, Precision, Recipe, Start
from btlm.train.step import LossModel

SMOKE = {"vocab_size": 512, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 64}


def forms(recipe: Recipe, base: str) -> dict[str, Recipe]:
    """The recipes to compare, by name."""
    adapted = replace(recipe, model={}, mup_base_width=None, start=Start(base), lora=Lora(16, 32.0))
    dropout = replace(adapted, lora=Lora(16, 32.0, 0.05))
    checkpointing = Precision(activation_checkpointing=True)
    return {
        "every weight": recipe,
        "every weight, checkpointing": replace(recipe, precision=checkpointing),
        "adapters": adapted,
        "adapters, dropout": dropout,
        "adapters, checkpointing": replace(adapted, precision=checkpointing),
        "adapters, checkpointing, dropout (recipes/lora.yaml)": replace(dropout, precision=checkpointing),
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of 2,048 tokens per pass")
    parser.add_argument("--repeats", type=int, default=5)
    add_smoke(parser)
    args = parser.parse_args()
    recipe, length = load_recipe("btlm-tiny"), 2048
    if args.smoke:
        recipe, length = replace(recipe, model=recipe.model | SMOKE, mup_base_width=32), 32
        args.rows, args.repeats = 1, 1
    input_ids = torch.randint(0, recipe.config.vocab_size, (args.rows, length))
    with tempfile.TemporaryDirectory() as folder:
        BTLMLMHeadModel(recipe.config).save_pretrained(Path(folder))
        models = {
            name: LossModel(prepare_model(form).network, torch.bfloat16).train()
            for name, form in forms(recipe, folder).items()
        }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + args.repeats):
        for name, model in models.items():
            started = time.process_time()
            model(input_ids).backward()
            seconds[name].append(time.process_time() - started)
            model.zero_grad()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {input_ids.numel():,} tokens per pass, ", end=""
    )
    print(f"medians of {args.repeats} turns\n\n| trained | processor s | over every weight's |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = [time / base for time, base in zip(times[1:], seconds["every weight"][1:], strict=True)]
        print(f"| {name} | {statistics.median(times[1:]):.3f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
