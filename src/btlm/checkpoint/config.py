"""The configuration of a checkpoint, checked."""

import json
from pathlib import Path

from btlm.console import one_line
from btlm.model import BTLMConfig
from btlm.model.quantization_btlm import BTLMQuantizationConfig


def read_config(folder: Path, name: Path | str) -> BTLMConfig:
    """The configuration of a folder.

    Raises:
        ValueError: It is not one of BTLM, or its values are impossible.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({one_line(error)}).") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != BTLMConfig.model_type:
        told = "names no model_type" if model_type is None else f"has the model_type {model_type!r}"
        raise ValueError(f"{name} is not a BTLM checkpoint: its config.json {told}, where 'btlm' belongs.")
    try:
        if (stored := raw.get("quantization_config")) is not None:
            BTLMQuantizationConfig(**stored)
        return BTLMConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # what Transformers raises for the keys that it reads itself depends on the key
        raise ValueError(f"{path} cannot be used ({one_line(error)}).") from error
