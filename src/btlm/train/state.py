"""Checkpoints: written completely or not at all, verified when they are read, and exact to resume from.

``checkpoints/step-00000050`` in the output of a run holds

- ``model/``: a Hugging Face folder (or the adapters) for use after training;
- ``state/``: weights and optimizer state in the format of torch.distributed.checkpoint, which any number of ranks can
  load, and the state of each rank's random numbers;
- ``checkpoint.json``, written last: step, position in the data, recipe, and size and SHA-256 of every file.

A checkpoint is written under a temporary name, and renamed when it is completely on the disk.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from btlm.console import quiet_transformers
from btlm.files import PARTIAL, file_sha256, remove_folder, replace_folder
from btlm.settings import plain

from .adapter_card import adapter_card
from .distributed import Ranks
from .model import Trainee
from .recipe import Recipe

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
MARKER = "checkpoint.json"
FORMAT = 1


def save_checkpoint(
    output: Path,
    step: int,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    loader_state: Mapping[str, Any],
    recipe: Recipe,
    ranks: Ranks,
) -> Path:
    """Write the checkpoint of a step; all ranks call this together.

    Args:
        output: Output folder of the run.
        step: Number of the finished step.
        trainee: Model in training.
        optimizer: Optimizer of its trained parameters.
        loader_state: State of the data loader after this step.
        recipe: Recipe of the run.
        ranks: Ranks of the run.

    Returns:
        Folder of the checkpoint.

    Raises:
        ValueError: The checkpoint could not be written.
    """
    final = output / FOLDER / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    with _writing(final):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        ranks.barrier()
        weights = _whole_weights(trainee, ranks)
        if ranks.first:
            with quiet_transformers():  # it would draw over the progress of the run
                _save_model(trainee, partial / "model", weights)
            if trainee.adapted:
                card = adapter_card(recipe, step, loader_state["tokens"])
                (partial / "model" / "README.md").write_text(card, encoding="utf-8")
        del weights
        with _alone(ranks):
            save_state(_state(trainee, optimizer), checkpoint_id=partial / "state", no_dist=ranks.world_size == 1)
        torch.save(_random_state(ranks), partial / "state" / f"random-{ranks.rank}.pt")
        ranks.barrier()
        if ranks.first:
            marker = {
                "format": FORMAT,
                "step": step,
                "world_size": ranks.world_size,
                "loader": dict(loader_state),
                "recipe": plain(recipe),
                "files": _digests(partial),
            }
            (partial / MARKER).write_text(json.dumps(marker, indent=1))
            replace_folder(partial, final)  # Only a damaged checkpoint can have this name.
        ranks.barrier()
    return final


def keep_checkpoints(output: Path, step: int, keep_last: int, keep_every_steps: int | None, ranks: Ranks) -> None:
    """Remove all checkpoints up to a step, except the last ones and those at multiples of ``keep_every_steps``.

    Checkpoints of later steps are damaged, since the run resumed from an earlier one; they are replaced when the run
    reaches their steps.
    """
    if ranks.first:
        for earlier, folder in [found for found in _checkpoints(output) if found[0] <= step][keep_last:]:
            if keep_every_steps is None or earlier % keep_every_steps:
                remove_folder(folder)
    ranks.barrier()


def find_checkpoint(output: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint of a run and its marker; damaged checkpoints are named in the log.

    Incomplete checkpoints that a killed process left behind are removed.

    Raises:
        ValueError: All checkpoints of the run are damaged.
    """
    found: tuple[Path, dict[str, Any]] | None = None
    problem = ""
    if ranks.first:
        for leftover in (output / FOLDER).glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        for _, folder in _checkpoints(output):
            try:
                found = folder, _verified(folder)
                break
            except ValueError as error:
                problem = str(error)
                logger.warning("%s; the checkpoint before it is used.", problem)
    found, problem = ranks.gather((found, problem))[0]
    if problem and found is None:
        raise ValueError(f"No checkpoint of {output / FOLDER} is intact ({problem}); remove the folder to start over.")
    return found


