"""DuckDB for work on all documents at once: it sorts, joins and groups on disk in bounded memory."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from btlm.errors import DoesNotFit
from btlm.files import naming_full_disk, whole_file

# Free bytes below which a disk is full: DuckDB's errors tell of a full disk only in words.
_FULL = 2**20


@contextmanager
def open_database(folder: Path, memory_gb: float) -> Iterator[Any]:
    """A DuckDB connection on one core, with at most ``memory_gb`` of memory; the rest is spilled into ``folder``."""
    import duckdb

    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "memory_limit": f"{int(memory_gb * 1000)}MB",
        "threads": 1,
        "preserve_insertion_order": False,
    }
    # Each attempt has its own folder: the same task of a killed command may still be running elsewhere.
    with naming_full_disk(folder), TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        options["temp_directory"] = f"{name}/spilled"
        try:
            with duckdb.connect(f"{name}/database", config=options) as database:
                yield database
        except duckdb.IOException as error:
            if shutil.disk_usage(folder).free < _FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise OSError(str(error)) from error
        except duckdb.OutOfMemoryException as error:
            # DuckDB raises this also when what it spills does not fit the disk.
            raise DoesNotFit(
                f"A query needs more than {memory_gb} GB of memory, or more room on the disk of {folder}. Raise "
                "memory_gb or make room, and run the same command again."
            ) from error


def write_query(database: Any, query: str, path: Path) -> None:
    """Write the result of a query as a Parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        database.execute(f"COPY ({query}) TO '{_quoted(partial)}' (FORMAT parquet, COMPRESSION zstd)")


def parquet(files: Iterable[Path], columns: str = "*") -> str:
    """SQL for a table that holds the rows of Parquet files."""
    listed = ", ".join(f"'{_quoted(file)}'" for file in files)
    return f"(SELECT {columns} FROM read_parquet([{listed}], hive_partitioning = false))"


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
