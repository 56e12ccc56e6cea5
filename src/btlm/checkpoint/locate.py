"""From what a user calls a model to a folder on this machine."""

from pathlib import Path

from btlm.console import one_line
from btlm.errors import OptionError

from .weight_files import WEIGHTS

ADAPTER = "adapter_config.json"  # in a folder of adapters, as PEFT writes it
BUNDLED_MODEL = Path(__file__).parent / "btlm-tiny"

_DESCRIPTION = ("config.json", "generation_config.json")
_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def checkpoint_folder(name_or_path: Path | str, *, weights: bool = True) -> Path:
    """The folder of a checkpoint; one that is named by its id on the Hugging Face Hub is downloaded to the Hub's cache.

    Args:
        name_or_path: A folder, or an id on the Hub such as ``cerebras/btlm-3b-8k-base``. A folder goes first.
        weights: Download the weights and the tokenizer too. Weights in safetensors are preferred to pickled ones.

    Raises:
        ValueError: There is no such folder, it holds no ``config.json``, or the Hub cannot give it.
    """
    path = Path(name_or_path)
    if not str(name_or_path).strip():
        raise ValueError("The name of the model is empty; give a folder, or an id on the Hugging Face Hub.")
    if path == BUNDLED_MODEL and not path.is_dir():
        raise OptionError("This installation of btlm has no bundled model; name another one with {model}.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder that holds config.json and the weights.")
    folder = path if path.is_dir() else _download(str(name_or_path), weights=weights)
    if not (folder / "config.json").is_file():
        if is_adapter(folder):
            raise ValueError(f"{name_or_path} holds adapters and not a model; merge them first, with `btlm merge`.")
        inside = next((file.parent for file in sorted(folder.glob("*/*config.json")) if _is_model(file.parent)), None)
        remedy = f"{inside} is one" if inside else "give the folder that has one"
        raise ValueError(f"{name_or_path} has no config.json, so it is not a checkpoint; {remedy}.")
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters instead of a model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter(folder)


def _download(repo_id: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # Only without safetensors is it worth to download the pickled copy of the same weights.
    wanted = (_SAFETENSORS, _PICKLES) if weights else ((),)
    try:
        for names in wanted:
            patterns = [*_DESCRIPTION, *(_TOKENIZER if weights else ()), *names]
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns))
            if any((folder / name).exists() for name in WEIGHTS):
                break
    except HFValidationError as error:
        raise ValueError(
            f"There is no folder {repo_id!r}, and it cannot be an id on the Hugging Face Hub, which reads owner/name."
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repo_id} is gated on the Hugging Face Hub; ask for access on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id} is neither a folder here nor a public model on the Hugging Face Hub; check the name, or log in "
            "with `hf auth login` if it is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{repo_id} is neither a folder here nor downloaded before, and the Hugging Face Hub cannot be reached; "
            "check the path, or the connection (and HF_HUB_OFFLINE)."
        ) from error
    except Exception as error:  # of the network, in all its ways
        raise ValueError(f"{repo_id} is no folder here, and its download failed ({one_line(error)}).") from error
    return folder