def load_checkpoint(
    folder: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, ranks: Ranks, world_size: int
) -> None:
    """Load weights, optimizer state and random numbers of a verified checkpoint; all ranks call this together.

    Args:
        folder: Folder of the checkpoint.
        trainee: Model of the same shape.
        optimizer: Optimizer of its trained parameters.
        ranks: Ranks of this run, of any number.
        world_size: Number of ranks that wrote the checkpoint; with another number, random numbers start anew.

    Raises:
        ValueError: The checkpoint belongs to another model.
    """
    _allocate(optimizer)
    state = _state(trainee, optimizer)
    try:
        with _alone(ranks):
            load_state(state, checkpoint_id=folder / "state", no_dist=ranks.world_size == 1)
    except (CheckpointException, RuntimeError) as error:
        # torch raises the same classes for a damaged file and for another model; only the message tells them apart.
        if not any(word in str(error) for word in ("mismatch", "Missing key")):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} does not fit the model of the recipe ({reason}); give a new output.") from error
    if world_size == ranks.world_size:
        random_state = torch.load(folder / "state" / f"random-{ranks.rank}.pt", weights_only=True)
        torch.set_rng_state(random_state["cpu"])
        if "device" in random_state and ranks.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["device"], ranks.device)


def publish_model(checkpoint: Path, output: Path) -> Path:
    """Publish the model folder of a checkpoint as ``output/model``, by hard links where possible; returns its path."""
    model, partial = output / "model", output / f"model{PARTIAL}"
    for leftover in output.glob(f"model*{PARTIAL}"):
        shutil.rmtree(leftover)
    shutil.copytree(checkpoint / "model", partial, copy_function=_link)
    replace_folder(partial, model)
    return model


# Helpers


def _checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, newest first."""
    folders = (output / FOLDER).glob("step-*")
    found = [(int(match[1]), f) for f in folders if (match := re.fullmatch(r"step-(\d+)", f.name))]
    return sorted(found, reverse=True)


def _state(trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Tensors to save and load, by kind and name: weights and their moments. Learning rates follow from the recipe."""
    state: dict[str, dict[str, Tensor]] = {"weights": {}}
    for name, parameter in trainee.trained().items():
        state["weights"][name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state.setdefault(key, {})[name] = value
    return state


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state tensors of a new AdamW, to be filled by loading."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": zeros,
                "exp_avg_sq": torch.zeros_like(zeros),
            }


def _whole_weights(trainee: Trainee, ranks: Ranks) -> dict[str, Tensor] | None:
    """Weights of the model to save, gathered to the first rank; ``None`` if there is only one rank."""
    if ranks.world_size == 1:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(trainee.saved, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Gathering makes a tied head a separate copy, which would be written too.
    tied = "lm_head.weight" if trainee.network.config.tie_word_embeddings else None
    return {name: value for name, value in weights.items() if isinstance(value, Tensor) and name != tied}


def _save_model(trainee: Trainee, folder: Path, weights: dict[str, Tensor] | None) -> None:
    # PEFT would look on the Hub for whether the vocabulary of the base was changed; it is not.
    options: dict[str, Any] = {"save_embedding_layers": False} if trainee.adapted else {}
    trainee.saved.save_pretrained(str(folder), state_dict=weights, **options)


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"device": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {})


def _verified(folder: Path) -> dict[str, Any]:
    """The marker of a checkpoint, whose files have been compared with it.

    Raises:
        ValueError: The marker or a file is missing or damaged; the message names it.
    """
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        version, files = marker["format"], marker["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged: {MARKER} cannot be read ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{folder} has format {version}, but this version reads {FORMAT}")
    actual = _digests(folder)
    for name, (size, sha256) in files.items():
        if name not in actual:
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if actual[name] != [size, sha256]:
            raise ValueError(
                f"{folder} is damaged: {name} has {actual[name][0]} bytes and another SHA-256 than recorded"
            )
    assert isinstance(marker, dict)
    return marker


def _digests(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file except the marker, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(file_sha256, files)
        return {str(f.relative_to(folder)): [f.stat().st_size, sha] for f, sha in zip(files, hashes, strict=True)}


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Turn any error of writing into one line that says why the checkpoint could not be written."""
    try:
        yield
    except (CheckpointException, OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The checkpoint {final} could not be written ({reason}). Make room on the disk; the same command "
            "continues from the checkpoint before it."
        ) from error


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Silence torch's warning that a single process works without torch.distributed."""
    with warnings.catch_warnings():
        if ranks.world_size == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
