"""Reading documents: JSON lines (plain, gzip, Zstandard), Parquet, text files and Hugging Face data sets.

What cannot be read comes out as a :class:`Problem` in its place, so that the reader decides how much of it is too much.
"""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .recipe import Read

HUB = "hf://"
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSON_LINES, ".parquet", ".txt")

# Text files of one task; other files have a task each.
_TEXT_FILES = 1000
_CHUNK = 2**20


class Document(NamedTuple):
    """One document."""

    text: str
    id: str
    source: str


class Problem(NamedTuple):
    """A document, or the rest of a file, that could not be read.

    ``line`` is the row in Parquet and 0 for the whole file.
    """

    file: str
    line: int
    reason: str


class Unit(NamedTuple):
    """The input of one task.

    ``names`` are the files' names in ids and messages: relative to the folder that was given, so that they are the same
    wherever it lies. ``bytes`` is the size on disk. ``shard`` and ``num_shards`` are those of a Hugging Face data set.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    bytes: int
    shard: int = 0
    num_shards: int = 1


def list_units(inputs: Iterable[Path | str], read: Read) -> list[Unit]:
    """The input cut into tasks, in the order of the names: the order in which inputs are given has no influence.

    Args:
        inputs: Files, folders (searched with everything below), or ``hf://`` and the name of a Hugging Face data set,
            on the hub or in a folder.
        read: Settings.

    Raises:
        ValueError: An input does not exist, is of no known kind, or holds nothing.
    """
    units = []
    texts: dict[Path, list[Path]] = {}
    for given in sorted({str(path) for path in inputs}):
        if given.startswith(HUB):
            units += _hub_units(given, read)
            continue
        path = Path(given)
        if not path.exists():
            raise ValueError(f"{path} does not exist; give files or folders of {', '.join(SUFFIXES)}.")
        if path.is_file() and not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}.")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        known = [file for file in files if file.name.endswith(SUFFIXES)]
        if not known:
            raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}.")
        root = path.parent
        units += [_unit([file], root) for file in known if file.suffix != ".txt"]
        texts.setdefault(root, []).extend(file for file in known if file.suffix == ".txt")
    for root, files in texts.items():
        units += [_unit(files[i : i + _TEXT_FILES], root) for i in range(0, len(files), _TEXT_FILES)]
    return sorted(units, key=lambda unit: (unit.names, unit.bytes, unit.paths))


def _unit(files: list[Path], root: Path) -> Unit:
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return Unit(names, tuple(str(file.absolute()) for file in files), sum(file.stat().st_size for file in files))


def read_unit(unit: Unit, read: Read, advance: Callable[[int], object] = int) -> Iterator[Document | Problem]:
    """Documents and problems of one task, in order.

    Args:
        unit: One of :func:`list_units`.
        read: Settings.
        advance: Called with the number of bytes on disk that were read since the last call.
    """
    for name, path in zip(unit.names, unit.paths, strict=True):
        records: Iterator[_Record | Problem]
        if path.startswith(HUB):
            records = _hub_records(name, path, unit, read)
        elif path.endswith(".txt"):
            records = _text_records(name, Path(path), read)
        elif path.endswith(".parquet"):
            records = _parquet_records(name, Path(path), read)
        else:
            records = _json_records(name, Path(path), read, advance)
        for record in records:
            yield record if isinstance(record, Problem) else _document(name, record, read)
        if path.endswith((".txt", ".parquet")):
            advance(Path(path).stat().st_size)


class _Record(NamedTuple):
    """What a document is before its text is looked at."""

    line: int
    text: Any
    id: Any
    source: Any


def _document(name: str, record: _Record, read: Read) -> Document | Problem:
    line, text = record.line, record.text
    if not isinstance(text, str):
        return Problem(name, line, f"no text in the field {read.text_field!r}")
    if "\0" in text:
        return Problem(name, line, "a null byte in the text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Problem(name, line, "half a surrogate pair in the text")
    if size > read.max_document_bytes:
        return Problem(name, line, f"{size:,} bytes of text, more than read.max_document_bytes")
    if len(text) > 1 and text[0] == text[-1] == text[len(text) // 2] and text.count(text[0]) == len(text):
        return Problem(name, line, f"one character repeated {len(text):,} times")
    id_ = f"{name}:{line}" if record.id is None else str(record.id)
    return Document(text, id_, record.source or _file_source(name))


def _record(line: int, fields: dict[str, Any], read: Read) -> _Record:
    sources = (_field(fields, field) for field in read.source_fields)
    source = next((source for source in sources if isinstance(source, str) and source), None)
    return _Record(line, _field(fields, read.text_field), _field(fields, read.id_field), source)


def _field(fields: Any, name: str) -> Any:
    for key in name.split("."):
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


def _file_source(name: str) -> str:
    path = Path(name)
    if path.suffix == ".txt" and path.parent.name:
        return path.parent.name
    return path.name.split(".")[0] or path.name


# JSON lines


def _json_records(name: str, path: Path, read: Read, advance: Callable[[int], object]) -> Iterator[_Record | Problem]:
    import orjson

    number = 0
    # In JSON a byte of text takes at most six.
    longest = 6 * read.max_document_bytes + _CHUNK
    try:
        for number, line in enumerate(_lines(_chunks(path, advance), longest), start=1):
            if line is None:
                yield Problem(name, number, f"a line of more than {longest:,} bytes")
                continue
            try:
                fields = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield Problem(name, number, f"no JSON in UTF-8 ({error})")
                continue
            yield _record(number, fields, read) if isinstance(fields, dict) else Problem(name, number, "no JSON object")
    except (OSError, EOFError, zlib.error) as error:
        yield Problem(name, number + 1, f"the rest of the file is damaged or cut off ({error})")
    else:
        if not number:
            yield Problem(name, 0, "an empty file")


def _lines(chunks: Iterator[bytes], longest: int) -> Iterator[bytes | None]:
    """Lines without their ends; ``None`` for one that is too long to be held."""
    parts: list[bytes] = []
    size, too_long = 0, False
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield None if too_long or size + len(line) > longest else b"".join([*parts, line])
            parts, size, too_long = [], 0, False
        size += len(rest)
        too_long = too_long or size > longest
        parts = [] if too_long else [*parts, rest]
    if size:
        yield None if too_long else b"".join(parts)


def _chunks(path: Path, advance: Callable[[int], object]) -> Iterator[bytes]:
    with path.open("rb") as file:
        stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        position = 0
        for chunk in _decompress(file) if path.suffix == ".zst" else iter(lambda: stream.read(_CHUNK), b""):
            advance(file.tell() - position)
            position = file.tell()
            yield chunk
        advance(file.tell() - position)


def _decompress(file: Any) -> Iterator[bytes]:
    """All Zstandard frames of a file. The library's own reader takes a file that was cut off for a complete one."""
    import zstandard

    frame = None
    while part := file.read(2**17):
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


