"""The tasks of a stage, run by processes of this machine, or by datatrove on Slurm or Ray.

A task writes whole files or none, and what it writes depends on its number alone, so that it does not matter where,
when or how often it runs.
"""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loguru import logger
from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn

from btlm.console import progress_bars
from btlm.files import write_json

from .stage import Run, key_digest

# datatrove's own messages stay off the terminal: progress, log and errors are told here.
logger.disable("datatrove")

# Imported once, by the process that the workers are forked from.
_PRELOAD = ["btlm.data.worker", "btlm.data.tasks", "pyarrow.compute", "pyarrow.parquet"]

# Called with the number of bytes that a task got through since the last call.
Advance = Callable[[int], None]
# Gets the number of the task; returns plain data.
Task = Callable[[int, Advance], Any]


def run_tasks(folder: Path, step: str, task: Task, sizes: Sequence[int], run: Run) -> list[Any]:
    """Run the tasks of one step of a stage that have not been completed.

    Args:
        folder: Of the stage.
        step: Name of the step, unique in the stage.
        task: Picklable.
        sizes: Bytes that each task has to get through, for the progress bar; as many as there are tasks.
        run: How to execute them.

    Returns:
        What the tasks returned, in their order.

    Raises:
        ValueError: A task found bad input, or did not end.
        OSError: A task could not read or write.
    """
    # Of another key, the same step is another one: what a job that was left behind writes is not taken for it.
    home = folder / "tasks" / f"{step}-{key_digest(folder)}"
    results = home / "results"
    if not sizes:
        return []
    started, done_before = time.monotonic(), _completed(home, len(sizes))
    if len(done_before) < len(sizes):
        for name in ("results", "failures", "progress"):
            (home / name).mkdir(parents=True, exist_ok=True)
        for stale in [*(home / "failures").iterdir(), *(home / "progress").iterdir()]:
            stale.unlink(missing_ok=True)
        whole_task, error = _Task(home, step, task), None
        try:
            with _progress(home, step, sizes, run):
                if run.execution.executor == "local":
                    _run_here(whole_task, home, len(sizes), run.workers)
                else:
                    executor = _executor(whole_task, home, len(sizes), step, run)
                    executor.run()
                    _wait_for_jobs(executor, home, len(sizes), run)
        except Exception as raised:  # whatever it was, what the task itself says comes first
            error = raised
        _raise_failure(home, step, len(sizes), error)
        todo = [size for rank, size in enumerate(sizes) if rank not in done_before]
        number = f"{len(todo):,} task{'s' if len(todo) > 1 else ''}"
        run.say(f"  {step}: {number}, {sum(todo) / 1e6:,.1f} MB in {time.monotonic() - started:,.1f} s")
    return [json.loads((results / f"{rank:05d}.json").read_text()) for rank in range(len(sizes))]


class _Task:
    """A task that keeps its result or failure. For datatrove, a pipeline of one step, whose logs show its name."""

    def __init__(self, home: Path, step: str, task: Task) -> None:
        self.home, self.step, self.task = home, step, task

    def __repr__(self) -> str:
        return self.step

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        import pyarrow as pa

        if self.home.name != f"{self.step}-{key_digest(self.home.parents[1])}":
            raise ValueError(
                f"{self.home.parents[1]} was started over with other settings; this job is of the old ones."
            )
        pa.set_cpu_count(1)
        progress = _ProgressFile(self.home / "progress" / f"{rank:05d}")
        progress.advance(0)
        try:
            result = self.task(rank, progress.advance)
            write_json(self.home / "results" / f"{rank:05d}.json", result)
        except Exception as error:
            # On a full disk even this may not be possible.
            with suppress(OSError):
                user = isinstance(error, ValueError | OSError)
                failure = {"user": user, "message": _message(error), "traceback": traceback.format_exc()}
                write_json(self.home / "failures" / f"{rank:05d}.json", failure)
            raise
        finally:
            progress.end()
            # A worker goes on to other tasks: what this one needed is given back.
            pa.default_memory_pool().release_unused()


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


class _ProgressFile:
    """How far a task is, and which process runs it; there while the task runs, and written at most twice per second."""

    def __init__(self, path: Path) -> None:
        self._path, self._done, self._written = path, 0, 0.0

    def advance(self, size: int) -> None:
        self._done += size
        if (now := time.monotonic()) - self._written > 0.5:
            self._written = now
            with suppress(OSError):
                self._path.write_text(str(self._done))

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def _completed(home: Path, tasks: int) -> set[int]:
    return {int(mark.name) for mark in (home / "completions").glob("*")} & set(range(tasks))


