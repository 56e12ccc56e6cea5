"""The training loop: variable sequence length, muP AdamW, bf16, and checkpoints that resume bit-identically."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btlm.data.loader import TokenLoader
from btlm.data.shards import TokenShards
from btlm.model import BTLMLMHeadModel
from btlm.model.mup import scale_logits

from .loss import linear_cross_entropy, next_token_labels
from .recipe import Recipe

STATE = "state.pt"
METRICS = "metrics.jsonl"


def token_loss(model: BTLMLMHeadModel, input_ids: Tensor) -> Tensor:
    """Cross-entropy of packed rows ``[B, L]``, summed over their tokens, in nats; bf16 products, fp32 sums."""
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16):
        hidden = model.transformer(input_ids, use_cache=False).last_hidden_state
    hidden = scale_logits(hidden, model.config).flatten(0, 1).to(torch.bfloat16)
    return linear_cross_entropy(hidden, model.lm_head.weight, next_token_labels(input_ids).flatten())


@torch.no_grad()
def evaluate_bits_per_byte(
    model: BTLMLMHeadModel,
    shards: TokenShards,
    sequence_length: int,
    tokens_per_source: int,
    token_bytes: NDArray[np.int64],
) -> dict[str, float]:
    """Held-out loss in bits per byte of text, for each source and their mean (key ``mean``); empty without any text.

    Args:
        model: On the device to compute on.
        shards: With held-out documents.
        sequence_length: Rows of at most this many tokens, without overlap.
        tokens_per_source: From the first held-out documents of each source.
        token_bytes: Bytes of text of every token id; 0 for end-of-text.
    """
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    result = {}
    for source in shards.sources:
        tokens = shards.source_tokens("validation", source, tokens_per_source).astype(np.int64)
        nats, size = 0.0, 0
        for start in range(0, len(tokens) - 1, sequence_length):
            row = tokens[start : start + sequence_length]
            nats += float(token_loss(model, torch.from_numpy(row)[None].to(device)))
            size += int(token_bytes[row[1:]].sum())
        if size:
            result[source] = nats / math.log(2) / size
    model.train(was_training)
    return {**result, "mean": sum(result.values()) / len(result)} if result else {}


def training_batches(recipe: Recipe, shards: TokenShards) -> TokenLoader:
    """The batches of a run, one for each of its steps.

    Raises:
        ValueError: The stages cannot be cut from the shards.
    """
    stages = [replace(stage, tokens=stage.steps * stage.batch_tokens) for stage in recipe.stages]
    return TokenLoader(shards, stages, seed=recipe.seed)


def train(
    recipe: Recipe,
    shards: TokenShards,
    output: Path | str,
    token_bytes: NDArray[np.int64],
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Train, or go on from the checkpoint in ``output``; yields one record a step (and appends it to metrics.jsonl).

    ``output`` ends up with ``model/`` (a Hugging Face folder, fp32) and ``metrics.jsonl``; ``state.pt`` holds what is
    resumed from and is replaced as a whole.

    Raises:
        ValueError: The stages cannot be cut from the shards, the model lacks some of their tokens, or the checkpoint in
            ``output`` is of other shards or another recipe.
        FloatingPointError: The loss or the gradient is not finite; the weights are those before that step.
    """
    if recipe.config.vocab_size < len(token_bytes):
        raise ValueError(f"vocab_size is {recipe.config.vocab_size}; the shards need at least {len(token_bytes)}.")
    loader = training_batches(recipe, shards)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    model = BTLMLMHeadModel(recipe.config).to(device).train()  # type: ignore[arg-type]
    options = recipe.optimizer
    groups = model.get_mup_param_groups(options.lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]

    done = _load_checkpoint(output, model, optimizer, loader)
    _truncate_metrics(output, done)
    started = time.perf_counter()
    for step, batch in enumerate(loader, start=done + 1):
        tokens, length, batch_tokens = batch.tokens, batch.sequence_length, batch.input_ids.size
        factor = recipe.lr_factor(tokens)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        # Each row predicts all its tokens but the first.
        valid = len(batch.input_ids) * (length - 1)
        loss = 0.0
        for part in torch.from_numpy(batch.input_ids).to(device).split(max(1, recipe.micro_batch_tokens // length)):
            part_loss = token_loss(model, part) / valid
            part_loss.backward()
            loss += float(part_loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"Step {step}: loss {loss}, gradient norm {norm}; nothing was updated.")
        optimizer.step()
        optimizer.zero_grad()
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "sequence_length": length,
            "loss": loss,
            "grad_norm": norm,
            "lr": options.lr * factor,
            "tokens_per_s": batch_tokens / (time.perf_counter() - started),
        }
        last = step == recipe.total_steps
        if last or tokens // recipe.eval_every_tokens > (tokens - batch_tokens) // recipe.eval_every_tokens:
            held_out = evaluate_bits_per_byte(model, shards, length, recipe.eval_tokens_per_source, token_bytes)
            record |= {"bits_per_byte": held_out} if held_out else {}
        with (output / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        if last or step % recipe.checkpoint_every_steps == 0:
            _save_checkpoint(output, model, optimizer, loader, step)
        yield record
        started = time.perf_counter()
    _save_model(output, model)


def _save_model(output: Path, model: BTLMLMHeadModel) -> None:
    partial = output / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(output / "model", ignore_errors=True)
    partial.rename(output / "model")


def _save_checkpoint(
    output: Path, model: BTLMLMHeadModel, optimizer: torch.optim.Optimizer, loader: TokenLoader, step: int
) -> None:
    partial = output / f"{STATE}.partial"
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "loader": loader.state_dict(),
    }
    torch.save(state, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(output / STATE)


def _load_checkpoint(
    output: Path, model: BTLMLMHeadModel, optimizer: torch.optim.Optimizer, loader: TokenLoader
) -> int:
    if not (output / STATE).exists():
        return 0
    state = torch.load(output / STATE, weights_only=True, map_location=model.device)
    try:
        loader.load_state_dict(state.get("loader", {}))
    except ValueError as error:
        raise ValueError(f"{output / STATE} is of another run; give a new output folder. {error}") from error
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    step: int = state["step"]
    return step


def _truncate_metrics(output: Path, step: int) -> None:
    """Drop what steps after the checkpoint recorded: they run again. The last line may be half written."""
    metrics = output / METRICS
    if metrics.exists():
        lines = metrics.read_text().rpartition("\n")[0].splitlines()
        partial = output / f"{METRICS}.partial"
        partial.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        partial.rename(metrics)
