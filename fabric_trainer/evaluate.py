"""Exact metrics over a split: sums in float64 over all batches and ranks, then one formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from fabric_trainer.errors import InputError
from fabric_trainer.order import First, Limit, Order, Plan, Sequential, limited
from fabric_trainer.random import mixed, seed_torch
from fabric_trainer.ranks import Ranks, data_parallel
from fabric_trainer.task import Task
from fabric_trainer.window import MicroBatches, loader, to_device

if TYPE_CHECKING:
    from fabric_trainer.state import State

_EVALUATION = 0x6576616C  # keeps evaluation's random numbers apart from training's


class Split:
    """The evaluation batches of one dataset: in order, every sample once, however many ranks; again at each pass.

    limit: only the first so many batches of ``micro_batch_size`` samples, or that share of them: the same samples on
    any number of ranks. plan: other samples than all in their order. Random numbers are the same at every pass, and
    none of training's.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        dataset: Dataset[Any],
        micro_batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        limit: Limit = None,
        plan: Plan | None = None,
    ) -> None:
        plan = plan or Sequential(len(dataset))  # type: ignore[arg-type]
        self.whole = whole = plan.length(0)
        if whole == 0:
            raise InputError(f"{type(task).__name__} has an evaluation split without samples; return None instead")
        self.ranks = data_parallel(fabric)
        self.samples = min(whole, limited(limit, -(-whole // micro_batch_size)) * micro_batch_size)
        order = Order(First(plan, self.samples), micro_batch_size, 1, self.ranks.size, self.ranks.rank)
        spans = map(order.span, range(order.first_window(1)))
        rows = [rows for span in spans for rows in order.micro_batches(span)]
        self.seed = mixed(_EVALUATION, seed)
        micro_batches = MicroBatches(task, dataset, self.seed, training=False)
        self.batches = loader(micro_batches, rows, num_workers, fabric.device.type == "cuda")


@torch.no_grad()
def evaluate(fabric: Fabric, task: Task, network: nn.Module, split: Split) -> dict[str, float]:
    """The task's metrics over the whole split, the same on every rank.

    The network's training flags are as before afterwards; torch's generators are seeded anew.
    """
    meters = {name: meter.to(fabric.device) for name, meter in task.meters().items()}
    for meter in meters.values():
        meter.process_group = split.ranks.group
    sums: dict[str, Tensor] = {}
    with evaluating(network):
        seed_torch(fabric.device, split.seed, split.ranks.rank)
        for batch in split.batches:
            for name, value in task.evaluate(network, to_device(batch, fabric.device), meters).items():
                value = value.detach().to(fabric.device, _wide(fabric.device))
                sums[name] = sums[name] + value if name in sums else value
    figures = task.figures(_over_ranks(split.ranks, sums))
    return figures | {name: float(meter.compute()) for name, meter in meters.items()}


def measure(state: State, split: str) -> dict[str, float]:
    """``<split>/<metric>`` of the raw weights, ``<split>_ema/<metric>`` of the main average and
    ``<split>_ema_<label>/<metric>`` of the others, as configured."""
    wanted, averaged = state.config.evaluate.weights, state.ema
    metrics: dict[str, float] = {}
    if averaged is None or wanted != "ema":
        metrics |= _measured(state, split, split)
    if averaged is not None and wanted != "raw":
        with averaged.applied():
            metrics |= _measured(state, split, f"{split}_ema")
        for label in averaged.further if wanted == "all" else []:
            with averaged.applied(label):
                metrics |= _measured(state, split, f"{split}_ema_{label}")
    return metrics


def measure_test(state: State) -> dict[str, float]:
    """``test/<metric>`` of the weights that the run is judged by."""
    average = judged(state)
    if average is None or state.ema is None:
        return _measured(state, "test", "test")
    with state.ema.applied(average or None):
        return _measured(state, "test", "test")


def judged(state: State) -> str | None:
    """The weights that the run is judged by: those that ``checkpoint.monitor`` is measured with; without a monitor the
    main average, where one is kept and evaluated. None for the raw ones, "" for the main average, or a further one's
    label."""
    kind = (state.config.checkpoint.monitor or "").partition("/")[0]
    averaged = kind.startswith("val_ema") if kind else state.config.evaluate.weights != "raw"
    return kind.removeprefix("val_ema").removeprefix("_") if averaged and state.ema else None


def _measured(state: State, split: str, prefix: str) -> dict[str, float]:
    figures = evaluate(state.fabric, state.task, state.network, state.split(split))
    state.engine.refresh()
    return {f"{prefix}/{name}": value for name, value in figures.items()}


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


def _over_ranks(ranks: Ranks, sums: dict[str, Tensor]) -> dict[str, Any]:
    """Floats, and arrays of those with a shape; one collective and one copy to the host."""
    if not sums:
        return {}
    total = ranks.sum(torch.cat([value.reshape(-1) for value in sums.values()])).cpu()
    parts = total.split([value.numel() for value in sums.values()])
    return {
        name: part.view(value.shape).numpy() if value.ndim else part.item()
        for (name, value), part in zip(sums.items(), parts, strict=True)
    }


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