def _executor(task: _Task, home: Path, tasks: int, step: str, run: Run) -> Any:
    execution = run.execution
    common: dict[str, Any] = {"pipeline": [task], "tasks": tasks, "logging_dir": str(home)}
    if execution.executor == "ray":
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.ERROR)
        workers = min(tasks, execution.workers or int(ray.cluster_resources().get("CPU", 1)))
        return RayPipelineExecutor(**common, workers=workers, mem_per_cpu_gb=execution.memory_gb)
    from datatrove.executor.slurm import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        **common,
        time=execution.slurm_time,
        partition=execution.slurm_partition,
        mem_per_cpu_gb=int(-(-execution.memory_gb // 1)),
        workers=execution.workers or -1,
        job_name=f"btlm-{step}",
        qos="",
        # The programs of this environment, datatrove's own among them, are found first.
        env_command=execution.slurm_setup or f'export PATH="{Path(sys.executable).parent}:$PATH"',
    )


def _run_here(task: _Task, home: Path, tasks: int, workers: int) -> None:
    """Run what has not been completed in this process, or in several where there are more workers than one.

    Raises:
        ValueError: A worker was killed.
        Exception: What the first task that failed raised.
    """
    todo = sorted(set(range(tasks)) - _completed(home, tasks))
    workers = min(len(todo), workers)
    if workers == 1:
        for rank in todo:
            _run_and_mark(task, rank, tasks)
        return
    # Forking this process is not safe, as it has threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_leave_interrupts_to_the_command) as pool:
        futures = [pool.submit(_run_and_mark, task, rank, tasks) for rank in todo]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool:
            raise ValueError(
                "A worker was killed (out of memory?); the same command goes on where it stopped, and a single worker "
                "needs the least memory."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


def _run_and_mark(task: _Task, rank: int, tasks: int) -> None:
    """Run a task, and mark it as completed as datatrove's executors do."""
    task(None, rank, tasks)
    (task.home / "completions").mkdir(exist_ok=True)
    (task.home / "completions" / f"{rank:05d}").touch()


def _leave_interrupts_to_the_command() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait_for_jobs(executor: Any, home: Path, tasks: int, run: Run) -> None:
    """Slurm's executor only submits: wait until all tasks are complete, or none of the jobs is left."""
    gone = 0
    while run.execution.executor == "slurm" and len(_completed(home, tasks)) < tasks and gone < 3:
        time.sleep(2)
        queue = subprocess.run(["squeue", "--noheader", "--job", str(executor.job_id)], capture_output=True, text=True)
        # The controller may not answer for a while, and a file may be seen late on another machine.
        gone = gone + 1 if queue.returncode == 0 and not queue.stdout.strip() else 0


def _raise_failure(home: Path, step: str, tasks: int, error: Exception | None) -> None:
    if not (missing := tasks - len(_completed(home, tasks))):
        return
    for path in sorted((home / "failures").glob("*.json")):
        failure = json.loads(path.read_text())
        if failure["user"]:
            raise ValueError(failure["message"])
        raise RuntimeError(f"{step}, task {int(path.stem)}: {failure['message']}\n{failure['traceback']}")
    if error:
        raise error
    raise ValueError(
        f"{missing} of {tasks} tasks of {step} did not end, their workers were killed (out of memory?); "
        "the same command goes on where it stopped."
    )


@contextmanager
def _progress(home: Path, step: str, sizes: Sequence[int], run: Run) -> Iterator[None]:
    details = [
        TextColumn("{task.percentage:>3.0f}%"),
        *([DownloadColumn(), TransferSpeedColumn()] if sum(sizes) else []),
    ]
    ended = threading.Event()
    with progress_bars(*details, console=run.console) as progress:
        bar = progress.add_task(f"  {step}", total=sum(sizes) or len(sizes), completed=_done(home, sizes))

        def watch() -> None:
            while not ended.wait(0.5):
                progress.update(bar, completed=_done(home, sizes))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _done(home: Path, sizes: Sequence[int]) -> int:
    complete = _completed(home, len(sizes))
    done = sum(sizes[rank] for rank in complete) if sum(sizes) else len(complete)
    for path in (home / "progress").iterdir():  # of the tasks that run, or were killed
        with suppress(OSError, ValueError):
            rank, part = int(path.name), int(path.read_text())
            done += min(part, sizes[rank]) if rank not in complete else 0
    return done
