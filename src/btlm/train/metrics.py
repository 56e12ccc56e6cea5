"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, spikes of the loss, and the FLOP/s of the device for MFU."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btlm.files import write_text
from btlm.settings import plain

from .recipe import Recipe

METRICS = "metrics.jsonl"
SPIKE_WINDOW = 128

# A destination of records, such as TensorBoard or W&B: takes the number of a step and its values by name.
Sink = Callable[[int, dict[str, float]], object]


class SpikeMonitor:
    """Detects a loss that is far above those of the steps before it.

    Args:
        deviations: Threshold, in standard deviations above the mean of the last ``SPIKE_WINDOW`` losses.
        losses: Losses of earlier steps, in order.
    """

    def __init__(self, deviations: float, losses: list[float]) -> None:
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        for loss in losses:
            self.check(loss)

    def check(self, loss: float) -> float | None:
        """Number of standard deviations above the mean if the loss is a spike, else ``None``."""
        if len(self._losses) == SPIKE_WINDOW:
            mean, deviation = float(np.mean(self._losses)), float(np.std(self._losses))
            if deviation > 0 and loss - mean > self._deviations * deviation:
                # Record a spike at the threshold, so that one outlier hardly moves the statistics but a lasting rise
                # does.
                self._losses.append(mean + self._deviations * deviation)
                return (loss - mean) / deviation
        self._losses.append(loss)
        return None


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that was only partly written is left out."""
    path = output / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]


def truncate_metrics(output: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records of steps after the checkpoint, which will run again; returns the records that are kept."""
    records = [record for record in read_metrics(output) if record["step"] <= step]
    if (output / METRICS).exists():
        write_text(output / METRICS, "".join(f"{json.dumps(record)}\n" for record in records))
    return records


@contextmanager
def open_sinks(recipe: Recipe, output: Path, done: int) -> Iterator[list[Sink]]:
    """Open the destinations of records besides ``metrics.jsonl``; they are closed at the end.

    Args:
        recipe: Recipe whose ``watching`` names the destinations.
        output: Output folder of the run.
        done: Number of steps that are recorded already.

    Raises:
        ValueError: One is asked for that is not installed.
    """
    watching, sinks = recipe.watching, list[Sink]()
    with ExitStack() as stack:
        if watching.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ValueError(
                    "watching.tensorboard needs TensorBoard: pip install tensorboard, or set it to false."
                ) from error
            writer = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)
            stack.callback(writer.close)

            def add_scalars(step: int, values: dict[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

            sinks.append(add_scalars)
        if watching.wandb_project:
            try:
                import wandb
            except ModuleNotFoundError as error:
                raise ValueError("watching.wandb_project needs W&B: pip install wandb, or set it to null.") from error
            run = wandb.init(
                project=watching.wandb_project,
                # Runs into the same output folder are one run in W&B.
                id=hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16],
                name=output.name,
                dir=str(output),
                config=plain(recipe),
                resume="allow",
            )
            stack.callback(run.finish)
            sinks.append(lambda step, values: run.log(values, step=step))
        yield sinks


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name; the numbers of a group are named ``group/name``."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": item for name, item in value.items()}
        elif key != "step":
            flat[f"train/{key}"] = value
    return flat


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measured FLOP/s of a large matrix product on one GPU, with which the FLOP/s of training are compared.

    The best of 15 products of 8,192 x 8,192 matrices after one that warms up. No random numbers of the run are drawn.

    Returns:
        ``None`` on other devices: the rate of a CPU depends on what else it does, so that the MFU of the same run
        would be 1% one time and 90% the next.
    """
    if device.type != "cuda":
        return None
    size, times = 8192, []
    left = torch.linspace(-1.0, 1.0, size * size, device=device).to(dtype).view(size, size)
    right = left.flip(0).contiguous()
    for _ in range(16):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return float(2 * size**3 / min(times[1:]))
