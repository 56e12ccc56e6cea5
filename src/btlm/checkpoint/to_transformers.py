"""A checkpoint to a model that can be trusted: everything that Transformers would pass over in silence is an error."""

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from btlm.console import first_of, one_line
from btlm.devices import best_device, usable_device
from btlm.model import BTLMConfig, BTLMLMHeadModel

from .config import read_config
from .locate import WEIGHTS, checkpoint_folder
from .tokenizer import load_tokenizer_of

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_model(
    name_or_path: Path | str, *, dtype: str = "auto", device: str = "auto", context_scaling: float | str = "none"
) -> tuple[BTLMLMHeadModel, PreTrainedTokenizerBase]:
    """Load a model for inference, and its tokenizer.

    Pickled weights are read as plain tensors only; nothing in them is run, and no code of the checkpoint is.

    Args:
        name_or_path: Folder of a checkpoint, or its id on the Hugging Face Hub.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"`` for that of the checkpoint.
        device: A device of torch, or ``"auto"`` for the first of cuda, mps and cpu that is there.
        context_scaling: Position interpolation, for text longer than the training length: ``"dynamic"``, a fixed factor
            above 1, or ``"none"`` for what the checkpoint says.

    Returns:
        The model in evaluation mode, every tensor from the checkpoint, and the tokenizer. Where a checkpoint has no
        tokenizer but the vocabulary size of GPT-2, it is GPT-2's. Its padding token is end-of-text if it has none.

    Raises:
        ValueError: One line that says what cannot be used, and what to do.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    torch_device = usable_device(best_device("cuda", "mps") if device == "auto" else device)
    folder = checkpoint_folder(name_or_path)
    config = read_config(folder, name_or_path)
    _set_context_scaling(config, context_scaling)
    check_weights(folder, config)
    tokenizer = load_tokenizer_of(folder, config, name_or_path)
    model = _load_weights(folder, config, DTYPES[dtype], name_or_path)
    end_ids(model)
    try:
        return model.to(torch_device), tokenizer  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{name_or_path} does not fit the memory of {torch_device} in {model.dtype}; try bfloat16, or the cpu."
        ) from error


def end_ids(model: BTLMLMHeadModel) -> set[int]:
    """The tokens that end a text; none for a model that was trained without such a token.

    Raises:
        ValueError: The checkpoint names something that is not a token.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(token, int) and 0 <= token < model.config.vocab_size for token in ids):
        raise ValueError(
            f"eos_token_id is {given!r} in generation_config.json or config.json; it must be a token below "
            f"{model.config.vocab_size:,}, a list of them, or null."
        )
    return set(ids)


# Context


def _set_context_scaling(config: BTLMConfig, context_scaling: float | str) -> None:
    if context_scaling == "none":
        return
    if config.position_embedding_type == "learned":
        raise ValueError(
            f"The context scaling {context_scaling} needs ALiBi, and this model has learned positions; use none."
        )
    if context_scaling == "dynamic":
        config.alibi_scaling = {"type": "linear", "train_seq_len": config.n_positions}
    else:
        try:
            factor = float(context_scaling)
        except ValueError:
            factor = math.nan
        if not 1 < factor < math.inf:
            raise ValueError(f"The context scaling is {context_scaling} and must be none, dynamic or a factor above 1.")
        config.alibi_scaling = {"type": "linear", "factor": factor}
    config.raise_problems()


# Weights


def check_weights(folder: Path, config: BTLMConfig) -> list[Path]:
    """The files of the weights, after all that can be told of them before anything is allocated.

    Raises:
        ValueError: They are missing, damaged, or too small for the configuration.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} holds no weights; there should be model.safetensors or pytorch_model.bin.")
    files = _shards(folder / name) if name.endswith(".index.json") else [folder / name]
    for file in files:
        _check_file(file)
    size = sum(file.stat().st_size for file in files)
    quantized = getattr(config, "quantization_config", None) is not None
    if size < config.num_parameters() * (0.5 if quantized else 1):  # bytes that a parameter takes at least
        raise ValueError(
            f"{folder}: config.json describes {config.num_parameters():,} parameters, and the weights take "
            f"{size:,} bytes; the two do not belong together, or a file is cut short."
        )
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of weight files ({one_line(error)}).") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{index.parent} lacks {first_of(missing)}, which {index.name} names; download it again.")
    return files


def _check_file(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged or cut short ({one_line(error)}); get it again.") from error


def _load_weights(folder: Path, config: BTLMConfig, dtype: torch.dtype | str, name: Path | str) -> BTLMLMHeadModel:
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about files that it then refuses
            loaded: Any = BTLMLMHeadModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # reported below, all at once
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights of {name} are damaged, or hold pickled objects besides tensors, which are never run; "
            "get them in safetensors."
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{name} cannot be loaded ({one_line(error)}); a file may be damaged, get it again."
        ) from error
    model, report = loaded
    problems = [
        *(f"{key} is missing" for key in sorted(report["missing_keys"])),
        *(f"{key} is not a tensor of BTLM" for key in sorted(report["unexpected_keys"])),
        *(
            f"{key} is {list(stored)} where config.json makes it {list(expected)}"
            for key, stored, expected in sorted(report["mismatched_keys"])
        ),
        *report["error_msgs"],
    ]
    if problems:
        raise ValueError(f"The weights of {name} do not fit its config.json: {first_of(problems)}.")
    return cast(BTLMLMHeadModel, model)
