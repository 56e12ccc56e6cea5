"""Reading documents: JSONL (plain, gzip, Zstandard) in SlimPajama's schema, and plain text files."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


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
        for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
            if file.name.endswith(".txt"):
                yield _read_text(file)
            elif file.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
                yield from _read_jsonl(file)
            elif file == path:
                raise ValueError(f"{file} is not .jsonl, .jsonl.gz, .jsonl.zst or .txt.")


def _read_text(file: Path) -> Document:
    try:
        return Document(file.read_text(encoding="utf-8"), file.name.split(".")[0])
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8.") from error


def _read_jsonl(file: Path) -> Iterator[Document]:
    for number, line in _numbered_lines(file):
        try:
            record = json.loads(line.decode())
            text, meta = record["text"], record.get("meta")
            source = (isinstance(meta, dict) and meta.get("redpajama_set_name")) or file.name.split(".")[0]
            if not (isinstance(text, str) and isinstance(source, str)):
                raise TypeError
            text.encode()  # Half a surrogate pair is valid JSON, but no text.
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}, line {number}: not a JSON object in UTF-8 with a string "text".') from error
        yield Document(text, source)


def _numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(_lines(file), start=1):
            yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}, line {number + 1}: damaged or cut off ({error}).") from error


def _lines(file: Path) -> Iterator[bytes]:
    if file.suffix != ".zst":
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            yield from stream
        return
    rest = b""
    for part in _decompress(file):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decompress(file: Path) -> Iterator[bytes]:
    """All Zstandard frames of a file. The library's own reader takes a file that was cut off for a complete one."""
    import zstandard

    frame = None
    with file.open("rb") as compressed:
        while part := compressed.read(2**17):
            while part:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(part)
                except zstandard.ZstdError as error:
                    raise OSError(error) from error
                part = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last Zstandard frame has no end")
