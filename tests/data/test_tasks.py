import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from btlm.data.recipe import Execution
from btlm.data.stage import begin, finish, load_stage, open_run
from btlm.data.tasks import _Task, run_tasks


def count(folder: Path, task: int, advance) -> int:
    with (folder / f"ran-{task}").open("a") as file:
        file.write("x")
    advance(10)
    return task * task


def fail(folder: Path, error, task: int, advance) -> int:
    if task == 1 and (folder / "broken").exists():
        raise error
    return count(folder, task, advance)


def fail_but_the_first(folder: Path, task: int, advance) -> int:
    if task:
        raise ValueError("the earlier attempt")
    return count(folder, task, advance)


def die(folder: Path, task: int, advance) -> int:
    if task == 1 and (folder / "broken").exists():
        assert multiprocessing.parent_process() is not None, "a single task runs in the process of the test"
        os.kill(os.getpid(), signal.SIGKILL)
    return count(folder, task, advance)


class KilledOnTheWay(ValueError):
    """Kills the worker that hands it over."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_with_a_killed_worker(folder: Path, task: int, advance) -> int:
    return fail(folder, KilledOnTheWay("web.jsonl, line 3: bad"), task, advance)


@pytest.fixture(params=[1, 2])
def run(request, tmp_path):
    with open_run(tmp_path / "out", Execution(workers=request.param)) as run:
        yield run


def runs(folder):
    return [len(path.read_text()) for path in sorted(folder.glob("ran-*"))]


def test_results_come_in_the_order_of_the_tasks(tmp_path, run):
    assert run_tasks(tmp_path / "out/s", "step", partial(count, tmp_path), [10] * 5, run) == [0, 1, 4, 9, 16]
    assert "step: 5 tasks" in run.log.read_text()


def test_what_is_done_is_not_done_again(tmp_path, run):
    task = partial(count, tmp_path)
    for _ in range(2):
        assert run_tasks(tmp_path / "out/s", "step", task, [10] * 3, run) == [0, 1, 4]
    assert runs(tmp_path) == [1, 1, 1]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ValueError("web.jsonl, line 3: bad"), ValueError, "^web.jsonl, line 3: bad$"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.parquet"),
            ValueError,
            "^x.parquet: No space left on device$",
        ),
        (KeyError("bug"), RuntimeError, "(?s)step, task 1: 'bug'.*Traceback"),
    ],
)
def test_a_task_that_fails(tmp_path, run, error, raised, message):
    (tmp_path / "broken").touch()
    task = partial(fail, tmp_path, error)
    with pytest.raises(raised, match=message):
        run_tasks(tmp_path / "out/s", "step", task, [10] * 3, run)
    (tmp_path / "broken").unlink()
    assert run_tasks(tmp_path / "out/s", "step", task, [10] * 3, run) == [0, 1, 4]


def test_a_worker_that_is_killed(tmp_path):
    (tmp_path / "broken").touch()
    with open_run(tmp_path / "out", Execution(workers=2)) as run:
        with pytest.raises(ValueError, match=r"A worker was killed .* the same command goes on where it stopped"):
            run_tasks(tmp_path / "out/s", "step", partial(die, tmp_path), [10] * 4, run)
        (tmp_path / "broken").unlink()
        assert run_tasks(tmp_path / "out/s", "step", partial(die, tmp_path), [10] * 4, run) == [0, 1, 4, 9]


def test_a_failure_comes_before_a_worker_that_is_killed(tmp_path):
    (tmp_path / "broken").touch()
    task = partial(fail_with_a_killed_worker, tmp_path)
    with (
        open_run(tmp_path / "out", Execution(workers=2)) as run,
        pytest.raises(ValueError, match=r"^web.jsonl, line 3: bad$"),
    ):
        run_tasks(tmp_path / "out/s", "step", task, [10] * 4, run)


def test_a_failure_of_an_earlier_attempt_is_not_told_again(tmp_path):
    (tmp_path / "broken").touch()
    with open_run(tmp_path / "out", Execution(workers=2)) as run:
        with pytest.raises(ValueError, match="the earlier attempt"):  # leaves two tasks, which two workers run
            run_tasks(tmp_path / "out/s", "step", partial(fail_but_the_first, tmp_path), [10] * 3, run)
        with pytest.raises(ValueError, match="A worker was killed"):
            run_tasks(tmp_path / "out/s", "step", partial(die, tmp_path), [10] * 3, run)


INTERRUPTED = """
import sys, time
from pathlib import Path
from btlm.data.recipe import Execution
from btlm.data.stage import open_run
from btlm.data.tasks import run_tasks

def wait(task, advance):
    Path(sys.argv[1], f"waits-{task}").touch()
    time.sleep(600)

if __name__ == "__main__":
    with open_run(Path(sys.argv[1], "out"), Execution(workers=2)) as run:
        try:
            run_tasks(Path(sys.argv[1], "out/s"), "step", wait, [10] * 4, run)
        except KeyboardInterrupt:
            sys.exit(130)
"""


def test_ctrl_c_ends_all_workers_at_once_and_quietly(tmp_path):
    """A terminal sends it to every process of the command."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(tmp_path.glob("waits-*"))) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("waits-[23]"))


