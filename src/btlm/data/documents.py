"""Reading documents: JSONL (plain, gzip, Zstandard) in SlimPajama's schema, and plain text files."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast


class Document(NamedTuple):
    """One document and the name of the source that it comes from."""

    text: str
    source: str


def read_documents(paths: Iterable[Path | str]) -> Iterator[Document]:
    """Documents of the files in their order; those of a folder in the order of their names.

    The source is ``meta.redpajama_set_name`` where the document has it, else the name of its file.

    Raises:
        ValueError: Names the file, and the line where there is one, that cannot be read.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist; give files or folders of .jsonl, .jsonl.gz, .jsonl.zst or .txt.")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.name
            if name.endswith(".txt"):
                yield Document(file.read_text(encoding="utf-8"), name.split(".")[0])
            elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
                yield from _read_jsonl(file)
            elif not path.is_dir():
                raise ValueError(f"{file} is not .jsonl, .jsonl.gz, .jsonl.zst or .txt.")


def _read_jsonl(file: Path) -> Iterator[Document]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                text = record["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{file}, line {number}: not a JSON object with a "text" field.') from error
            meta = record.get("meta") or {}
            yield Document(text, meta.get("redpajama_set_name") or file.name.split(".")[0])


def _open_text(file: Path) -> IO[str]:
    if file.suffix == ".zst":
        import zstandard

        return cast("IO[str]", io.TextIOWrapper(zstandard.open(file, "rb"), encoding="utf-8"))
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
