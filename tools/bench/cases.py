"""What every loop trains: two models, their batches in one order, one loss and one optimizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 42
CLIP = 0.3  # below the linear model's norms, above the transformer's but the first: a test sees both


@dataclass(frozen=True)
class Case:
    """A model and how long to train it in each measurement."""

    name: str
    network: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: int  # per rank
    updates: int
    warmup: int
    samples: int

    @property
    def steps(self) -> int:
        """One more than is measured: time is taken from loss to loss."""
        return self.warmup + self.updates + 1

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.samples, *self.inputs, generator=generator)
        return x, torch.randn(self.samples, *self.outputs, generator=generator)


class Transformer(nn.Module):
    """Two encoder layers over 64 tokens of width 128."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


CASES = (
    Case("tiny linear", lambda: nn.Linear(32, 2), (32,), (2,), batch=8, updates=500, warmup=50, samples=1024),
    Case("transformer", Transformer, (64, 128), (64, 128), batch=16, updates=15, warmup=5, samples=128),
)


class Work:
    """One training of a case. Its loss keeps the time, once per update, at the same place in every loop."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.x, self.y = case.data()
        self.weight = torch.ones(case.batch)
        self.times: list[float] = []
        torch.manual_seed(SEED)
        self.network = case.network()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of shuffled epochs, in the order of ``fabric_trainer.Shuffled``: one batch per update."""
        return itertools.islice(self._epochs(), self.case.steps)

    def _epochs(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, ranks = world()
        for epoch in itertools.count():
            order = torch.from_numpy(np.random.default_rng((SEED, epoch)).permutation(self.case.samples))
            for rows in order.split(self.case.batch)[rank::ranks]:
                yield self.x[rows], self.y[rows]

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean over the batch."""
        return self.summed(network, x, y, self.weight) / self.case.batch

    def summed(self, network: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The squared error, a sum over samples, of which those of weight 0 count nothing."""
        self.times.append(time.perf_counter())
        return F.mse_loss(network(x), y, reduction="none").flatten(1).mean(1) @ weight

    @property
    def seconds(self) -> float:
        """Per update, the first ones and whatever starts and ends a loop left out."""
        first, last = self.case.warmup, self.case.warmup + self.case.updates
        return (self.times[last] - self.times[first]) / self.case.updates


def world() -> tuple[int, int]:
    """Rank and number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
