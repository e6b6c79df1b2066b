"""Who shares the data: the data-parallel ranks, which under tensor parallelism are fewer than the processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor


class Ranks(NamedTuple):
    """This process among those that see different data.

    rank and size cut the data and scale the loss. speaks: one process of each tensor-parallel group does, so that
    what the group holds in common is counted once. group: of the data-parallel processes; None means all.
    """

    rank: int = 0
    size: int = 1
    speaks: bool = True
    group: torch.distributed.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Summed over the data-parallel ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values, group=self.group)
        return values


def data_parallel(fabric: Fabric) -> Ranks:
    """Of a launched Fabric."""
    mesh = getattr(fabric.strategy, "_device_mesh", None)
    if mesh is None:
        return Ranks(fabric.global_rank, fabric.world_size)
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    return Ranks(data.get_local_rank(), data.size(), tensor.get_local_rank() == 0, data.get_group())
