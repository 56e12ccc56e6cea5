"""The speed of training on this machine, measured with a part of the model."""

import time
from dataclasses import fields, replace
from typing import NamedTuple

import torch

from btlm.model.architecture_btlm import Architecture
from btlm.train.cost import flops_per_token
from btlm.train.distributed import join_ranks
from btlm.train.model import prepare_model
from btlm.train.recipe import Recipe
from btlm.train.step import LossModel

# FLOPs of a pass on a CPU: a second or two on two cores.
_CPU_FLOPS = 5e11
_REPEATS = 3


class Speed(NamedTuple):
    """The measured speed of one device of this machine.

    Args:
        flops_per_s: FLOP/s of forward and backward passes, counted as for the plan.
        device: Name of the device.
        devices: Number of such devices here.
        blocks: Number of blocks of the measured model.
        tokens: Tokens of a pass.
    """

    flops_per_s: float
    device: str
    devices: int
    blocks: int
    tokens: int


def measure_speed(recipe: Recipe, device: str = "auto") -> Speed:
    """Measure forward and backward passes of a recipe's model: of all its blocks, or of as many as seconds allow.

    The fastest of some passes after one that warms up; on a CPU by processor time, since the machine may do other work.
    Neither the optimizer nor the exchange between devices is measured, and nothing is compiled.

    Args:
        recipe: The run. Weights are random, also with ``start``.
        device: Torch device, or ``auto`` for a GPU if there is one.

    Raises:
        ValueError: Torch cannot use the device.
    """
    chosen = join_ranks(device).device
    on_gpu = chosen.type == "cuda"
    part, length = _part(recipe, on_gpu)
    network = prepare_model(part).network
    model = LossModel(network, getattr(torch, recipe.precision.dtype)).to(chosen).train()
    rows = max(1, recipe.micro_batch_tokens // length) if on_gpu else 1
    input_ids = torch.randint(network.config.vocab_size, (rows, length), device=chosen)
    times = []
    for _ in range(1 + _REPEATS):
        started = _clock(chosen)
        model(input_ids).backward()
        times.append(_clock(chosen) - started)
    flops = flops_per_token(part, network.config, length) * input_ids.numel()
    return Speed(
        flops / min(times[1:]),
        torch.cuda.get_device_name(chosen) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        torch.cuda.device_count() if on_gpu else 1,
        network.config.n_layer,
        input_ids.numel(),
    )


def _part(recipe: Recipe, on_gpu: bool) -> tuple[Recipe, int]:
    """A recipe with fewer blocks and random weights, and the length of its rows, whose passes take seconds."""
    config = recipe.config
    keys = {item.name for item in fields(Architecture)} - {"quantization"}
    values = {key: value for key, value in config.to_dict().items() if key in keys}

    def with_blocks(blocks: int) -> Recipe:
        precision = replace(recipe.precision, compile=False)
        return replace(recipe, model=values | {"n_layer": blocks}, start=None, mup_base_width=None, precision=precision)

    length = recipe.stages[0].sequence_length
    if on_gpu:
        return with_blocks(min(4, config.n_layer)), length
    for blocks in range(config.n_layer, 0, -1):
        part = with_blocks(blocks)
        if (per_token := flops_per_token(part, part.config, length)) * length <= _CPU_FLOPS:
            break
    return part, max(2, min(length, int(_CPU_FLOPS / per_token)))


def _clock(device: torch.device) -> float:
    """Seconds that the device has worked: on a CPU the processor time of this process, divided by its threads."""
    if device.type != "cuda":
        return time.process_time() / torch.get_num_threads()
    torch.cuda.synchronize(device)
    return time.perf_counter()
