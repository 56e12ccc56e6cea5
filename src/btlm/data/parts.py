"""Documents between the stages: Parquet files of bounded size, called parts."""

from collections.abc import Iterable, Iterator, Sequence
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


def first_document(task: int, part: int) -> int:
    """Number of the first document of a part; the others follow it."""
    return (task << _PART_BITS | part) << _ROW_BITS


def document_place(document: int) -> tuple[str, int]:
    """File name and row of the document with the given number."""
    task_and_part, row = divmod(document, 1 << _ROW_BITS)
    return part_name(*divmod(task_and_part, 1 << _PART_BITS)), row


def part_name(task: int, part: int) -> str:
    """File name of a part."""
    return f"{task:06d}-{part:04d}.parquet"


def part_number(name: str) -> tuple[int, int]:
    """Task and part of a file name."""
    task, _, part = Path(name).stem.partition("-")
    return int(task), int(part)


def table_of(documents: Sequence[tuple[Document, int, str]]) -> Any:
    """An Arrow table of documents, with their size in bytes of UTF-8 and the SHA-256 of these bytes in hexadecimal."""
    import pyarrow as pa

    texts, ids, sources = zip(*(document for document, _, _ in documents), strict=True) if documents else ((), (), ())
    columns = {
        "text": pa.array(texts, pa.large_string()),
        "id": pa.array(ids, pa.string()),
        "source": pa.array(sources, pa.string()),
        "bytes": pa.array([size for _, size, _ in documents], pa.int64()),
        "sha256": pa.array([digest for _, _, digest in documents], pa.string()),
    }
    return pa.table(columns)


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
    first = first_document(*part_number(name))
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


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """A Parquet file as a table, read on one core."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False)


def read_groups(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The row groups of a Parquet file as tables, one at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns, use_threads=False)


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


def add_counts(total: dict[str, dict[str, int]], more: Iterable[tuple[str, dict[str, int]]]) -> None:
    """Add the counts ``more`` to ``total``, by source and by name of the count."""
    for source, counts in more:
        entry = total.setdefault(source, {})
        for name, value in counts.items():
            entry[name] = entry.get(name, 0) + value
