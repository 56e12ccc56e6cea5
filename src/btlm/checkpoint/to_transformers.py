"""A checkpoint to a model of Transformers; what Transformers only warns about is an error here."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from btlm.console import one_line
from btlm.devices import best_device, usable_device
from btlm.errors import DoesNotFit
from btlm.model import BTLMConfig, BTLMLMHeadModel, config_keys_btlm

from .open import Checkpoint
from .tensor_file import read_header
from .tensors import check_fit, unpickle
from .weight_files import check_size

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def load_config(checkpoint: Checkpoint | Path | str) -> BTLMConfig:
    """The configuration of a checkpoint; its weights are neither read nor downloaded.

    Args:
        checkpoint: An open checkpoint, its folder, or its id on the Hugging Face Hub.

    Raises:
        ValueError: There is no such checkpoint, it is not one of BTLM, or its values are impossible.
    """
    return Checkpoint.open(checkpoint, weights=False).config()


def load_model(
    checkpoint: Checkpoint | Path | str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    context_scaling: float | str = "none",
) -> tuple[BTLMLMHeadModel, PreTrainedTokenizerBase]:
    """Load a model for inference, and its tokenizer.

    Pickled weights are read as plain tensors only; nothing in them is run, and no code of the checkpoint is.

    Args:
        checkpoint: An open checkpoint, its folder, or its id on the Hugging Face Hub.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"`` for that of the checkpoint.
        device: A device of torch, or ``"auto"`` for the first of cuda, mps and cpu that is there.
        context_scaling: Position interpolation, for text longer than the training length: ``"dynamic"``, a fixed factor
            above 1, or ``"none"`` for what the checkpoint says.

    Returns:
        The model in evaluation mode, every tensor from the checkpoint, and the tokenizer. Where a checkpoint has no
        tokenizer but the vocabulary size of GPT-2, it is GPT-2's. Its padding token is end-of-text if it has none.

    Raises:
        DoesNotFit: The memory of the device is too small.
        ValueError: One line that says what cannot be used, and what to do.
    """
    if dtype not in DTYPES:
        raise ValueError(f"The dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    torch_device = usable_device(best_device("cuda", "mps") if device == "auto" else device)
    checkpoint = Checkpoint.open(checkpoint)
    config = checkpoint.config()
    _set_context_scaling(config, context_scaling)
    check_weights(checkpoint, config)
    tokenizer = checkpoint.transformers_tokenizer
    model = load_weights(checkpoint, config, DTYPES[dtype])
    end_ids(model)
    try:
        return model.to(torch_device), tokenizer  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{checkpoint.name} does not fit the memory of {torch_device} in {model.dtype}; try bfloat16, or the cpu."
        ) from error


def end_ids(model: BTLMLMHeadModel) -> frozenset[int]:
    """The tokens that end a text; none for a model that was trained without such a token.

    Raises:
        ValueError: The generation configuration names something that is not a token.
    """
    stored = getattr(model.generation_config, "eos_token_id", None)
    return config_keys_btlm.end_ids(stored, model.config.vocab_size)


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


def check_weights(checkpoint: Checkpoint, config: BTLMConfig) -> None:
    """Check all that can be told of the weights before anything is allocated.

    Raises:
        ValueError: They are missing, damaged, or too small for the configuration.
    """
    files = checkpoint.weight_files
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)
    quantized = getattr(config, "quantization_config", None) is not None
    check_size(files, config.num_parameters(), quantized=quantized)


def load_weights(checkpoint: Checkpoint, config: BTLMConfig, dtype: torch.dtype | str) -> BTLMLMHeadModel:
    """A model in evaluation mode on the CPU, every tensor from the checkpoint.

    Args:
        checkpoint: With weights that :func:`check_weights` accepts.
        config: Its configuration, which becomes that of the model.
        dtype: Of the weights; ``"auto"`` for that of the checkpoint.

    Raises:
        ValueError: The weights are damaged, or do not fit the configuration.
    """
    files = checkpoint.weight_files
    source: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.folder}
    if files[0].suffix != ".safetensors":  # Transformers' own reader of pickles names neither file nor remedy
        tensors = {name: tensor for file in files for name, tensor in unpickle(file).items()}
        source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        if (checkpoint.folder / "generation_config.json").is_file():
            source["generation_config"] = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    try:
        loaded: Any = BTLMLMHeadModel.from_pretrained(
            **source,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below, all at once
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{checkpoint.name} cannot be loaded ({one_line(error)}); a file may be damaged, get it again."
        ) from error
    model, report = loaded
    check_fit(
        checkpoint.name,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        shapes=report["mismatched_keys"],
        others=report["error_msgs"],
    )
    # What adapters name as their base: an id on the Hub says more than a folder of its cache.
    model.name_or_path = model.config.name_or_path = checkpoint.name
    return cast(BTLMLMHeadModel, model)
