"""Exact metrics over a split: sums in float64 over all batches and ranks, then one formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from fabric_trainer.order import Order, Sequential
from fabric_trainer.random import mixed, seed_torch
from fabric_trainer.task import Task
from fabric_trainer.window import MicroBatches, load, to_device

_EVALUATION = 0x6576616C  # keeps evaluation's random numbers apart from training's


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    task: Task,
    network: nn.Module,
    dataset: Dataset[Any],
    micro_batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    limit_batches: int | None = None,
) -> dict[str, float]:
    """The task's metrics over the whole dataset, the same on every rank.

    Every sample counts once, however many ranks and however ragged the last batch. Random numbers are the same at
    every evaluation. The network's training flags are as before afterwards; it must not be in use elsewhere.
    """
    order = Order(Sequential(len(dataset)), micro_batch_size, 1, fabric.world_size, fabric.global_rank)  # type: ignore
    windows = order.first_window(1)
    spans = (order.span(window) for window in range(min(windows, limit_batches or windows)))
    rows = (rows for span in spans for rows in order.micro_batches(span))
    meters = {name: meter.to(fabric.device) for name, meter in task.meters().items()}
    sums: dict[str, Tensor] = {}
    seed = mixed(_EVALUATION, seed)
    batches = load(MicroBatches(task, dataset, seed, training=False), rows, num_workers, fabric.device.type == "cuda")
    with evaluating(network):
        seed_torch(fabric.device, seed, fabric.global_rank)
        for batch in batches:
            for name, value in task.evaluate(network, to_device(batch, fabric.device), meters).items():
                value = value.detach().to(fabric.device, _wide(fabric.device))
                sums[name] = sums[name] + value if name in sums else value
    figures = task.figures(_over_ranks(fabric, sums))
    return figures | {name: float(meter.compute()) for name, meter in meters.items()}


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and in the mode it had before afterwards (not all are in train mode)."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _over_ranks(fabric: Fabric, sums: dict[str, Tensor]) -> dict[str, float]:
    if not sums:
        return {}
    total = fabric.all_reduce(torch.stack(list(sums.values())), reduce_op="sum")
    return dict(zip(sums, total.tolist(), strict=True))  # type: ignore[union-attr]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
