"""DDP that exchanges gradients once, after all micro-batches of an update have run by themselves.

A rank that runs out of memory can then do its share again, in smaller pieces, without the others noticing. The price
is that the exchange does not overlap with the last backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BUCKET = 25 << 20  # bytes in one collective, as in torch's DDP


class UnsyncedDDP(DDPStrategy):
    """Every rank has the network itself, the same at first."""

    def __init__(self, **keys: object) -> None:
        super().__init__(**keys)  # type: ignore[arg-type]
        self._backward_sync_control = _Never()

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
        return module

    @torch.no_grad()
    def reduce_gradients(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Average over the ranks; a parameter without a gradient on any rank stays without. As in DDP, every rank
        goes on with rank 0's buffers."""
        for bucket in _buckets(parameters):
            _average(bucket)
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


class _Never(_BackwardSyncControl):
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    yield bucket


def _average(bucket: list[nn.Parameter]) -> None:
    """One collective: the gradients, and beside them on how many ranks each is there."""
    own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
    there = own[0].new_tensor([p.grad is not None for p in bucket])
    flat = _flatten_dense_tensors([*own, there])
    torch.distributed.all_reduce(flat)
    *gradients, ranks = _unflatten_dense_tensors(flat, [*own, there])
    torch._foreach_div_(list(gradients), torch.distributed.get_world_size())
    for place, (parameter, gradient) in enumerate(zip(bucket, gradients, strict=True)):
        if parameter.grad is not None or ranks[place] > 0:  # the host asks only where it has none itself
            parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
