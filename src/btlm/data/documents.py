"""Reading documents: JSON lines (plain, gzip, Zstandard), Parquet, text files and Hugging Face data sets.

A document that cannot be read is returned as a :class:`Problem`, so that the caller decides how many are too many.
"""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from btlm.settings import did_you_mean_path

from .recipe import Read

HUB = "hf://"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet", ".txt")
KINDS = ", ".join(SUFFIXES)

# Number of text files per task; every other file has a task of its own.
_TEXT_FILES = 1000
# Number of Parquet rows in memory at once: few, since each may hold the longest possible document.
_PARQUET_ROWS = 16
_CHUNK = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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

    ``names`` are the files' names in ids and messages. They begin with the name of the given folder, so that they do
    not depend on where it lies. ``bytes`` is the size on disk. ``version`` changes when the content changes. ``shard``
    and ``num_shards`` belong to a Hugging Face data set.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    bytes: int
    version: str
    shard: int = 0
    num_shards: int = 1


def list_units(inputs: Iterable[Path | str], read: Read) -> tuple[list[Unit], list[str], list[str]]:
    """Divide the input into tasks, sorted by name, so that the order in which inputs are given does not matter.

    Args:
        inputs: Files, folders (searched recursively), or ``hf://`` and the name of a Hugging Face data set, on the hub
            or in a folder.
        read: How to read documents.

    Returns:
        The tasks; and of the files in folders, those of no known kind, and those that are hidden or in a hidden folder,
        which editors and file systems leave beside the data. A file that is given twice is read once.

    Raises:
        ValueError: An input does not exist, is of no known kind, holds no documents, or is the output of a stage.
    """
    units: list[Unit] = []
    others: list[str] = []
    hidden: list[str] = []
    texts: dict[Path, list[Path]] = {}
    seen: set[Path] = set()
    for given in sorted({str(path) for path in inputs}):
        if given.startswith(HUB):
            units += _hub_units(given, read)
            continue
        path = Path(given)
        if not path.exists():
            remedy = did_you_mean_path(path) or f"; give files or folders of {KINDS}."
            raise ValueError(f"{path} does not exist{remedy}")
        if path.is_file() and not _is_known(path):
            raise ValueError(f"{path} is not one of {KINDS}.")
        files = [path] if path.is_file() else _files_below(path)
        if stage := next((file.parent for file in files if file.name == "begun.json"), None):
            raise ValueError(
                f"{stage} is the output of a data stage; give documents, or only that folder to the next stage."
            )
        hidden += [str(file) for file in files if _is_hidden(file, path)]
        files = [file for file in files if not _is_hidden(file, path)]
        known = [file for file in files if _is_known(file)]
        if not known:
            raise ValueError(f"{path} holds no file that ends in {KINDS}.")
        others += [str(file) for file in files if not _is_known(file)]
        root = path.absolute().parent
        for file in (file.absolute() for file in known if file.resolve() not in seen):
            seen.add(file.resolve())
            if file.suffix.lower() == ".txt":
                texts.setdefault(root, []).append(file)
            else:
                units.append(_unit([file], root))
    for root, files in texts.items():
        units += [_unit(files[i : i + _TEXT_FILES], root) for i in range(0, len(files), _TEXT_FILES)]
    return sorted(units, key=lambda unit: (unit.names, unit.bytes, unit.paths, unit.shard)), others, hidden


