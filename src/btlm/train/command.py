"""The command `btlm train`: starts or resumes the run of a recipe, shows its progress, and plots its curve."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from btlm.console import plain_warnings, progress_bars, quiet_transformers, warn
from btlm.data.shards import TokenShards
from btlm.files import locked, write_text
from btlm.model import BTLMConfig
from btlm.plots import need_matplotlib
from btlm.settings import plain, to_yaml

from .cost import flops_by_stage, flops_per_token
from .curve import plot_metrics
from .distributed import Ranks, join_ranks
from .held_out import token_bytes
from .loop import train, training_batches
from .recipe import Recipe
from .recipe_file import changes_of_result, load_recipe
from .state import FOLDER

# Number of progress lines of a run without a terminal.
LOG_LINES = 200
# Exit status that a shell reports for a process ended by SIGTERM.
TERMINATED = 143


def run_training(
    recipe_path: Path | str,
    data: Path | str,
    output: Path | str,
    device: str = "auto",
    changes: dict[str, Any] | None = None,
) -> None:
    """Train on token shards as a recipe describes; the same call continues an interrupted run.

    Args:
        recipe_path: YAML file of the recipe; a copy is kept in ``output``.
        data: Folder of token shards.
        output: Folder that receives ``model/``, ``metrics.jsonl``, ``loss.png``, TensorBoard files and the checkpoints.
        device: Torch device, or ``auto`` for a GPU if there is one.
        changes: Values to set on top of the recipe, by dotted key.

    Raises:
        ValueError: The recipe, the shards or the device cannot be used, or ``output`` holds a run with others.
        SystemExit: Status 143 if a signal stopped the run and a checkpoint was written.
    """
    output = Path(output)
    need_matplotlib()
    with quiet_transformers():
        recipe = load_recipe(recipe_path, changes)
    shards = TokenShards(data)
    ranks = join_ranks(device)
    console = Console(stderr=True, quiet=not ranks.first, markup=False, emoji=False)
    try:
        with quiet_transformers(), plain_warnings(shown=ranks.first), ExitStack() as stack:
            # Both raise their errors before the output folder is created.
            training_batches(recipe, shards, ranks)
            config = recipe.config
            if ranks.first:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(output))
            last = _train(recipe, config, shards, output, ranks, console)
            if ranks.first:
                _finish(recipe, output, console, last)
    finally:
        ranks.leave()
    if 0 < last < recipe.total_steps:
        raise SystemExit(TERMINATED)


# Helpers


def _train(
    recipe: Recipe, config: BTLMConfig, shards: TokenShards, output: Path, ranks: Ranks, console: Console
) -> int:
    """Train and show it; returns the last step of this call, 0 if nothing was left to do."""
    if ranks.first:
        _keep_recipe(recipe, output)
    ranks.barrier()
    flops = sum(flops_by_stage(recipe, config))
    available = shards.num_tokens("train")
    _say(
        console,
        f"{config.num_parameters():,} parameters, {recipe.total_tokens:,} tokens in {recipe.total_steps:,} steps, "
        f"{flops:.3g} FLOPs; {recipe.total_tokens / available:.3g} epochs of {available:,} training tokens; "
        f"{ranks.world_size} x {ranks.device.type}",
    )
    if ranks.first and not shards.num_tokens("validation"):
        warn(
            "The shards hold no validation documents, so the held-out loss is not measured; prepare data with "
            "mix.holdout above 0."
        )
    last = 0
    with _progress(recipe, config, console) as show:
        for record in train(recipe, shards, output, token_bytes(), ranks=ranks):
            last = record["step"]
            show(record)
    return last


def _keep_recipe(recipe: Recipe, output: Path) -> None:
    """Write the recipe into the output folder, after comparing it with that of a run that began there.

    Raises:
        ValueError: The run in the folder has another recipe.
    """
    kept = output / "recipe.yaml"
    begun = kept.exists() and (any((output / FOLDER).glob("step-????????")) or (output / "model").exists())
    if begun and (changes := changes_of_result(plain(load_recipe(kept)), recipe)):
        raise ValueError(
            f"{output} holds a run of another recipe (recipe.yaml): {'; '.join(changes)}. Give a new output folder, or "
            "that recipe."
        )
    write_text(kept, to_yaml(recipe))


def _say(console: Console, line: str) -> None:
    """Print one line without wrapping it, so that paths can be copied and logs searched."""
    console.print(line, soft_wrap=True)


@contextmanager
def _progress(recipe: Recipe, config: BTLMConfig, console: Console) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that shows a record, as a bar or as occasional lines, and the held-out loss as a line."""
    details = TextColumn("{task.fields[status]}")  # the status includes the remaining time
    bar = 10 if console.width < 100 else 20
    bars = progress_bars(details, console=console, transient=False, remaining=False, width=bar)
    every = max(1, recipe.total_steps // LOG_LINES)
    with bars as progress:
        task = progress.add_task(f"step 0/{recipe.total_steps}", total=recipe.total_steps, status="")

        def show(record: dict[str, Any]) -> None:
            line = status(recipe, config, record)
            place = f"step {record['step']}/{recipe.total_steps}"
            elapsed = timedelta(seconds=int(progress.tasks[task].elapsed or 0))
            room = console.width - len(f"{place} {bar * '━'}  {elapsed}")
            progress.update(task, completed=record["step"], description=place, status=shortened(line, room))
            if not console.is_terminal and (record["step"] % every == 0 or record["step"] <= 10):
                _say(console, f"{place}  {line}")
            if "bits_per_byte" in record:
                by_source = "  ".join(f"{source} {value:.3f}" for source, value in record["bits_per_byte"].items())
                nats = record["nats_per_token"]["mean"]
                _say(
                    console,
                    f"held out after step {record['step']:,}: {nats:.3f} nats per token, bits per byte: {by_source}",
                )

        yield show


def status(recipe: Recipe, config: BTLMConfig, record: dict[str, Any]) -> str:
    """One line of status: loss, learning rate, gradient norm, speed, MFU on a GPU, remaining time, tokens per row."""
    mfu = f"MFU {record['mfu']:.0%}  " if "mfu" in record else ""
    left = timedelta(seconds=round(_seconds_left(recipe, config, record)))
    return (
        f"loss {record['loss']:.3f}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}  "
        f"{record['tokens_per_s']:,.0f} tok/s  {mfu}ETA {left}  rows {record['sequence_length']:,}"
    )


def shortened(line: str, room: int) -> str:
    """A line of status without the least important parts, where it is longer than the room for it."""
    parts = line.split("  ")
    for name in ("rows", "MFU", "|g|", "lr", "tok/s", "ETA", "loss"):
        if len("  ".join(parts)) > room:
            parts = [part for part in parts if name not in part]
    return "  ".join(parts)


def _seconds_left(recipe: Recipe, config: BTLMConfig, record: dict[str, Any]) -> float:
    """Remaining seconds at the FLOP/s of this step, since a token costs more in a longer row."""
    start, flops = 0, 0.0
    for stage in recipe.stages:
        tokens = stage.steps * stage.batch_tokens
        done = min(tokens, max(0, record["tokens"] - start))
        flops += (tokens - done) * flops_per_token(recipe, config, stage.sequence_length)
        start += tokens
    per_token = flops_per_token(recipe, config, record["sequence_length"])
    seconds: float = flops / (record["tokens_per_s"] * per_token)
    return seconds


def _finish(recipe: Recipe, output: Path, console: Console, last: int) -> None:
    picture = output / "loss.png"
    plot_metrics(output, picture)
    if 0 < last < recipe.total_steps:
        _say(console, f"Stopped after step {last:,} with a checkpoint; the same command continues from there.")
    else:
        _say(console, f"Wrote {output / 'model'}" + (f" and {picture}" if picture.exists() else ""))
