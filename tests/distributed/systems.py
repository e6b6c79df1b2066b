"""What the tests of strategies train: every difficulty of a real update in a network of a few hundred parameters."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from toys import Points

from fabric_trainer import Batch, Loss, Task

# global batch 12, of micro-batches of 2: on one, two and three data-parallel ranks alike
BASE: dict[str, Any] = {
    "task": {"path": "systems.Masked", "args": {}},
    "batch": {"micro_batch_size": 2, "global_batch_size": 12},
    "optim": {"lr": 1e-2, "weight_decay": 0.1, "args": {"eps": 1e-6}},
    "schedule": {"name": "cosine", "warmup": 3},
    "clip": {"norm": 0.5},
    "ema": {"decay": [0.9, 0.99], "power": [0.1]},
    "run": {"max_steps": 10, "log_every_n_steps": 3},
    "checkpoint": {"every": "1 steps", "keep_last": 20, "monitor": "val/loss"},
    "loggers": {"tensorboard": False},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"devices": 1, "precision": "64-true"},
    "ddp": {"devices": 2, "strategy": "ddp", "precision": "64-true"},
    "fsdp": {"devices": 2, "strategy": "fsdp", "precision": "64-true"},
    "tensor_parallel": {"devices": 2, "strategy": "tensor_parallel", "precision": "64-true"},
    "deepspeed1": {"devices": 2, "strategy": "deepspeed", "stage": 1},
    "deepspeed2": {"devices": 2, "strategy": "deepspeed", "stage": 2},
    "deepspeed3": {"devices": 2, "strategy": "deepspeed", "stage": 3},
}
LARGER: dict[str, dict[str, Any]] = {
    "ddp on 3": {"devices": 3, "strategy": "ddp", "precision": "64-true"},
    "fsdp on 3": {"devices": 3, "strategy": "fsdp", "precision": "64-true"},
    "fsdp x tp": {"devices": 4, "strategy": "fsdp", "tensor_parallel_size": 2, "precision": "64-true"},
}


def document(strategy: str, precision: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a run under a strategy; sections are laid over the base's."""
    fabric = {"accelerator": "cpu", **(STRATEGIES | LARGER)[strategy]}
    fabric |= {"precision": precision} if precision else {}
    made = {key: dict(value) for key, value in BASE.items()} | {"fabric": fabric}
    for name, keys in sections.items():
        made[name] = made.get(name, {}) | keys
    return made


class Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Network(nn.Module):
    spoil = False  # the next backward runs out of memory half-way, when later layers have their gradients

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Residual(width, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.frozen = nn.Parameter(0.5 + torch.rand(width), requires_grad=False)

    def reset_parameters(self) -> None:
        """Of its own tensor: what ``fabric.fsdp.meta_init`` asks of every module that has one."""
        nn.init.constant_(self.frozen, 0.75)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.frozen
        for block in self.blocks:
            x = OutOfMemoryInBackward.apply(block(x)) if self.spoil else block(x)
        return self.head(self.norm(x))

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


class Masked(Task):
    """37 samples: windows of 12, 12, 12 and 1, in which a rank of two has padding alone. Every seventh sample weighs
    nothing, and each has noise of its own."""

    def __init__(self, samples: int = 37, dropout: float = 0.0, width: int = 16) -> None:
        self.samples, self.dropout, self.width = samples, dropout, width
        self.seen: list[list[int]] = []  # indices that counted, by forward

    def dataset(self, split: str) -> Points | None:
        weights = torch.tensor([0.0 if i % 7 == 3 else (0.5, 1.0, 2.0)[i % 3] for i in range(self.samples)])
        return {"train": Points(self.samples, 0, weights), "val": Points(23, 1)}.get(split)

    def network(self) -> nn.Module:
        return Network(self.width, self.dropout)

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        return network.blocks  # type: ignore[return-value]

    def augment(self, batch: Batch) -> Batch:
        batch["x"] = batch["x"] + 0.1 * batch["random"].normal("noise", 8)
        return batch

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        error = (network(batch["x"]) - batch["y"]).square().sum(1)
        if network.training:
            self.seen.append(batch["index"][batch["weight"] > 0].tolist())
        return Loss((error * batch["weight"]).sum(), {"abs": (error.detach().sqrt() * batch["weight"]).sum()})


class Normed(Masked):
    """Begins with a BatchNorm, whose statistics stand still while ``embed`` is frozen. 36 samples: never one alone."""

    def __init__(self) -> None:
        super().__init__(36)

    def network(self) -> nn.Module:
        network = Network(self.width, 0.0)
        network.embed = nn.Sequential(nn.Linear(8, self.width, bias=False), nn.BatchNorm1d(self.width))
        return network

    def units(self, network: nn.Module) -> list[str]:
        return ["blocks.*", "embed"]


class Faulty(Masked):
    """Something goes wrong, once, in a training forward: the ``at``-th of this process, on one rank or (-1) on all.

    "data" goes wrong while the ``at``-th micro-batch is prepared.
    """

    def __init__(self, fault: str = "", at: int = -1, rank: int = 1, samples: int = 37) -> None:
        super().__init__(samples)
        self.fault, self.at, self.rank, self.forwards, self.prepared = fault, at, rank, -1, -1

    def due(self, count: int) -> bool:
        own = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return count == self.at and self.rank in (-1, own)

    def augment(self, batch: Batch) -> Batch:
        self.prepared += 1
        if self.fault == "data" and self.due(self.prepared):
            raise OSError("a file of the data set can't be read")
        return super().augment(batch)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        self.forwards += network.training
        if not network.training or not self.due(self.forwards):
            return super().loss(network, batch)
        if self.fault == "raise":
            raise ZeroDivisionError("a mistake in the task")
        if self.fault == "oom forward":
            raise torch.OutOfMemoryError("out of memory, as injected")
        if self.fault in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.fault))
        Network.spoil = self.fault == "oom backward"
        try:
            loss = super().loss(network, batch)
        finally:
            Network.spoil = False
        return Loss(loss.total * torch.nan, loss.logs) if self.fault == "nan" else loss


class Slow(Masked):
    """Rank 1 takes 10 ms longer for every training forward, and holds 200 MB more."""

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        if network.training and torch.distributed.get_rank() == 1:
            self.ballast = getattr(self, "ballast", None) or [torch.ones(50_000_000)]
            time.sleep(0.01)
        return super().loss(network, batch)


class Tight(Masked):
    """More than ``limit`` rows do not fit, on one rank only, or (-1) on all."""

    def __init__(self, limit: int = 3, rank: int = 1) -> None:
        super().__init__()
        self.limit, self.rank = limit, rank

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        own = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if network.training and len(batch["index"]) > self.limit and self.rank in (-1, own):
            raise torch.OutOfMemoryError(f"{len(batch['index'])} rows, as injected")
        return super().loss(network, batch)


class FailsToSave:
    """A callback that raises on rank 0, where a checkpoint was just given to its writer."""

    def on_checkpoint_saved(self, **keys: Any) -> None:
        raise OSError("the disk is gone")


class OutOfMemoryInBackward(torch.autograd.Function):
    """The identity, whose backward does not fit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory, as injected")


graphs: list[torch.fx.GraphModule] = []  # what the backends below were asked for


def _counted(forward: int = 10**6, backward: int = 10**6) -> Any:
    """A backend of autograd's graphs as they are; on rank 1 its compilers fail at their such-and-such graph."""

    def compiler(most: int) -> Any:
        made: list[Any] = []

        def compile_(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            made.append(graph)
            if len(made) >= most and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
                raise OSError("no such instruction")
            return make_boxed_func(graph.forward)

        return compile_

    return aot_autograd(fw_compiler=compiler(forward), bw_compiler=compiler(backward))


register_backend(compiler_fn=_counted(), name="counted")
register_backend(compiler_fn=_counted(forward=1), name="fails_on_1")
register_backend(compiler_fn=_counted(backward=1), name="fails_backward_on_1")
register_backend(compiler_fn=_counted(forward=2), name="fails_later_on_1")
