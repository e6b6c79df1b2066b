"""What the loop costs: ours and bare Fabric's idiom beside a hand-written loop, interleaved, in one run.

python -m tools.bench.overhead [--pairs 20]

Every loop draws the same batches from tensors in memory, clips the gradient's norm and steps a fused AdamW. Printed
is the median over pairs of (loop / hand-written), with a 95 % bootstrap interval.
"""

from __future__ import annotations

import os

# a CUDA build of torch on a machine without a GPU looks for one at every optimizer step: 0.2 ms in each loop, which
# would make every ratio look better than it is
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabric_trainer import Batch, Config, Loss, Task, fit

CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """A model and how long to train it in each measurement."""

    name: str
    network: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: int
    updates: int
    warmup: int = 50
    samples: int = 1024

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
    Case("tiny linear", lambda: nn.Linear(32, 2), (32,), (2,), batch=8, updates=3000),
    Case("transformer", Transformer, (64, 128), (64, 128), batch=16, updates=20, warmup=5, samples=128),
)


def squared_error(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The loss of all three loops: a sum over samples, of which those of weight 0 count nothing."""
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1) @ weight


def batches(case: Case, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs, without end."""
    while True:
        order = torch.randperm(case.samples)
        for start in range(0, case.samples, case.batch):
            rows = order[start : start + case.batch]
            yield x[rows], y[rows]


def hand_written(case: Case) -> float:
    """Seconds per update of plain torch."""
    x, y = case.data()
    weight = torch.ones(case.batch)
    network = case.network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    for step, (inputs, targets) in enumerate(batches(case, x, y)):
        if step == case.warmup:
            start = time.perf_counter()
        if step == case.warmup + case.updates:
            return (time.perf_counter() - start) / case.updates
        loss = squared_error(network(inputs), targets, weight) / case.batch
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError


def bare_fabric(case: Case) -> float:
    """Seconds per update of Fabric's own idiom."""
    x, y = case.data()
    weight = torch.ones(case.batch)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    module = case.network()
    network, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True))
    for step, (inputs, targets) in enumerate(batches(case, x, y)):
        if step == case.warmup:
            start = time.perf_counter()
        if step == case.warmup + case.updates:
            return (time.perf_counter() - start) / case.updates
        with fabric.no_backward_sync(network, enabled=False):
            loss = squared_error(network(inputs), targets, weight) / case.batch
            fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError


class Pairs(torch.utils.data.Dataset[Batch]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows)
        return {"x": self.x[index], "y": self.y[index]}


class Regression(Task):
    def __init__(self, case: Case) -> None:
        self.case, self.times = case, []

    def dataset(self, split: str) -> Pairs | None:
        return Pairs(*self.case.data()) if split == "train" else None

    def network(self) -> nn.Module:
        return self.case.network()

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        self.times.append(time.perf_counter())
        return Loss(squared_error(network(batch["x"]), batch["y"], batch["weight"]))


def ours(case: Case) -> float:
    """Seconds per update of ``fit``."""
    config = Config()
    config.batch.micro_batch_size, config.run.max_steps = case.batch, case.warmup + case.updates + 1
    config.clip.norm, config.run.log_every_n_steps = CLIP, 500
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    task = Regression(case)
    fit(fabric, task, config)
    return (task.times[case.warmup + case.updates] - task.times[case.warmup]) / case.updates


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, lightning {lightning.__version__}, {platform.machine()}, ", end="")
    print(f"{arguments.threads} thread(s), {arguments.pairs} interleaved pairs")
    loops = {"hand-written": hand_written, "bare Fabric": bare_fabric, "fabric_trainer": ours}
    for case in CASES:
        times = {name: np.empty(arguments.pairs) for name in loops}
        for pair in range(arguments.pairs):
            for name, loop in loops.items():
                times[name][pair] = loop(case)
        plain = times.pop("hand-written")
        print(f"{case.name}: hand-written {1e6 * np.median(plain):.1f} us per update")
        for name, seconds in times.items():
            median, low, high = interval(seconds / plain)
            print(f"  {name:<15} {median:.3f} x  [{low:.3f}, {high:.3f}]  {1e6 * np.median(seconds):.1f} us")


if __name__ == "__main__":
    main()
