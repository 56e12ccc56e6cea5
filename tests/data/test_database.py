import shutil

import duckdb
import pytest

from btlm.data.database import open_database
from btlm.errors import DoesNotFit


def test_a_query_works_in_its_own_folder_and_leaves_nothing(tmp_path):
    with open_database(tmp_path / "scratch", 0.5) as database, open_database(tmp_path / "scratch", 0.5) as other:
        database.execute("CREATE TABLE numbers AS SELECT * FROM range(10) t(n)")
        other.execute("CREATE TABLE numbers AS SELECT 3 AS n")
        assert database.execute("SELECT sum(n) FROM numbers").fetchone() == (45,)
        settings = dict(database.execute("SELECT name, value FROM duckdb_settings()").fetchall())
        assert (settings["threads"], settings["memory_limit"]) == ("1", "476.8 MiB")
        assert settings["temp_directory"].startswith(str(tmp_path / "scratch"))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "free", "error", "message"),
    [
        ("IOException", 0, DoesNotFit, "scratch cannot be written: No space left on device. Make room"),
        ("IOException", 10**9, OSError, "^words$"),
        ("OutOfMemoryException", 10**9, DoesNotFit, "more than 0.5 GB of memory, or more room on the disk of"),
    ],
)
def test_errors_of_a_query(tmp_path, monkeypatch, raised, free, error, message):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(error, match=message), open_database(tmp_path / "scratch", 0.5):
        raise getattr(duckdb, raised)("words")
