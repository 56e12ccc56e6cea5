"""Runs the trials of a search, one after another or in several processes, and reports them as a stream of events.

Only a pipe connects a process that runs trials to the main process. When the main process ends, for whatever reason,
the pipe breaks, and the other processes end at their next step.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btlm.data.shards import TokenShards
from btlm.devices import best_device
from btlm.errors import NotFinite
from btlm.train.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """Settings that all trials share: folder of the shards, bytes of text per token id, and torch device."""

    data: Path
    token_bytes: NDArray[np.int64]
    device: str


class Job(NamedTuple):
    """A trial to run: its number, its recipe, and the folder that it trains in."""

    number: int
    recipe: Recipe
    folder: Path


class Event(NamedTuple):
    """An event in a trial, and the trial's number.

    ``step``: the value is the number of finished steps. ``loss``: the trial has ended, and the value is its held-out
        loss in bits per byte. ``diverged``, ``stopped`` and ``error``: it has ended without a loss, and the value says
        why.
    """

    number: int
    kind: Literal["step", "loss", "diverged", "stopped", "error"]
    value: Any


def run_jobs(jobs: Iterator[Job], setting: Setting, workers: int) -> Iterator[Event]:
    """Run jobs, ``workers`` at a time; each is taken from ``jobs`` when a worker is free.

    A single worker is this process. Several workers are separate processes, which share the cores of the machine, and
    take its GPUs in turn if the device is ``cuda``.

    Raises:
        ChildProcessError: A worker was killed.
    """
    if workers == 1:
        for job in jobs:
            yield from run_job(job, setting)
    else:
        yield from _run_in_processes(jobs, setting, workers)


def run_job(job: Job, setting: Setting) -> Iterator[Event]:
    """Train, or continue from the checkpoints in the job's folder; the last event is not a step."""
    from btlm.train.loop import train

    try:
        shards = TokenShards(setting.data, verify=False)
        for record in train(job.recipe, shards, job.folder, setting.token_bytes, setting.device):
            yield Event(job.number, "step", record["step"])
    except NotFinite as error:
        yield Event(job.number, "diverged", str(error))
        return
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        yield Event(job.number, "error", f"{type(error).__name__}: {error}")
        return
    # Read from the file, since a run that an earlier call completed yields no records.
    last = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])
    if last["step"] < job.recipe.total_steps:
        yield Event(job.number, "stopped", f"after step {last['step']}")
    elif not math.isfinite(loss := last["bits_per_byte"]["mean"]):
        yield Event(job.number, "diverged", f"Step {last['step']}: held-out loss {loss}.")
    else:
        yield Event(job.number, "loss", loss)


def _run_in_processes(jobs: Iterator[Job], setting: Setting, workers: int) -> Iterator[Event]:
    context = multiprocessing.get_context("spawn")  # Threads and CUDA do not survive a fork.
    threads = max(1, (os.cpu_count() or 1) // workers)
    processes: dict[Connection, SpawnProcess] = {}
    busy: dict[Connection, int] = {}
    try:
        for job in jobs:
            if len(processes) < workers:
                ours, theirs = context.Pipe()
                device = _device(setting.device, len(processes))
                arguments = (theirs, Setting(setting.data, setting.token_bytes, device), threads)
                processes[ours] = context.Process(target=_serve, args=arguments, daemon=True)
                processes[ours].start()
                theirs.close()
            else:
                ours = yield from _next_free(busy)
            ours.send(job)
            busy[ours] = job.number
        while busy:
            yield from _next_free(busy)
    finally:
        for connection in processes:
            connection.close()
        for process in processes.values():
            process.join(60)  # It ends after its step.
            process.kill()


def _next_free(busy: dict[Connection, int]) -> Generator[Event, None, Connection]:
    """Pass events on until one ends a trial; returns the connection of its worker, which is no longer busy."""
    while True:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            try:
                event = connection.recv()
            except EOFError:
                raise ChildProcessError(
                    f"The process of trial {busy[connection]} was killed, perhaps for lack of memory; the same command "
                    "continues, with fewer workers if need be."
                ) from None
            if event.kind != "step":
                del busy[connection]
                yield event
                return connection
            yield event


def _serve(connection: Connection, setting: Setting, threads: int) -> None:
    """Main loop of a worker process: receives jobs and sends events until the pipe breaks."""
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            for event in run_job(connection.recv(), setting):
                connection.send(event)


def _device(device: str, worker: int) -> str:
    if device == "auto":
        device = best_device("cuda")
    return f"cuda:{worker % torch.cuda.device_count()}" if device == "cuda" else device
