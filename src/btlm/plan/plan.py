"""What a recipe needs, from its numbers alone: steps, FLOPs, memory a device and days."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from btlm.console import plain_messages, plural, scaled, three_digits
from btlm.model import BTLMConfig
from btlm.model.architecture_btlm import GATE, is_target
from btlm.train.cost import flops_by_stage, num_adapter_parameters
from btlm.train.recipe import Recipe
from btlm.train.recipe_file import load_recipe

from .memory import adapted_matrices, memory_per_device
from .options import MFU, Hardware
from .speed import measure_speed

# More shards are worth a row while doubling them frees at least this part of the memory.
_WORTH_A_ROW = 0.05


def run_plan(
    recipe_path: Path | str,
    hardware: Hardware | None = None,
    changes: dict[str, Any] | None = None,
    device: str = "auto",
) -> None:
    """Print what :func:`plan` knows of a recipe to standard output.

    Args:
        recipe_path: YAML file.
        hardware: Devices to expect times for; by default this machine, whose speed is measured.
        changes: Values to set on top of the file, as for :func:`btlm.train.load_recipe`.
        device: Torch device of this machine to measure, or ``auto`` for a GPU if there is one.

    Raises:
        ValueError: The recipe, the numbers of devices or the device cannot be used.
    """
    hardware = hardware or Hardware()
    with plain_messages():
        recipe = load_recipe(recipe_path, changes)
        rate, counts, notes = _measured(recipe, hardware, device) if hardware.peak is None else _assumed(hardware)
        Console().print(render(Path(recipe_path).name, plan(recipe, rate, counts), notes))


def _measured(recipe: Recipe, hardware: Hardware, device: str) -> tuple[float, Sequence[int] | None, list[str]]:
    """FLOP/s of one device of this machine, numbers of devices, and lines that say so."""
    plan(recipe, 1.0, hardware.devices)  # raises its errors before anything is measured
    speed = measure_speed(recipe, device)
    here = [count for count in _device_counts(recipe) if count <= speed.devices]
    part = "the model" if speed.blocks == recipe.config.n_layer else plural(speed.blocks, "block")
    note = (
        f"measured on this machine ({speed.device}): {scaled(speed.flops_per_s)}FLOP/s per device in passes of {part} "
        f"on {plural(speed.tokens, 'token')}; not counted: the optimizer, exchange between devices, evaluation"
    )
    return speed.flops_per_s, hardware.devices or here or None, [note]


def _assumed(hardware: Hardware) -> tuple[float, Sequence[int] | None, list[str]]:
    """FLOP/s of one device of other hardware, numbers of devices, and the assumptions as lines."""
    assert hardware.peak is not None
    mfu = MFU if hardware.mfu is None else hardware.mfu
    notes = [f"assumptions: MFU {mfu:g} at any number of devices, and a peak of {hardware.peak:g} TFLOP/s each"]
    if hardware.hardware:
        notes.append(f"(dense bf16 products on an {hardware.hardware.upper()} SXM, NVIDIA's data sheet)")
    return hardware.peak * 1e12 * mfu, hardware.devices, notes


def plan(recipe: Recipe, flops_per_s: float, devices: Sequence[int] | None = None) -> dict[str, Any]:
    """What a run needs, as plain numbers; nothing is allocated, and of ``start.model`` only its configuration is read.

    FLOPs are those that training needs: recomputation by activation checkpointing is not among them, as in the
    definition of MFU (model FLOPs utilization; PaLM, arXiv 2204.02311, appendix B). With ``lora``, frozen matrices
    need no gradient: they take two thirds of their share.

    Args:
        recipe: The run.
        flops_per_s: FLOP/s of one device that go into those FLOPs.
        devices: Numbers of devices to expect days for; by default those that can share the batches, each at least
            twice the one before.

    Returns:
        - ``dtype``, ``replicas``, ``checkpointing``, ``compiled``: of the recipe.
        - ``parameters``: ``total`` and ``without_embeddings`` as :meth:`btlm.BTLMConfig.num_parameters` counts them,
          ``adapters`` (0 without LoRA), and ``trained``, those that get gradients.
        - ``stages``: for each its ``sequence_length``, ``batch_tokens``, ``steps``, ``tokens``, and its FLOPs
          ``flops_by_parameters`` and ``flops``, see below.
        - ``steps``, ``tokens``: of all stages, whole steps only.
        - ``flops_by_parameters``: 6 a parameter and token; 4 a frozen one.
        - ``flops``: of matrices, head and causal attention (:meth:`btlm.BTLMConfig.flops_per_token`).
        - ``micro_batch_tokens``: tokens of a forward pass of one device.
        - ``memory``: rows of :func:`btlm.plan.memory.memory_per_device` for 1, 2, 4, ... ``shards``, until more make
          little difference or a step has too few rows.
        - ``days``: rows of ``devices``, ``shards`` (devices that one copy of the state is cut over), ``micro_batches``
          (of each device in a step, the most of any stage), ``micro_batch_tokens`` (less than the recipe's where a
          device gets less), ``memory`` (bytes per device), and ``days``.

    Raises:
        ValueError: Devices or replicas cannot share the batches, or ``lora`` has other targets than matrices of the
            blocks.
    """
    config, replicas = recipe.config, recipe.parallelism.replicate
    _raise_problems(recipe, config, devices)
    total, adapters = config.num_parameters(), num_adapter_parameters(recipe, config)
    by_parameters = 6 * total if recipe.lora is None else 4 * total + 6 * adapters
    stages = []
    for stage, stage_flops in zip(recipe.stages, flops_by_stage(recipe, config), strict=True):
        tokens = stage.steps * stage.batch_tokens
        stages.append(
            {
                "sequence_length": stage.sequence_length,
                "batch_tokens": stage.batch_tokens,
                "steps": stage.steps,
                "tokens": tokens,
                "flops_by_parameters": float(by_parameters * tokens),
                "flops": stage_flops,
            }
        )
    flops = sum(stage["flops"] for stage in stages)
    memory = [memory_per_device(recipe, 1, config)]
    while (shards := 2 * memory[-1]["shards"]) * replicas <= _rows(recipe):
        row = memory_per_device(recipe, shards, config)
        if row["total"] > (1 - _WORTH_A_ROW) * memory[-1]["total"]:
            break
        memory.append(row)
    days = []
    for count in devices if devices is not None else _device_counts(recipe):
        most = max(stage.batch_tokens // count for stage in recipe.stages)
        at_once = min(most, recipe.micro_batch_tokens)
        row = memory_per_device(recipe, count // replicas, config, at_once)
        days.append(
            {
                "devices": count,
                "shards": count // replicas,
                "micro_batches": math.ceil(most / at_once),
                "micro_batch_tokens": at_once,
                "memory": row["total"],
                "days": flops / (count * flops_per_s * 86_400),
            }
        )
    return {
        "dtype": recipe.precision.dtype,
        "replicas": replicas,
        "checkpointing": recipe.precision.activation_checkpointing,
        "compiled": recipe.precision.compile,
        "parameters": {
            "total": total,
            "without_embeddings": config.num_parameters(embeddings=False),
            "adapters": adapters,
            "trained": total if recipe.lora is None else adapters,
        },
        "stages": stages,
        "steps": recipe.total_steps,
        "tokens": recipe.total_tokens,
        "flops_by_parameters": sum(stage["flops_by_parameters"] for stage in stages),
        "flops": flops,
        "micro_batch_tokens": recipe.micro_batch_tokens,
        "memory": memory,
        "days": days,
    }


# Devices


def _raise_problems(recipe: Recipe, config: BTLMConfig, devices: Sequence[int] | None) -> None:
    if recipe.lora is not None:
        # A name that only other activations have is none too many: PEFT passes over it.
        names = [*config.architecture.matrices, GATE]
        targets = recipe.lora.target_modules
        known = all(any(is_target(target, name) for name in names) for target in targets)
        if not known or not adapted_matrices(recipe, config):
            counted = ", ".join(dict.fromkeys(names))
            raise ValueError(f"lora.target_modules are {', '.join(targets)}; a plan counts adapters of {counted}.")
    rows, replicas = _rows(recipe), recipe.parallelism.replicate
    if rows % replicas:
        raise ValueError(
            f"parallelism.replicate is {replicas}, but the steps have {rows} rows to share; give a divisor of that."
        )
    fitting = [count for count in range(replicas, rows + 1, replicas) if rows % count == 0]
    for count in devices or ():
        if count not in fitting:
            raise ValueError(
                f"devices has {count!r}, which cannot share the batches of the recipe evenly; give some of "
                f"{', '.join(map(str, fitting))}."
            )


def _rows(recipe: Recipe) -> int:
    """The most devices that can share every batch, a row each; others have to divide it."""
    return math.gcd(*(stage.batch_tokens // stage.sequence_length for stage in recipe.stages))


def _device_counts(recipe: Recipe) -> list[int]:
    """Numbers of devices that can share the batches, each at least twice the one before."""
    rows, replicas = _rows(recipe), recipe.parallelism.replicate
    counts: list[int] = []
    for count in range(replicas, rows + 1, replicas):
        if rows % count == 0 and (not counts or count >= 2 * counts[-1]):
            counts.append(count)
    return counts


# Rendering


def render(name: str, numbers: dict[str, Any], notes: Sequence[str] = ()) -> Group:
    """Tables of what :func:`plan` returns that fit 80 columns, with lines that say where the speed is from."""
    parameters = numbers["parameters"]
    counts = f"  {parameters['total']:,} parameters, {parameters['without_embeddings']:,} without embeddings"
    if parameters["adapters"]:
        counts += f"\n  {parameters['adapters']:,} more in adapters, the only ones that are trained"
    return Group(
        Text(name, "bold cyan"),
        counts,
        _stages(numbers),
        _memory(numbers),
        _days(numbers, notes),
    )


def _stages(numbers: dict[str, Any]) -> Padding:
    table = _table("stages", ("tokens per row", 14), ("per step", 10), ("steps", 9), ("tokens", 8), ("FLOPs", 9))
    for index, stage in enumerate(numbers["stages"], start=1):
        table.add_row(
            str(index),
            f"{stage['sequence_length']:,}",
            f"{stage['batch_tokens']:,}",
            f"{stage['steps']:,}",
            _tokens(stage["tokens"]),
            f"{stage['flops']:#.3g}",
        )
    if len(numbers["stages"]) > 1:
        table.add_row("all", "", "", f"{numbers['steps']:,}", _tokens(numbers["tokens"]), f"{numbers['flops']:#.3g}")
    by_parameters = "6 x parameters x tokens"
    if numbers["parameters"]["adapters"]:
        by_parameters = "(4 x frozen + 6 x trained parameters) x tokens"
    note = f"FLOPs include causal attention; {by_parameters} is {numbers['flops_by_parameters']:#.3g}"
    return _section(table, note)


def _memory(numbers: dict[str, Any]) -> Padding:
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "head", "total")
    table = _table("memory", *((part, max(len(part), 7)) for part in parts))
    for row in numbers["memory"]:
        shards = row["shards"]
        sizes = (f"{scaled(row[part])}B" if row[part] else "-" for part in parts)
        table.add_row(f"{shards:,} shard{'s' if shards > 1 else ''}", *sizes)
    moments: dict[str, list[str]] = {}
    for row in numbers["memory"]:
        moments.setdefault(row["moment"], []).append(str(row["shards"]))
    fullest = "; ".join(f"{moment} ({', '.join(shards)})" for moment, shards in moments.items())
    tokens = plural(numbers["micro_batch_tokens"], "token")
    notes = [
        f"estimate for one device, {tokens} per micro-batch, at the fullest moment of a step, by shards: {fullest}",
        "gathered: weights in use, gathered or cast, and gradients not yet reduced",
        *(["activations: block inputs are kept, the rest is recomputed"] if numbers["checkpointing"] else []),
        "not counted: CUDA context, NCCL, fragmentation" + (", savings by compilation" if numbers["compiled"] else ""),
    ]
    return _section(table, *notes)


def _days(numbers: dict[str, Any], basis: Sequence[str]) -> Padding:
    table = _table("devices", ("shards", 6), ("micro-batches", 15), ("memory", 9), ("time", 13))
    for row in numbers["days"]:
        table.add_row(
            f"{row['devices']:,}",
            f"{row['shards']:,}",
            f"{row['micro_batches']:,} x {row['micro_batch_tokens']:,}",
            f"{scaled(row['memory'])}B",
            _duration(row["days"]),
        )
    notes = [*basis, "micro-batches (number x tokens) in a step, and memory, are those of one device"]
    if numbers["replicas"] > 1:
        notes.append(f"{numbers['replicas']} replicas: devices are that many times the shards")
    return _section(table, *notes)


def _table(title: str, *columns: tuple[str, int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column(Text(title, "bold"), width=12)
    for name, width in columns:
        table.add_column(name, justify="right", min_width=width, no_wrap=True)
    return table


def _section(table: Table, *notes: str) -> Padding:
    parts: list[RenderableType] = [table, *(Text(note, "dim") for note in notes)]
    return Padding(Group(*parts), (1, 0, 0, 2), expand=False)


def _tokens(value: float) -> str:
    return scaled(value).replace("G", "B").strip()


def _duration(days: float) -> str:
    for unit, size in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * size >= 1:
            return f"{three_digits(days * size)} {unit}"
    return f"{three_digits(days * 86_400)} seconds"