def test_output_that_another_command_works_in(tmp_path):
    refused = []

    def other():
        # The lock belongs to the process, so another process has to try it.
        pid = os.fork()
        if pid == 0:
            try:
                with open_run(tmp_path / "out", Execution()):
                    os._exit(0)
            except ValueError:
                os._exit(7)
        refused.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with open_run(tmp_path / "out", Execution()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused == [7]


def test_output_with_files_of_someone_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files that no data stage wrote"), open_run(tmp_path, Execution()):
        pass
    with pytest.raises(ValueError, match="is a file"), open_run(tmp_path / "thesis.tex", Execution()):
        pass


def test_a_stage_of_other_settings_is_refused_or_started_over(tmp_path):
    folder = tmp_path / "out/stage"
    with open_run(tmp_path / "out", Execution()) as run:
        assert not begin(folder, "clean", {"clean": {"size": 1, "kind": "a"}}, run)
        (folder / "documents").mkdir()
        (folder / "documents/x").touch()
        # The same settings continue.
        assert not begin(folder, "clean", {"clean": {"size": 1, "kind": "a"}}, run)
        finish(folder, {"parts": []})
        assert begin(folder, "clean", {"clean": {"size": 1, "kind": "a"}}, run)
        with pytest.raises(ValueError, match=r"other settings or input \(clean.size was 1, is 2\).*force"):
            begin(folder, "clean", {"clean": {"size": 2, "kind": "a"}}, run)
        assert (folder / "documents/x").exists()
    with open_run(tmp_path / "out", Execution(force=True)) as run:
        assert not begin(folder, "clean", {"clean": {"size": 2, "kind": "a"}}, run)
        assert not (folder / "documents").exists()
        with pytest.raises(ValueError, match="is not a complete stage"):
            load_stage(folder)


def test_killed_while_it_starts_over_a_stage_keeps_its_old_key(tmp_path, monkeypatch):
    folder = tmp_path / "out/stage"
    with open_run(tmp_path / "out", Execution(force=True)) as run:
        begin(folder, "clean", {"size": 1}, run)
        (folder / "documents").mkdir()
        finish(folder, {"parts": []})
        with monkeypatch.context() as patch:
            patch.setattr("btlm.data.stage.shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
            listed = Path.iterdir
            patch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), key=Path.is_file)))  # folders first
            with pytest.raises(KeyboardInterrupt):
                begin(folder, "clean", {"size": 2}, run)
        with pytest.raises(ValueError, match="is not a complete stage"):
            load_stage(folder)
    with open_run(tmp_path / "out", Execution()) as run, pytest.raises(ValueError, match="size was 1, is 2"):
        begin(folder, "clean", {"size": 2}, run)


def test_a_job_of_an_older_key_is_not_taken_for_one_of_the_new(tmp_path):
    folder = tmp_path / "out/stage"
    task = partial(count, tmp_path)
    with open_run(tmp_path / "out", Execution(force=True, workers=1)) as run:
        begin(folder, "clean", {"size": 1}, run)
        run_tasks(folder, "step", task, [10], run)
        left_behind = _Task(next((folder / "tasks").iterdir()), "step", task)
        begin(folder, "clean", {"size": 2}, run)
        with pytest.raises(ValueError, match="was started over with other settings"):
            left_behind(None, 0, 1)
        run_tasks(folder, "step", task, [10], run)
    assert runs(tmp_path) == [2]


def test_files_that_a_killed_task_left_are_removed(tmp_path):
    folder = tmp_path / "out/stage"
    (folder / "documents").mkdir(parents=True)
    (tmp_path / "out/log.txt").touch()
    (folder / "documents/.000000-0000.parquet.99-abc.partial").touch()
    with open_run(tmp_path / "out", Execution()) as run:
        begin(folder, "clean", {}, run)
    assert list((folder / "documents").iterdir()) == []


def test_the_history_tells_of_all_stages_and_of_no_place_or_time(tmp_path):
    with open_run(tmp_path / "out", Execution()) as run:
        begin(tmp_path / "out/a", "clean", {"clean": {"x": 1}, "input": "secret"}, run)
        finish(tmp_path / "out/a", {"sources": {"web": {"documents": 3}}})
        begin(tmp_path / "out/b", "mix", {"mix": {"y": 2}, "input": "secret"}, run)
        stage = finish(tmp_path / "out/b", {"sources": {"web": {"documents": 2}}}, tmp_path / "out/a")
    assert stage["history"] == {
        "clean": {"settings": {"clean": {"x": 1}}, "sources": {"web": {"documents": 3}}},
        "mix": {"settings": {"mix": {"y": 2}}, "sources": {"web": {"documents": 2}}},
    }
    assert stage["before"] == "../a"
    assert json.loads((tmp_path / "out/b/stage.json").read_text()) == stage


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"memory_gb": 0.1}, "memory_gb is 0.1"),
        ({"executor": "slurm"}, "name the partition of its jobs in slurm_partition"),
        ({"executor": "spark"}, "executor is 'spark', not one of local, slurm, ray"),
    ],
)
def test_execution_that_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Execution(**settings)
