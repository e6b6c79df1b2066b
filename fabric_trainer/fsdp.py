"""Weights in shards: FSDP2, tensor parallelism, and both, through Fabric's ModelParallelStrategy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from fabric_trainer.config import Config, FsdpConfig
from fabric_trainer.errors import InputError

if TYPE_CHECKING:
    from fabric_trainer.launch import Resolved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over the data-parallel ranks, layers split over the tensor-parallel ones. ``blocks`` are set by whoever
    knows the network, before it is set up."""

    def __init__(self, config: Config, resolved: Resolved) -> None:
        tensor = resolved.tensor_parallel_size
        super().__init__(
            parallelize_fn=lambda network, mesh: network,  # setup_module below does it
            data_parallel_size=resolved.world_size // tensor,
            tensor_parallel_size=tensor,
            timeout=timedelta(minutes=config.fabric.timeout),
        )
        self.fsdp = config.fabric.fsdp
        self.policy = mixed_precision(self.fsdp, resolved.precision)
        self.blocks: list[nn.Module] = []
        self._backward_sync_control = NoReduceScatter()

    def setup_module(self, module: nn.Module) -> nn.Module:
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            split_layers(module, mesh["tensor_parallel"])
        if mesh["data_parallel"].size() > 1 or mesh["tensor_parallel"].size() == 1:
            for unit in (*self.blocks, module):
                materialise(unit, self.root_device)
                self._shard(unit, mesh["data_parallel"], root=unit is module)
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):  # not split: whole on every rank
                tensor.data = tensor.data.to(self.root_device)
        return module

    def _shard(self, unit: nn.Module, mesh: DeviceMesh, root: bool) -> None:
        fully_shard(
            unit,
            mesh=mesh,
            # the root's own parameters are needed again first thing in the backward
            reshard_after_forward=self.fsdp.sharding == "FULL_SHARD" and not root,
            # blocks hand on what they computed in; what leaves the network is float32
            mp_policy=self.policy if root else replace(self.policy, output_dtype=None),
            offload_policy=CPUOffloadPolicy() if self.fsdp.cpu_offload else OffloadPolicy(),
        )


def make_strategy(config: Config, resolved: Resolved) -> ShardedStrategy:
    """For ``fsdp`` and ``tensor_parallel``."""
    return ShardedStrategy(config, resolved)


def mixed_precision(config: FsdpConfig, precision: str) -> MixedPrecisionPolicy:
    """bf16-mixed gathers and computes in bf16 and reduces gradients in float32; the shards stay float32."""
    mixed = precision == "bf16-mixed"
    compute = config.param_dtype or ("bf16" if mixed else None)
    reduce = config.reduce_dtype or ("fp32" if mixed else None)
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[compute] if compute else None,
        reduce_dtype=DTYPES[reduce] if reduce else None,
        output_dtype=torch.float32 if compute else None,
    )


def split_layers(network: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism by the network's own plan. Raises InputError where it has none."""
    plan = getattr(network, "tensor_parallel_plan", None)
    if plan is None:
        raise InputError(
            f"fabric.tensor_parallel_size: {type(network).__name__} has no tensor_parallel_plan(), which returns "
            "{module name: ColwiseParallel() or RowwiseParallel()}"
        )
    parallelize_module(network, mesh, plan())


class NoReduceScatter(_BackwardSyncControl):
    """Gradients are kept whole between micro-batches and scattered with the last.

    Fabric's own leaves the exchange switched off after ``no_backward_sync(enabled=False)``.
    """

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return _unsynced(module, enabled)


@contextmanager
def _unsynced(module: nn.Module, enabled: bool) -> Iterator[None]:
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_requires_gradient_sync(not enabled, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)


def check_resettable(network: nn.Module) -> None:
    """Raise InputError for a module that could not make its weights anew after it was built without memory."""
    for name, module in network.named_modules():
        owns = any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
        if owns and not hasattr(module, "reset_parameters"):
            raise InputError(
                f"fabric.fsdp.meta_init: {name or 'the network'} ({type(module).__name__}) has no reset_parameters() "
                "to draw its weights with"
            )


def materialise(unit: nn.Module, device: torch.device) -> None:
    """Give modules built on the meta device memory and fresh weights: one block at a time is whole, then sharded."""
    for module in unit.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()  # type: ignore[operator]