def _is_known(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _is_hidden(file: Path, given: Path) -> bool:
    return any(name.startswith(".") for name in file.relative_to(given).parts)


def _files_below(folder: Path) -> list[Path]:
    found = os.walk(folder, followlinks=True)
    return sorted(Path(parent) / name for parent, _, names in found for name in names)


def _unit(files: list[Path], root: Path) -> Unit:
    status = [file.stat() for file in files]
    names = tuple(file.relative_to(root).as_posix() for file in files)
    version = " ".join(str(one.st_mtime_ns) for one in status)
    return Unit(names, tuple(map(str, files)), sum(one.st_size for one in status), version)


def read_unit(unit: Unit, read: Read, advance: Callable[[int], object] = int) -> Iterator[Document | Problem]:
    """Documents and problems of one task, in order.

    Args:
        unit: A task from :func:`list_units`.
        read: How to read documents.
        advance: Called with the number of bytes on disk that were read since the last call.
    """
    for name, path in zip(unit.names, unit.paths, strict=True):
        records: Iterator[_Record | Problem]
        if path.startswith(HUB):
            records = _hub_records(name, path, unit, read)
        elif path.lower().endswith(".txt"):
            records = _text_records(name, Path(path), read)
        elif path.lower().endswith(".parquet"):
            records = _parquet_records(name, Path(path), read)
        else:
            records = _json_records(name, Path(path), read, advance)
        for record in records:
            yield record if isinstance(record, Problem) else _document(name, record, read)
        if path.lower().endswith((".txt", ".parquet")):
            advance(Path(path).stat().st_size)


class _Record(NamedTuple):
    """The fields of a document before its text is checked."""

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
        return Problem(name, line, "half of a surrogate pair in the text")
    if size > read.max_document_bytes:
        return Problem(name, line, f"{size:,} bytes of text, more than read.max_document_bytes")
    body = text.strip() or text
    if len(body) > 1 and body[0] == body[-1] == body[len(body) // 2] and body.count(body[0]) == len(body):
        return Problem(name, line, f"one character repeated {len(body):,} times")
    id_ = f"{name}:{line}" if record.id is None else str(record.id)
    return Document(text, id_, read.source or record.source or Path(name).name.split(".")[0] or name)


def _record(line: int, fields: dict[str, Any], read: Read) -> _Record:
    sources = (_field(fields, field) for field in read.source_fields)
    source = next((str(source) for source in sources if isinstance(source, str | int) and source != ""), None)
    return _Record(line, _field(fields, read.text_field), _field(fields, read.id_field), source)


def _field(fields: Any, name: str) -> Any:
    for key in name.split("."):
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


# JSON lines


def _json_records(name: str, path: Path, read: Read, advance: Callable[[int], object]) -> Iterator[_Record | Problem]:
    import orjson

    number = 0
    # In JSON, a byte of text takes at most six bytes.
    longest = 6 * read.max_document_bytes + _CHUNK
    try:
        for number, line in enumerate(_lines(path, longest, advance), start=1):
            if line is None:
                yield Problem(name, number, f"a line of more than {longest:,} bytes")
                continue
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not content.strip():
                continue
            try:
                fields = orjson.loads(content)
            except orjson.JSONDecodeError as error:
                yield Problem(name, number, f"not JSON in UTF-8 ({error})")
                continue
            yield _record(number, fields, read) if isinstance(fields, dict) else Problem(name, number, "no JSON object")
    except (OSError, EOFError, zlib.error) as error:
        yield Problem(name, number + 1, f"the rest of the file is damaged or cut off ({error})")
    else:
        if not number:
            yield Problem(name, 0, "an empty file")


def _lines(path: Path, longest: int, advance: Callable[[int], object]) -> Iterator[bytes | None]:
    """The decompressed lines; ``None`` for a line longer than ``longest`` bytes, which is not held in memory."""
    import pyarrow as pa

    with path.open("rb") as file:
        stream: Any = file
        if path.suffix.lower() == ".gz":
            stream = gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            # zstandard's own reader does not notice that a file was cut off.
            stream = pa.CompressedInputStream(file, "zstd")
        lines = io.BufferedReader(stream, _CHUNK)
        position, is_rest = 0, False
        while line := lines.readline(longest + 1):
            is_whole = len(line) <= longest or line.endswith(b"\n")
            if not is_rest:
                yield line if is_whole else None
            is_rest = not is_whole
            advance(file.tell() - position)
            position = file.tell()


# Text files, Parquet and data sets


def _text_records(name: str, path: Path, read: Read) -> Iterator[_Record | Problem]:
    if (size := path.stat().st_size) > read.max_document_bytes:
        yield Problem(name, 1, f"{size:,} bytes of text, more than read.max_document_bytes")
        return
    content = path.read_bytes()
    try:
        yield _Record(1, content.decode(), name, path.parent.name) if content else Problem(name, 0, "an empty file")
    except UnicodeDecodeError as error:
        yield Problem(name, content.count(b"\n", 0, error.start) + 1, "not UTF-8")


def _parquet_records(name: str, path: Path, read: Read) -> Iterator[_Record | Problem]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = {field.split(".")[0] for field in (read.text_field, read.id_field, *read.source_fields)}
            columns = [column for column in file.schema_arrow.names if column in wanted]
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns, use_threads=False):
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
    import datasets

    data_set = _hub_data_set(given, read)
    builder = datasets.load_dataset_builder(given.removeprefix(HUB), name=read.config, revision=read.revision)
    # For files on the hub this is their revision, for local files the time of their last change.
    version = str([files.origin_metadata for files in (builder.config.data_files or {}).values()])
    name = given.removeprefix(HUB)
    return [Unit((name,), (given,), 0, version, shard, data_set.num_shards) for shard in range(data_set.num_shards)]


def _hub_records(name: str, given: str, unit: Unit, read: Read) -> Iterator[_Record | Problem]:
    name, row = f"{name}/{unit.shard}", 0
    try:
        for fields in _hub_data_set(given, read).shard(unit.num_shards, unit.shard):
            row += 1
            record = _record(row, fields, read)
            yield record._replace(id=f"{name}:{row}") if record.id is None else record
    # Every format raises errors of its own, and reading cannot continue after one.
    except Exception as error:
        reason = " ".join(str(error).split())
        yield Problem(name, row + 1, f"the rest of the shard cannot be read ({reason})")


def _hub_data_set(given: str, read: Read) -> Any:
    import datasets

    options = {"split": read.split, "name": read.config, "revision": read.revision, "streaming": True}
    try:
        return datasets.load_dataset(given.removeprefix(HUB), **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{given}: not a data set that can be read ({' '.join(str(error).split())}).") from error
