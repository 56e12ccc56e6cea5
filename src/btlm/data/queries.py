"""DuckDB for what concerns all documents at once: it sorts, joins and groups on disk in bounded memory."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .parts import whole_file


@contextmanager
def open_database(scratch: Path, memory_gb: float, threads: int = 1) -> Iterator[Any]:
    """A DuckDB connection that holds at most ``memory_gb`` and spills the rest to ``scratch``, removed afterwards."""
    import duckdb

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with duckdb.connect(scratch / "database") as database:
        database.execute("SET memory_limit = $limit", {"limit": f"{int(memory_gb * 1000)}MB"})
        database.execute("SET temp_directory = $folder", {"folder": str(scratch / "spilled")})
        database.execute("SET preserve_insertion_order = false")
        database.execute("SET enable_progress_bar = false")
        database.execute("SET threads = $threads", {"threads": threads})
        try:
            yield database
        except duckdb.IOException as error:
            raise OSError(str(error)) from error
        except duckdb.OutOfMemoryException as error:
            raise ValueError(f"A query needs more than {memory_gb} GB of memory; raise --memory-gb.") from error
    shutil.rmtree(scratch)


def write_query(database: Any, query: str, path: Path, **values: Any) -> None:
    """Write the result of a query as a Parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        database.execute(f"COPY ({query}) TO '{_quoted(partial)}' (FORMAT parquet, COMPRESSION zstd)", values or None)


def parquet(folder: Path, pattern: str = "*.parquet", columns: str = "*") -> str:
    """SQL of a table: the rows of all Parquet files of a folder."""
    return f"(SELECT {columns} FROM read_parquet('{_quoted(folder / pattern)}'))"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
