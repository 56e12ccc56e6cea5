"""The files that hold the weights of a checkpoint."""

import json
from pathlib import Path
from typing import NamedTuple

from btlm.console import first_of, one_line

# The names that Transformers reads, in the order in which it looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# Bytes per number of the dtypes, by safetensors' names.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


class Stored(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights of a folder, in safetensors where it has those, else pickled.

    Raises:
        ValueError: There are none, one is missing, or one is a pointer of Git LFS.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(f"{folder} holds no weights; there should be model.safetensors or pytorch_model.bin.")
    files = _parts(folder / name) if name.endswith(".index.json") else [folder / name]
    for file in files:
        with file.open("rb") as opened:
            if opened.read(64).startswith(b"version https://git-lfs"):
                raise ValueError(f"{file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")
    return files


def check_size(files: list[Path], num_parameters: int, *, quantized: bool) -> None:
    """Check that files are large enough for a configuration, before anything is allocated.

    Args:
        files: Files of the weights.
        num_parameters: Number of parameters that the configuration describes.
        quantized: The weights take four bits or eight.

    Raises:
        ValueError: They are too small.
    """
    size = sum(file.stat().st_size for file in files)
    if size < num_parameters * (0.5 if quantized else 1):  # the fewest bytes that a parameter takes
        raise ValueError(
            f"{files[0].parent}: config.json describes {num_parameters:,} parameters, and the weights take {size:,} "
            "bytes; the two do not belong together, or a file is cut short."
        )


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of weight files ({one_line(error)}).") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.parent} lacks {first_of(missing)}, which {index.name} names; download it again.")
    return files
