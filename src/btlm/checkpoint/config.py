"""The configuration of a checkpoint, checked."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btlm.console import one_line
from btlm.model.architecture_btlm import Architecture
from btlm.model.config_keys_btlm import MODEL_TYPE, MUP_KEYS, missing_mup_keys

from .gpt2 import GPT2_MODEL_TYPE, config_of_gpt2

if TYPE_CHECKING:
    from btlm.model import BTLMConfig

_logger = logging.getLogger(__name__)


def read_architecture(folder: Path, name: str) -> Architecture:
    """The network that the ``config.json`` of a folder describes, read without torch, which takes seconds to import.

    A network of GPT-2 is one of BTLM. Missing muP keys are logged as a warning.

    Args:
        folder: Folder of the checkpoint.
        name: What the user calls it.

    Returns:
        The architecture. Its ``eos_token_id``, which is not checked, is that of ``generation_config.json`` if there is
        such a file.

    Raises:
        ValueError: It is not one of BTLM, or its values are impossible.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({one_line(error)}).") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in (MODEL_TYPE, GPT2_MODEL_TYPE):
        told = "names no model_type" if model_type is None else f"has the model_type {model_type!r}"
        raise ValueError(
            f"{name} is not a BTLM checkpoint: its config.json {told}, where {MODEL_TYPE!r} or {GPT2_MODEL_TYPE!r} "
            "belongs."
        )
    try:
        if model_type == GPT2_MODEL_TYPE:
            raw = config_of_gpt2(raw)
        architecture = Architecture.from_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if warning := missing_mup_keys(raw):
        _logger.warning(warning)
    return replace(architecture, eos_token_id=_stored_end(folder, raw))


def read_config(folder: Path, architecture: Architecture) -> "BTLMConfig":
    """The same as the configuration class of Transformers.

    Raises:
        ValueError: A key that Transformers reads itself has an impossible value.
    """
    from btlm.model import BTLMConfig

    mup = {key: getattr(architecture, key) for key in MUP_KEYS}  # given, so that missing ones are not told again
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if raw["model_type"] == GPT2_MODEL_TYPE:
            config: BTLMConfig = BTLMConfig.from_dict(config_of_gpt2(raw))
            return config
        return BTLMConfig.from_pretrained(folder, local_files_only=True, **mup)
    except Exception as error:  # which one depends on the key
        raise ValueError(f"{folder / 'config.json'} cannot be used ({one_line(error)}).") from error


def _stored_end(folder: Path, config: dict[str, Any]) -> Any:
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return generation.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        return config.get("eos_token_id")
