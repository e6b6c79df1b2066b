"""The same training in five loops: by hand, bare Fabric, Accelerate, Lightning's Trainer and ours.

Each does one ``Work``, data-parallel where there is a process group of several ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fabric_trainer import Batch, Config, Loss, Task, fit
from tools.bench.cases import CLIP, SEED, Case, Work, world

Loop = Callable[[Work], None]


def hand_written(work: Work) -> None:
    """Plain torch."""
    network = work.network if world()[1] == 1 else DistributedDataParallel(work.network)
    optimizer = work.optimizer()
    for x, y in work.batches():
        work.loss(network, x, y).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def bare_fabric(work: Work) -> None:
    """Fabric's own idiom, ready for accumulation."""
    fabric = _fabric()
    network, optimizer = fabric.setup(work.network, work.optimizer())
    for x, y in work.batches():
        with fabric.no_backward_sync(network, enabled=False):
            fabric.backward(work.loss(network, x, y))
        fabric.clip_gradients(network, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(work: Work) -> None:
    """Accelerate's own idiom, ready for accumulation."""
    accelerator = Accelerator(cpu=True)
    network, optimizer = accelerator.prepare(work.network, work.optimizer())
    for x, y in work.batches():
        with accelerator.accumulate(network):
            accelerator.backward(work.loss(network, x, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


class Module(LightningModule):
    """What Lightning's Trainer trains."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.network = work, work.network

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.work.loss(self.network, *batch)

    def configure_optimizers(self) -> Optimizer:
        return self.work.optimizer()


def trainer(work: Work) -> None:
    """Lightning's Trainer with all switched off that can be: no logger, checkpoint, progress bar or summary."""
    bare = Trainer(**_devices(), barebones=True, max_steps=work.case.steps, gradient_clip_val=CLIP)
    bare.fit(Module(work), work.batches())


class Pairs(torch.utils.data.Dataset[Batch]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        return {"x": self.x[index], "y": self.y[index]}


class Regression(Task):
    def __init__(self, work: Work) -> None:
        self.work = work

    def dataset(self, split: str) -> Pairs | None:
        return Pairs(self.work.x, self.work.y) if split == "train" else None

    def network(self) -> nn.Module:
        return self.work.network

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        return Loss(self.work.summed(network, batch["x"], batch["y"], batch["weight"]))


def ours(work: Work) -> None:
    """``fit``."""
    config = Config(seed=SEED)
    config.batch.micro_batch_size, config.run.max_steps = work.case.batch, work.case.steps
    config.clip.norm, config.run.log_every_n_steps = CLIP, 500
    fit(_fabric(), Regression(work), config)


LOOPS: dict[str, Loop] = {
    "hand-written": hand_written,
    "bare Fabric": bare_fabric,
    "Accelerate": accelerate,
    "Lightning": trainer,
    "fabric_trainer": ours,
}


def difference(loop: Loop, case: Case, updates: int = 5) -> float:
    """How far ``loop`` ever is from the hand-written one in its first updates, relative to the largest weight or
    moment."""
    short = replace(case, warmup=0, updates=updates - 1)
    found, expected = _trace(loop, short), _trace(hand_written, short)
    return float(((found - expected).abs().amax((0, 2)) / expected.abs().amax((0, 2))).max())


def _trace(loop: Loop, case: Case) -> Tensor:
    """All weights and first moments (AdamW's step hardly shows a gradient's scale) after each update: (updates, 2,
    parameters). torch tells of every step, whoever made it."""
    steps = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = [optimizer.state[weight]["exp_avg"] for weight in weights]
        steps.append(torch.stack([parameters_to_vector(weights), parameters_to_vector(moments)]).detach())

    hook = register_optimizer_step_post_hook(note)
    try:
        loop(Work(case))
    finally:
        hook.remove()
    return torch.stack(steps)


def _fabric() -> Fabric:
    fabric = Fabric(**_devices())
    fabric.launch()
    return fabric


def _devices() -> dict[str, Any]:
    ranks = world()[1]
    return {"accelerator": "cpu", "devices": ranks, "strategy": "auto" if ranks == 1 else "ddp"}
