"""The processes of a run: one, or those that torchrun started. With several, FSDP2 shards parameters, gradients and optimizer.

`torchrun --nproc-per-node 8 -m gdn.cli train ...` needs no other option. Parameters stay float32 in every shard and autocast does the
casting, as on one device: an FSDP policy with `param_dtype=bfloat16` would cast A_log and dt_bias too, which the decay gate forbids.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from gdn.core.device import named_device
from gdn.models.lm import LM


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def reduce(self, numbers: Sequence[float], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
        """The same float64 numbers on every process: summed, or another operation. One process gets its own back."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[World]:
    """The world of this process, joined for the block. `device` is "auto", "cpu", "cuda" or "cuda:1"."""
    kind = named_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield World(device=kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    # gloo beside nccl: the numbers that processes agree on each step live on the host.
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo")
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=kind)
    finally:
        if ours:
            dist.destroy_process_group()


def shard(model: LM, world: World) -> None:
    """Shard a model over the world in place: each block by itself, then the rest. Nothing to do for one process.

    Where layers know each other all of it is one part: a block alone would find nothing but shards in another.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    flagged = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in () if model.joined else model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name, parameter in model.named_parameters():
        if name in flagged:  # the shard is another object
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
