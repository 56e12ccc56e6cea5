"""Folders of adapters, as PEFT writes them: opened like a checkpoint, and merged into the model that they change."""

import json
import math
import shutil
import tempfile
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from btlm.console import note, one_line, plain_messages
from btlm.errors import OptionError
from btlm.files import locked, require_space, whole_folder

from .locate import ADAPTER, is_adapter
from .open import Checkpoint
from .tensor_file import read_header


@dataclass(frozen=True)
class Adapted:
    """Option of every command that reads a model.

    Args:
        base: Model that a folder of adapters changes (default: the one that its adapter_config.json names).
    """

    base: Annotated[str, "MODEL"] | None = None


def open_checkpoint(
    model: Checkpoint | Path | str, base: Path | str | None = None, *, weights: bool = True
) -> Checkpoint:
    """Open a checkpoint, or a folder of adapters as a checkpoint.

    Adapters are merged into a temporary folder, which is removed with the returned object.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        base: Model that the adapters change, instead of the one that their ``adapter_config.json`` names.
        weights: As for :meth:`Checkpoint.open`; without weights, the checkpoint is the base of the adapters.

    Raises:
        ModuleNotFoundError: The library ``peft`` is not installed.
        ValueError: There is no such checkpoint, or the adapters cannot be merged.
    """
    if isinstance(model, Checkpoint) or not is_adapter(Path(model)):
        if base is not None:
            name = model.name if isinstance(model, Checkpoint) else model
            raise OptionError("{base} is for folders of adapters, and {} is not one; leave it out.", str(name))
        return Checkpoint.open(model, weights=weights)
    if not weights:
        return _base_of(Path(model), base, weights=False)
    note(f"merging the adapters of {model} into their base; `btlm merge` writes the result for good")
    folder = Path(tempfile.mkdtemp(prefix="btlm-merged-"))
    try:
        _merge(Path(model), folder, base)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    checkpoint = Checkpoint(model, folder)
    weakref.finalize(checkpoint, shutil.rmtree, folder, ignore_errors=True)
    return checkpoint


def merge(adapter: Path | str, output: Path | str, base: Path | str | None = None) -> None:
    """Write the checkpoint of a base model with adapters merged into its weights.

    Args:
        adapter: Folder of adapters.
        output: New folder; appears when it is complete.
        base: As for :func:`open_checkpoint`.

    Raises:
        ModuleNotFoundError: The library ``peft`` is not installed.
        ValueError: ``adapter`` is not a folder of adapters, ``output`` exists or does not fit on the disk, or the
            adapters cannot be merged.
    """
    adapter, output = Path(adapter), Path(output)
    if not is_adapter(adapter):
        raise ValueError(f"{adapter} has no {ADAPTER}, so it holds no adapters; give the folder that has one.")
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; give a new folder or remove it.")
    with locked(output), whole_folder(output) as partial:
        name = _merge(adapter, partial, base)
    note(f"wrote {output}: {name} with the adapters of {adapter}")


def num_adapter_weights(adapter: Path) -> int:
    """Number of weights in a folder of adapters in safetensors.

    Raises:
        ValueError: The file is missing or damaged.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{adapter} has no {file.name}, the weights of its adapters.")
    return sum(math.prod(stored.shape) for stored in read_header(file).values())


def _merge(adapter: Path, output: Path, base: Path | str | None) -> str:
    """Write a merged model to a folder; returns the name of the base."""
    from peft import PeftModel

    from .to_transformers import load_model

    checkpoint = _base_of(adapter, base, weights=True)
    with plain_messages():
        model, tokenizer = load_model(checkpoint, device="cpu")
        require_space(output, sum(p.nbytes for p in model.parameters()), "choose another place")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                adapted: Any = PeftModel.from_pretrained(model, str(adapter))
                merged = adapted.merge_and_unload(safe_merge=True)
        except Exception as error:  # which one depends on what is wrong
            raise ValueError(
                f"The adapters of {adapter} cannot be merged into {checkpoint.name} ({one_line(error)})."
            ) from error
        merged.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return checkpoint.name


def _base_of(adapter: Path, base: Path | str | None, *, weights: bool) -> Checkpoint:
    try:
        named = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{adapter / ADAPTER} cannot be read ({one_line(error)}).") from error
    if not (base or named):
        raise OptionError("{} does not name the model that the adapters change; give it as {base}.", adapter / ADAPTER)
    try:
        return Checkpoint.open(base or named, weights=weights)
    except ValueError as error:
        if base:
            raise
        raise OptionError(
            "{} holds adapters of {!r}, which cannot be used ({}); name their model with {base}.",
            str(adapter),
            named,
            one_line(error),
        ) from error
