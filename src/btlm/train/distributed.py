"""The ranks that ``torchrun`` starts, and how they share one model: FSDP2, or hybrid with several replicas."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from btlm.devices import best_device, usable_device

from .recipe import Parallelism


@dataclass(frozen=True)
class Ranks:
    """This process and the others of the run. All ranks call the methods that exchange values together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in fp64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; any value that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group; the last call of a process."""
        if self.world_size > 1:
            dist.destroy_process_group()


def join_ranks(device: str = "auto") -> Ranks:
    """Join the other processes of ``torchrun``, or be the only one.

    Args:
        device: Torch device, or ``auto`` for a GPU if there is one; ``cuda`` becomes the GPU of the local rank.

    Raises:
        ValueError: Torch cannot use the device.
    """
    if device == "auto":
        device = best_device("cuda")  # Training has not been run on MPS.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and world_size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    chosen = usable_device(device)
    if world_size == 1:
        return Ranks(chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(chosen, dist.get_rank(), world_size)


def shard(model: nn.Module, blocks: nn.ModuleList, parallelism: Parallelism, ranks: Ranks) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, block by block; does nothing for one rank.

    Args:
        model: Whole model, with the same weights on every rank.
        blocks: Blocks of the model.
        parallelism: Number of replicas, and the dtype in which weights are gathered.
        ranks: All ranks of the run.

    Raises:
        ValueError: The number of replicas does not divide the number of ranks, or CPUs are to gather weights in bf16.
    """
    replicas = parallelism.replicate
    if ranks.world_size % replicas:
        raise ValueError(f"parallelism.replicate is {replicas}; give a divisor of the {ranks.world_size} ranks.")
    if parallelism.gather_dtype == "bfloat16" and ranks.device.type == "cpu" and ranks.world_size > 1:
        # Only on GPUs does autocast give LayerNorm fp32 weights.
        raise ValueError("parallelism.gather_dtype is bfloat16, which needs GPUs; set it to float32 for CPUs.")
    if ranks.world_size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (ranks.world_size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, ranks.world_size // replicas), ("replicate", "shard")  # type: ignore[assignment]
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    gathered = torch.bfloat16 if parallelism.gather_dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
