"""The folder of a calibrated copy while it is written: it outlives a stop, and the same command goes on from there."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from btlm.console import gigabytes, note, plural
from btlm.errors import DoesNotFit
from btlm.files import PARTIAL, finish_folder, naming_full_disk, sync, whole_file

WEIGHTS = "model.safetensors"
_STATE = "unfinished.safetensors"


class UnfinishedCopy:
    """A folder with a temporary name, and how far it has come.

    Args:
        folder: The folder.
        key: Everything that its content depends on, as plain values.

    Attributes:
        blocks: Number of blocks that are in it.
        hidden_BQC: What the next block gets of the calibration text, fp32; ``None`` before the first one.
        notes: What the caller wants to know about the blocks, as plain values.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.blocks = 0
        self.hidden_BQC: Tensor | None = None
        self.notes: dict[str, Any] = {}
        self._key = json.dumps(key, sort_keys=True)

    def save(self, blocks: int, hidden_BQC: Tensor, notes: Mapping[str, Any]) -> None:
        """Record that blocks are in the file of the weights; a power cut leaves this record or the one before."""
        sync(self.folder / WEIGHTS)
        facts = {"key": self._key, "blocks": str(blocks), "notes": json.dumps(notes)}
        with whole_file(self.folder / _STATE) as partial:
            save_file({"hidden": hidden_BQC}, partial, metadata=facts)
        self.blocks = blocks

    def load(self) -> bool:
        """Read the record of an earlier run; returns whether there is one with the same key."""
        try:
            with safe_open(self.folder / _STATE, "pt") as state:
                facts = state.metadata() or {}
                if facts.get("key") != self._key or not (self.folder / WEIGHTS).is_file():
                    return False
                self.hidden_BQC = state.get_tensor("hidden")
        except (OSError, SafetensorError):
            return False
        self.blocks, self.notes = int(facts["blocks"]), json.loads(facts["notes"])
        return True


@contextmanager
def unfinished_copy(path: Path, key: Mapping[str, Any], num_blocks: int) -> Iterator[UnfinishedCopy]:
    """Yield the folder that becomes ``path`` when the context ends without an error; the caller has locked ``path``.

    What an earlier run has left is taken up if its key is the same, and removed otherwise. If the context ends with an
    error, or the process is killed, the folder stays as soon as one block is in it; only after a ``ValueError`` other
    than ``DoesNotFit`` it is removed, since the same command would end in the same way.

    Args:
        path: The copy.
        key: See :class:`UnfinishedCopy`.
        num_blocks: Number of blocks of the model, to tell the user how far the copy is.
    """
    copy = UnfinishedCopy(path.with_name(f".{path.name}.unfinished{PARTIAL}"), key)
    if copy.folder.exists():
        if copy.load():
            note(f"going on after {copy.blocks} of {plural(num_blocks, 'block')}, which an earlier run has left")
        else:
            if (copy.folder / _STATE).exists():  # else that run had not finished a block
                note("starting anew: what an earlier run has left is of other weights, text, options or versions")
            shutil.rmtree(copy.folder)
    copy.folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming_full_disk(path):
            yield copy
            (copy.folder / _STATE).unlink(missing_ok=True)
            finish_folder(copy.folder, path)
    except BaseException as error:
        again = isinstance(error, ValueError) and not isinstance(error, DoesNotFit)
        if copy.blocks and not again:
            size = sum(file.stat().st_size for file in copy.folder.iterdir())
            note(
                f"{copy.blocks} of {plural(num_blocks, 'block')} are done, and the same command goes on after them; "
                f"remove {copy.folder} ({gigabytes(size)}) if you do not want that"
            )
        else:
            shutil.rmtree(copy.folder, ignore_errors=True)
        raise


def kept_bytes(rows_BQ: Tensor, width: int) -> int:
    """Bytes that the records of a copy take on the disk, at most, for a text of tokens ``[B, Q]``."""
    return 2 * 4 * rows_BQ.numel() * width + 1_000_000  # a new one is written beside the old one
