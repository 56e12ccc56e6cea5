"""`btlm data tokenize`: documents to token shards."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from btlm.model.tokenization_btlm import load_tokenizer

from .documents import read_documents
from .shards import write_shards


def tokenize(inputs: Sequence[Path | str], output: Path | str, holdout: float = 0.01) -> None:
    """Write token shards of the documents in ``inputs`` and print what each source holds.

    Raises:
        ValueError: An input cannot be read, ``holdout`` is not in [0, 1), or ``output`` exists.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; give a share of the documents in [0, 1).")
    console = Console(stderr=True)
    documents = track(read_documents(inputs), description="Reading", console=console)
    manifest = write_shards(documents, output, load_tokenizer().backend_tokenizer, holdout=holdout)
    table = Table("source", "split", *(f"[right]{name}" for name in ("documents", "bytes", "tokens")))
    for source, splits in manifest["sources"].items():
        for split, counts in splits.items():
            table.add_row(source, split, *(f"{counts[key]:,}" for key in ("documents", "bytes", "tokens")))
    console.print(table)
