"""Documents between the stages: Parquet files of bounded size, called parts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btlm.files import whole_file

from .documents import Document

# Bytes of text per row group: few, so that a single document can be read without its whole part.
_ROW_GROUP_BYTES = 8_000_000

# A document's number within a stage consists of its task, its part among the task's parts, and its row in the part.
_PART_BITS, _ROW_BITS = 16, 24
_PART_DOCUMENTS = 1 << 20


def part_of(document: int) -> str:
    """File name of the part that has a document."""
    return part_name(*divmod(document >> _ROW_BITS, 1 << _PART_BITS))


def part_name(task: int, part: int) -> str:
    """File name of a part."""
    return f"{task:06d}-{part:04d}.parquet"


def first_in(name: str) -> int:
    """Number of the first document in the part with a file name; the others follow it."""
    task, part = map(int, Path(name).stem.split("-"))
    return (task << _PART_BITS | part) << _ROW_BITS


def table_of(documents: Sequence[tuple[Document, int, str]]) -> Any:
    """An Arrow table of documents, with their size in bytes of UTF-8 and the SHA-256 of these bytes in hexadecimal."""
    import pyarrow as pa

    types = {"text": pa.large_string(), "id": pa.string(), "source": pa.string()}
    schema = pa.schema({**types, "bytes": pa.int64(), "sha256": pa.string()})
    rows = [{**document._asdict(), "bytes": size, "sha256": sha256} for document, size, sha256 in documents]
    return pa.Table.from_pylist(rows, schema=schema)


def write_part(folder: Path, name: str, table: Any, order: NDArray[np.int64] | None = None) -> list[Any]:
    """Write a table of documents as a part, and add the documents' numbers.

    Args:
        folder: Folder of the parts.
        name: File name of the part.
        table: Table of the documents.
        order: Row numbers in the order to write, int64 ``[documents]``; by default the table's own order.

    Returns:
        The part's entry in the stage's result: name, number of documents, bytes of text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if "document" in table.column_names:
        table = table.drop_columns("document")
    first = first_in(name)
    size = pc.sum(table["bytes"]).as_py() or 0
    rows = max(1, len(table) * _ROW_GROUP_BYTES // max(size, _ROW_GROUP_BYTES))
    schema = table.schema.append(pa.field("document", pa.int64()))
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / name) as partial, pq.ParquetWriter(partial, schema, **PARQUET) as writer:
        for start in range(0, len(table), rows):
            group = table.slice(start, rows) if order is None else _take(table, order[start : start + rows])
            numbers = pa.array(range(first + start, first + start + len(group)), pa.int64())
            writer.write_table(group.append_column("document", numbers), row_group_size=rows)
    return [name, len(table), size]


def _take(table: Any, rows: NDArray[np.int64]) -> Any:
    """Rows of a table. Arrow's own ``take`` would first copy all text of a table that has several chunks."""
    import pyarrow as pa

    chunks = table["text"].chunks
    starts = np.cumsum([0, *map(len, chunks)])
    places = np.searchsorted(starts, rows, side="right") - 1
    texts = [chunks[chunk].slice(row - starts[chunk], 1) for row, chunk in zip(rows, places, strict=True)]
    return table.drop_columns("text").take(rows).add_column(0, "text", pa.concat_arrays(texts))


def write_table(path: Path, table: Any) -> None:
    """Write a table as one Parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        pq.write_table(table, partial, **PARQUET)


# Texts do not repeat, so a dictionary gains nothing; the least and greatest value, as statistics, would be whole texts.
PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["source"],
    "write_statistics": ["document"],
}


def read_table(path: Path) -> Any:
    """A Parquet file as a table, read on one core."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False)


def read_rows(path: Path, first: int, number: int = 1) -> Any:
    """The rows of a Parquet file with ``number`` document numbers from ``first`` on."""
    import pyarrow.parquet as pq

    rows = [("document", ">=", first), ("document", "<", first + number)]
    return pq.read_table(path, filters=rows, use_threads=False)


def read_groups(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The row groups of a Parquet file as tables, one at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns, use_threads=False)


def rows_of(table: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table as tuples of the values of some columns."""
    return zip(*(table[column].to_pylist() for column in columns), strict=True)


class PartWriter:
    """Writes the documents of a task as parts of about ``part_bytes`` bytes of text."""

    def __init__(self, folder: Path, task: int, part_bytes: int) -> None:
        self.parts: list[list[Any]] = []
        self._folder, self._task, self._part_bytes = folder, task, part_bytes
        self._documents: list[tuple[Document, int, str]] = []
        self._tables: list[Any] = []
        self._size = self._number = 0

    def add(self, document: Document, size: int, sha256: str) -> None:
        """Append a document."""
        self._documents.append((document, size, sha256))
        self._size += size
        self._number += 1
        if self._size >= self._part_bytes or self._number >= _PART_DOCUMENTS:
            self.flush()
        elif self._size // _ROW_GROUP_BYTES > len(self._tables):
            self._pack()

    def _pack(self) -> None:
        # In Arrow, text takes half to a quarter of the memory that it takes as Python strings.
        self._tables.append(table_of(self._documents))
        self._documents = []

    def flush(self) -> None:
        """Write the documents that were added since the last part."""
        import pyarrow as pa

        if self._number:
            self._pack()
            if len(self.parts) >= 1 << _PART_BITS:
                raise ValueError(f"A file has more than {1 << _PART_BITS:,} parts; raise read.part_bytes.")
            table, self._tables, self._size, self._number = pa.concat_tables(self._tables), [], 0, 0
            self.parts.append(write_part(self._folder, part_name(self._task, len(self.parts)), table))


def sum_counts(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The sum of counts by source and name, in an order that does not depend on theirs."""
    total: dict[str, Counter[str]] = {}
    for by_source in counts:
        for source, more in by_source.items():
            total.setdefault(source, Counter()).update(more)
    return {source: dict(sorted(total[source].items())) for source in sorted(total)}
