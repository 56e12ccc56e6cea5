"""`btlm train`: one run from a recipe, watched, resumed by the same command, with its curve at the end."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from btlm.data.shards import TokenShards
from btlm.model.tokenization_btlm import load_tokenizer

from .loop import METRICS, STATE, train, training_batches
from .recipe import load_recipe


def run_training(recipe_path: Path | str, data: Path | str, output: Path | str, device: str = "cpu") -> None:
    """Train by a recipe on token shards; the same call continues an interrupted run.

    Args:
        recipe_path: YAML file; a copy is kept in ``output``.
        data: Folder of token shards.
        output: Receives ``model/``, ``metrics.jsonl``, ``loss.png`` and the state to resume from.
        device: Of torch.

    Raises:
        ValueError: The recipe, the shards or the device cannot be used, or ``output`` holds a run of other ones.
    """
    recipe_path, output = Path(recipe_path), Path(output)
    recipe = load_recipe(recipe_path)
    shards = TokenShards(data)
    training_batches(recipe, shards)  # Complains, if it has to, before there is an output folder.
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which torch cannot use: {str(error).splitlines()[0]}") from error
    kept = output / "recipe.yaml"
    begun = kept.exists() and ((output / STATE).exists() or (output / "model").exists())
    if begun and load_recipe(kept) != recipe:
        raise ValueError(f"{output} holds a run of another recipe ({kept}); give a new output folder.")
    if not begun and not (kept.exists() and kept.samefile(recipe_path)):
        output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe_path, kept)

    console = Console(stderr=True)
    config = recipe.config
    flops = sum(config.flops_per_token(s.sequence_length, training=True) * s.tokens for s in recipe.stages)
    available = shards.num_tokens("train")
    console.print(
        f"{config.num_parameters():,} parameters, {recipe.total_tokens:,} tokens in {recipe.total_steps:,} steps, "
        f"{flops:.3g} FLOPs; {recipe.total_tokens / available:.3g} epochs of {available:,} training tokens"
    )
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=recipe.total_steps, status="")
        for record in train(recipe, shards, output, token_bytes(), device):
            speed = f"{record['tokens_per_s']:,.0f} tok/s"
            status = f"loss {record['loss']:.3f}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}  {speed}"
            progress.update(task, completed=record["step"], status=status)
            if "bits_per_byte" in record:
                held_out = "  ".join(f"{source} {value:.3f}" for source, value in record["bits_per_byte"].items())
                console.print(f"step {record['step']:,}, {record['tokens']:,} tokens, bits per byte: {held_out}")
    plot_metrics(output / METRICS, output / "loss.png")
    console.print(f"Wrote {output / 'model'} and {output / 'loss.png'}")


def token_bytes() -> NDArray[np.int64]:
    """Bytes of text that each token of the GPT-2 vocabulary stands for, int64 ``[50257]``; 0 for end-of-text."""
    tokenizer = load_tokenizer()
    # A byte-level vocabulary spells every byte as one character.
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    sizes[tokenizer.eos_token_id] = 0
    return np.array(sizes, dtype=np.int64)


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Training loss and held-out bits per byte against tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    loss = np.array([record["loss"] for record in records])
    evaluated = [record for record in records if "bits_per_byte" in record]
    panels = 2 if evaluated else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 3.8), layout="constrained", squeeze=False)
    window = 25
    averaged = len(loss) > window
    left = axes[0, 0]
    left.plot(tokens, loss, color="0.75", linewidth=0.8, marker="" if averaged else ".", label="each step")
    if averaged:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        left.plot(tokens[window // 2 :][: len(smooth)], smooth, color="C0", label=f"mean of {window} steps")
    left.set_ylabel("training loss (nats a token)")
    # The first steps, whose loss can be several times the others', would flatten the rest of the curve.
    left.set_ylim(top=min(left.get_ylim()[1], 2 * np.median(loss)))
    left.legend(edgecolor="none", fontsize=8, loc="upper right")
    if evaluated:
        right = axes[0, 1]
        for source in evaluated[-1]["bits_per_byte"]:
            mean = source == "mean"
            right.plot(
                [record["tokens"] / 1e6 for record in evaluated],
                [record["bits_per_byte"][source] for record in evaluated],
                label=source.removeprefix("RedPajama"),
                color="black" if mean else None,
                linewidth=2 if mean else 1,
                marker=".",
            )
        right.set_ylabel("held-out loss (bits a byte)")
        right.legend(edgecolor="none", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    for before, after in pairwise(records):
        if before["sequence_length"] != after["sequence_length"]:
            boundary = before["tokens"] / 1e6
            for axis in axes.flat:
                axis.axvline(boundary, color="0.4", linestyle=":", linewidth=1)
            label = f"{after['sequence_length']:,} tokens a row"
            at = left.get_xaxis_transform()
            left.text(boundary, 0.6, label, transform=at, rotation=90, ha="right", va="center", color="0.4", size=8)
    for axis in axes.flat:
        axis.set(xlabel="tokens (millions)", xlim=(0, tokens[-1] * 1.05))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.93")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
