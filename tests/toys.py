"""A small task that the tests train."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

from fabric_trainer import Batch, Config, Loss, Task


class Points(torch.utils.data.Dataset):
    """x (8,) and a smooth function of it (2,), with per-sample weights where asked."""

    def __init__(self, samples: int, seed: int, weights: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 8, generator=generator)
        self.y = torch.sin(self.x[:, :2] * 2)
        self.weights = weights

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {"x": self.x[index], "y": self.y[index]}
        return sample if self.weights is None else sample | {"weight": self.weights[index]}


class Regression(Task):
    """A two-layer network, squared error, a sum over samples."""

    def __init__(self, samples: int = 50, dropout: float = 0.0, batch_norm: bool = False, width: int = 16) -> None:
        self.samples, self.dropout, self.batch_norm, self.width = samples, dropout, batch_norm, width

    def dataset(self, split: str) -> Points | None:
        return {"train": Points(self.samples, 0), "val": Points(23, 1)}.get(split)

    def network(self) -> nn.Module:
        width = self.width
        middle = [nn.BatchNorm1d(width)] if self.batch_norm else []
        return nn.Sequential(nn.Linear(8, width), *middle, nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(width, 2))

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        error = (network(batch["x"]) - batch["y"]).square().sum(1)
        return Loss((error * batch["weight"]).sum(), {"abs": (error.detach().sqrt() * batch["weight"]).sum()})

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor | list[str]]:
        return {"y": network(batch["x"])}


def config(**changes: object) -> Config:
    """A configuration with dotted changes: config(**{"batch.accumulate": 2})."""
    made = Config()
    made.run.max_epochs = 2
    made.batch.micro_batch_size = 4
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        target = attrgetter(section)(made) if section else made
        assert hasattr(target, name), key
        setattr(target, name, value)
    return made
