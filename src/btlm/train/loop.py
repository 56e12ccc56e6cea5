"""The training loop: sets up or resumes a run, then updates weights, records metrics and saves checkpoints."""

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btlm.data.loader import TokenLoader
from btlm.data.shards import TokenShards
from btlm.errors import NotFinite
from btlm.files import remove_partial_files, write_json

from .cost import flops_per_token
from .distributed import Ranks, join_ranks, shard
from .held_out import evaluate_held_out
from .metrics import METRICS, SpikeMonitor, matrix_rate, open_sinks, scalars, truncate_metrics
from .model import Trainee, prepare_model
from .recipe import Recipe, Watching
from .recipe_file import changes_of_result
from .state import find_checkpoint, keep_checkpoints, load_checkpoint, publish_model, save_checkpoint
from .step import LossModel, take_step

logger = logging.getLogger(__name__)

NOT_FINITE = "not_finite.json"


def train(
    recipe: Recipe,
    shards: TokenShards,
    output: Path | str,
    token_bytes: NDArray[np.int64],
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> Iterator[dict[str, Any]]:
    """Train, or continue from the newest intact checkpoint in ``output``; yields one record per step.

    ``output`` receives ``checkpoints/``, ``metrics.jsonl`` (the records) and, at the end, ``model/``, a Hugging Face
    folder in fp32. On SIGTERM or Ctrl-C the current step is finished, a checkpoint is written, and the records end.

    Args:
        recipe: Recipe of the run.
        shards: Shards to read.
        output: Output folder, the same on every rank, on a file system that all ranks share.
        token_bytes: Bytes of text per token id, int64 ``[vocab]``; 0 for end-of-text.
        device: Torch device, or ``auto``.
        ranks: Ranks of the run, if this process has joined them already.

    Raises:
        ValueError: The stages cannot be read from the shards, the model's vocabulary lacks some of their tokens, or the
            checkpoint in ``output`` belongs to other shards or another recipe.
        NotFinite: The loss or the gradient is not finite. The weights stay as before that step, and ``not_finite.json``
            names the batch.
    """
    ranks = ranks or join_ranks(device)
    output = Path(output)
    config = recipe.config
    if config.vocab_size < len(token_bytes):
        raise ValueError(f"vocab_size is {config.vocab_size}; the shards need at least {len(token_bytes)}.")
    loader = training_batches(recipe, shards, ranks)
    run = _set_up(recipe, ranks)
    output.mkdir(parents=True, exist_ok=True)
    done = _resume(output, run, loader, recipe, ranks)
    kept = recipe.checkpoints
    # A run that was killed after it wrote a checkpoint had not removed the ones before it.
    keep_checkpoints(output, done, kept.keep_last, kept.keep_every_steps, ranks)
    records = []
    if ranks.first:
        remove_partial_files(output)
        records = truncate_metrics(output, done)
    monitor = SpikeMonitor(recipe.watching.spike_deviations, [record["loss"] for record in records])
    rate = matrix_rate(ranks.device, run.model.dtype)

    checkpoint = output / "checkpoints" / f"step-{done:08d}"
    watching = recipe.watching if ranks.first else Watching(tensorboard=False)
    with _stop_on_signal() as stop, open_sinks(replace(recipe, watching=watching), output, done) as sinks:
        started = time.perf_counter()
        for step, batch in enumerate(loader, start=done + 1):
            factor = recipe.lr_factor(batch.tokens)
            batch_tokens = batch.input_ids.size * ranks.world_size
            for group, peak in zip(run.optimizer.param_groups, run.peaks, strict=True):
                group["lr"] = peak * factor
            try:
                result = take_step(
                    run.model, run.optimizer, batch, recipe.micro_batch_tokens, recipe.optimizer.clip_norm, ranks
                )
            except NotFinite as error:
                if ranks.first:  # for inspection: after `seek(tokens_before)`, the loader reads the batch next
                    content = {
                        "step": step,
                        "tokens_before": batch.tokens - batch_tokens,
                        "sequence_length": batch.sequence_length,
                        "problem": error.problem,
                        "loss_of_micro_batches_by_rank": error.losses,
                    }
                    write_json(output / NOT_FINITE, content)
                problem = f"Step {step}: {error.problem}; {output / NOT_FINITE} names the batch."
                raise NotFinite(problem, error.losses) from error
            speed = batch_tokens / (time.perf_counter() - started)
            record: dict[str, Any] = {
                "step": step,
                "tokens": batch.tokens,
                "sequence_length": batch.sequence_length,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": recipe.optimizer.lr * factor,
                "tokens_per_s": speed,
            }
            if rate is not None:
                record["mfu"] = speed * flops_per_token(recipe, config, batch.sequence_length) / ranks.world_size / rate
            if (deviations := monitor.check(result.loss)) is not None:
                record["spike"] = deviations
                logger.warning(
                    "Step %d: loss %.3f is %.1f standard deviations above the recent mean.",
                    step,
                    result.loss,
                    deviations,
                )
            last = step == recipe.total_steps
            every = recipe.evaluation.every_tokens
            if last or batch.tokens // every > (batch.tokens - batch_tokens) // every:
                record |= _evaluate(run.model, recipe, shards, batch.sequence_length, token_bytes, ranks)
            if ranks.first:
                with (output / METRICS).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                for sink in sinks:
                    sink(step, scalars(record))
            (stopped,) = ranks.sum(stop.is_set())
            if last or stopped or step % kept.every_steps == 0:
                checkpoint = save_checkpoint(
                    output, step, run.trainee, run.optimizer, loader.state_dict(), recipe, ranks
                )
                keep_checkpoints(output, step, kept.keep_last, kept.keep_every_steps, ranks)
            yield record
            if stopped and not last:
                return
            started = time.perf_counter()
    if ranks.first:
        publish_model(checkpoint, output)
    ranks.barrier()


def training_batches(recipe: Recipe, shards: TokenShards, ranks: Ranks) -> TokenLoader:
    """This rank's part of the batches of a run, one batch per step.

    Raises:
        ValueError: The stages cannot be read from the shards, or a batch does not divide over the ranks.
    """
    stages = [replace(stage, tokens=stage.steps * stage.batch_tokens) for stage in recipe.stages]
    return TokenLoader(
        shards,
        stages,
        seed=recipe.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        document_ids=recipe.data.mask_documents,
    )


# Helpers


class _Run(NamedTuple):
    trainee: Trainee
    model: LossModel
    optimizer: torch.optim.Optimizer
    peaks: list[float]


def _set_up(recipe: Recipe, ranks: Ranks) -> _Run:
    trainee = prepare_model(recipe)
    model = LossModel(trainee.network, getattr(torch, recipe.precision.dtype))
    model.to(ranks.device).train()
    shard(model, trainee.network.transformer.h, recipe.parallelism, ranks)
    options = recipe.optimizer
    groups = trainee.parameter_groups(options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
    torch.manual_seed(recipe.seed + 1 + ranks.rank)  # Each rank draws its own dropout.
    return _Run(trainee, model, optimizer, [group["lr"] for group in optimizer.param_groups])


def _resume(output: Path, run: _Run, loader: TokenLoader, recipe: Recipe, ranks: Ranks) -> int:
    """Load the newest intact checkpoint; returns its step, or 0 if there is none."""
    found = find_checkpoint(output, ranks)
    if found is None:
        if (output / "model").exists():
            raise ValueError(f"{output} has a finished model and no checkpoint; give a new output folder.")
        return 0
    folder, marker = found
    if changes := changes_of_result(marker["recipe"], recipe):
        raise ValueError(f"{folder} belongs to another recipe ({'; '.join(changes)}); give a new output folder.")
    try:
        loader.load_state_dict(marker["loader"])
    except ValueError as error:
        raise ValueError(f"{folder} belongs to another run; give a new output folder. {error}") from error
    load_checkpoint(folder, run.trainee, run.optimizer, ranks, marker["world_size"])
    done: int = marker["step"]
    if done < recipe.total_steps:
        logger.info("continuing from step %d", done)
    else:
        logger.info("all %d steps are done", done)
    return done


def _evaluate(
    model: LossModel,
    recipe: Recipe,
    shards: TokenShards,
    sequence_length: int,
    token_bytes: NDArray[np.int64],
    ranks: Ranks,
) -> dict[str, dict[str, float]]:
    rows = max(1, recipe.micro_batch_tokens // sequence_length)
    tokens = recipe.evaluation.tokens_per_source
    # Held-out rows have many lengths, and each length would be compiled separately.
    with torch.compiler.set_stance("force_eager") if recipe.precision.compile else nullcontext():
        masked = recipe.data.mask_documents
        return evaluate_held_out(model, shards, sequence_length, tokens, token_bytes, ranks, rows, masked)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second signal acts at once. Only the main thread can handle signals."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Commands that a shell runs in the background ignore Ctrl-C; they continue to.
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for other, handler in before.items():
            signal.signal(other, handler)
        logger.warning("Stopping after this step (%s); a second signal stops at once.", signal.Signals(number).name)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
