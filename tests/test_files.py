import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from btlm.errors import DoesNotFit
from btlm.files import (
    file_sha256,
    is_empty,
    locked,
    remove_folder,
    remove_partial_files,
    replace_folder,
    require_space,
    sync,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Files


def test_a_file_has_its_name_when_it_is_whole(tmp_path):
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("all of it")
        assert partial.parent == tmp_path
        assert not (tmp_path / "a.txt").exists()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "all of it"


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with suppress(RuntimeError), whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    with whole_file(tmp_path / "a.txt") as slower:
        slower.write_text("slower")
        write_text(tmp_path / "a.txt", "faster")
        assert (tmp_path / "a.txt").read_text() == "faster"
    assert (tmp_path / "a.txt").read_text() == "slower"
    assert names(tmp_path) == ["a.txt"]


def test_a_power_cut_leaves_no_file_or_folder_that_only_counts_as_whole(tmp_path, power_cut):
    """Without the syncs, and in this order, a file may have its name before it has its content."""
    write_text(tmp_path / "a.txt", "all of it")
    write_json(tmp_path / "deep/a.json", {})
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "deep").mkdir()
        (partial / "deep/file").write_text("a")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial/file").write_text("b")
    replace_folder(tmp_path / "b.partial", tmp_path / "folder")
    assert [path.name for path in power_cut.renamed] == ["a.txt", "a.json", "folder", "folder"]
    assert power_cut.lost == []


def test_what_a_power_cut_would_take_is_found(tmp_path, power_cut):
    (tmp_path / "a.partial").write_text("never synced")
    (tmp_path / "a.partial").replace(tmp_path / "a")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial/file").write_text("synced, ")
    for path in (tmp_path / "b.partial/file", tmp_path / "b.partial"):
        sync(path)
    with (tmp_path / "b.partial/file").open("a") as file:
        file.write("then written")
    (tmp_path / "b.partial").rename(tmp_path / "b")
    assert power_cut.lost == [
        f"{tmp_path}/a would be empty",
        f"{tmp_path}/b/file would be empty",
        f"{tmp_path}/a would not be there",
        f"{tmp_path}/b would not be there",
    ]
    sync(tmp_path)
    assert len(power_cut.lost) == 2


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.txt", "Ä")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\x84"


def test_json_makes_its_folder(tmp_path):
    write_json(tmp_path / "deep/a.json", {"b": [1]})
    assert json.loads((tmp_path / "deep/a.json").read_text()) == {"b": [1]}
    assert (tmp_path / "deep/a.json").read_text().endswith("}\n")


def test_partial_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "deep").mkdir()
    program = "import sys, pathlib, os, btlm.files as f\nwith f.whole_file(pathlib.Path(sys.argv[1])) as partial:\n"
    program += "    partial.touch()\n    os._exit(1)"
    subprocess.run([sys.executable, "-c", program, tmp_path / "deep/a.txt"], check=False)
    (tmp_path / "deep/b.txt").touch()
    assert len(names(tmp_path / "deep")) == 2
    remove_partial_files(tmp_path)
    assert names(tmp_path / "deep") == ["b.txt"]


# Folders


def test_a_folder_has_its_name_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "deep/a") as partial:
        (partial / "file").touch()
        assert not (tmp_path / "deep/a").exists()
    assert names(tmp_path / "deep") == ["a"]
    assert names(tmp_path / "deep/a") == ["file"]


def test_an_error_leaves_no_folder(tmp_path):
    with suppress(KeyboardInterrupt), whole_folder(tmp_path / "a") as partial:
        (partial / "file").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="elsewhere it is not known which processes live")
def test_folders_of_killed_processes_are_removed_and_those_of_others_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner in (dead.pid, os.getppid(), "x"):
        (tmp_path / f".a[1].{owner}.partial").mkdir()
    with whole_folder(tmp_path / "a[1]"):
        pass
    assert names(tmp_path) == sorted([f".a[1].{os.getppid()}.partial", ".a[1].x.partial", "a[1]"])


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("a", "a.partial", "a.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "a.partial", tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["a.partial"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_in_a_folder_may_be_read_by_whom_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "a") as partial:
            for name, own in (("weights", 0o600), ("script", 0o700)):
                (partial / name).touch()
                (partial / name).chmod(own)
    finally:
        assert os.umask(before) == umask, "it stays as it was"
    assert (tmp_path / "a/weights").stat().st_mode & 0o777 == mode
    assert (tmp_path / "a/script").stat().st_mode & 0o777 == mode | 0o700


def test_a_folder_is_removed_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((path.name, path.exists())))
    remove_folder(tmp_path / "a")
    assert seen == [("a.old.partial", False), ("a.old.partial", True)]
    remove_folder(tmp_path / "absent")


# Disk, locks and digests


def test_room_is_looked_for_on_the_disk_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6 if path == tmp_path else 0))
    require_space(tmp_path / "not/there/yet", 10**6, "give up")
    with pytest.raises(
        DoesNotFit, match=rf"yet takes 1\.5 MB, and {tmp_path} has 1\.0 MB free; make room there, or give"
    ):
        require_space(tmp_path / "not/there/yet", 1_500_000, "give up")


LOCKER = """
import os, sys, pathlib, btlm.files
with btlm.files.locked(pathlib.Path(sys.argv[1])):
    if len(sys.argv) > 2:
        os._exit(1)
"""
ME = f"process {os.getpid()} on {socket.gethostname()}"


def another_process_locks(path, *killed):
    command = [sys.executable, "-c", LOCKER, path, *killed]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("name", ["folder", "file", "not/there/yet"])
def test_a_lock_keeps_others_from_an_output(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    before = names(path.parent) if path.parent.exists() else []
    problem = f"{path} is being written by {ME}; wait until it ends, or give another output."
    with locked(path):
        assert another_process_locks(path).endswith(f"ValueError: {problem}\n")
        assert another_process_locks(path).endswith(f"ValueError: {problem}\n"), "a second one is refused, too"
        with pytest.raises(ValueError, match=re.escape(problem)), locked(path):
            pass
        assert another_process_locks(path).endswith(f"ValueError: {problem}\n"), "the lock is still there"
    assert another_process_locks(path) == ""
    assert names(path.parent) == before, "nothing is left"


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    another_process_locks(tmp_path, "killed")
    assert names(tmp_path) == [".lock"]
    assert is_empty(tmp_path)
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == ME
        assert ME in another_process_locks(tmp_path)
    assert names(tmp_path) == []


def test_a_lock_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder may end and another may lock a new file of that name."""
    lock = tmp_path / ".lock"
    calls: list[object] = []
    original = fcntl.flock

    def flock(*arguments):
        if not calls:
            lock.unlink()
            lock.touch()
        calls.append(arguments)
        original(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(calls) == 2
        assert lock.read_text() == ME


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ("", True),
        ("process {dead} on {host}", True),
        ("process {dead} on another-host", False),
        ("process {alive} on {host}", False),
    ],
)
def test_where_there_are_no_locks_the_named_process_decides(tmp_path, monkeypatch, holder, free):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    holder = holder.format(dead=dead.pid, alive=os.getppid(), host=socket.gethostname())
    (tmp_path / ".lock").write_text(holder)
    if free:
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == ME
    else:
        with pytest.raises(ValueError, match=f"by {holder}; .* If it has ended, remove .*/.lock"), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == holder


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