# The other kinds


def _text_records(name: str, path: Path, read: Read) -> Iterator[_Record | Problem]:
    if (size := path.stat().st_size) > read.max_document_bytes:
        yield Problem(name, 1, f"{size:,} bytes of text, more than read.max_document_bytes")
        return
    content = path.read_bytes()
    try:
        yield _Record(1, content.decode(), name, None) if content else Problem(name, 0, "an empty file")
    except UnicodeDecodeError as error:
        yield Problem(name, content.count(b"\n", 0, error.start) + 1, "no UTF-8")


def _parquet_records(name: str, path: Path, read: Read) -> Iterator[_Record | Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = {field.split(".")[0] for field in (read.text_field, read.id_field, *read.source_fields)}
            columns = [column for column in file.schema_arrow.names if column in wanted]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for fields in batch.to_pylist():
                    row += 1
                    yield _record(row, fields, read)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        yield Problem(name, row + 1, f"the rest of the file is damaged or cut off ({reason})")
    else:
        if not row:
            yield Problem(name, 0, "an empty file")


def _hub_units(given: str, read: Read) -> list[Unit]:
    num_shards = _hub_data_set(given, read).num_shards
    name = given.removeprefix(HUB)
    return [Unit((name,), (given,), 0, shard, num_shards) for shard in range(num_shards)]


def _hub_records(name: str, given: str, unit: Unit, read: Read) -> Iterator[_Record | Problem]:
    shard = _hub_data_set(given, read).shard(unit.num_shards, unit.shard)
    for row, fields in enumerate(shard, start=1):
        record = _record(row, fields, read)
        yield record._replace(id=f"{name}/{unit.shard}:{row}") if record.id is None else record


def _hub_data_set(given: str, read: Read) -> Any:
    import datasets

    try:
        return datasets.load_dataset(given.removeprefix(HUB), split=read.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{given}: not a data set that can be read ({' '.join(str(error).split())}).") from error
