"""Kill a run at random moments, resume it each time, and compare its end with an uninterrupted run's, bit for bit.

python -m tools.chaos --kills 100

The run has what makes a resume hard: dropout, BatchNorm, shuffling, per-sample augmentation, several averages of
weights and statistics, clipping, a ragged accumulation, momentum, a plateau schedule and two loader workers. It saves
every other update, and a snapshot of its averages every third, so that many kills fall into a save. Each attempt is a
process of its own, forked from one that has the libraries loaded, and dies by SIGKILL.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fabric_trainer import Batch, Loss, Task
from fabric_trainer.checkpoint import load, read, read_index
from fabric_trainer.cli import main as train

TIMES = {"seconds", "samples_per_second", "memory/peak", "memory/host"}  # the columns that two runs may differ in

CONFIG: dict[str, Any] = {
    "seed": 7,
    "task": {"path": "tools.chaos.Noisy"},
    "data": {"num_workers": 2},
    "batch": {"micro_batch_size": 4, "accumulate": 3},
    "optim": {"name": "sgd", "lr": 0.02, "weight_decay": 1e-4, "args": {"momentum": 0.9}},
    "schedule": {"name": "plateau", "factor": 0.5, "patience": 0, "threshold": 0.02},
    "clip": {"norm": 1.0},
    "ema": {"decay": [0.9, 0.5], "power": [0.1], "buffers": True, "snapshots": "3 steps"},
    "run": {"max_epochs": 4, "log_every_n_steps": 5},
    "evaluate": {"every": "0.5 epochs"},
    "checkpoint": {"every": "2 steps", "monitor": "val/loss", "keep_last": 3},
    "loggers": {"tensorboard": False},
    "fabric": {"accelerator": "cpu"},
}


class Points(torch.utils.data.Dataset[dict[str, Tensor]]):
    """x (8,) and a smooth function of it (2,)."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 8, generator=generator)
        self.y = torch.sin(self.x[:, :2] * 2)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Noisy(Task):
    """A regression with dropout, BatchNorm and per-sample noise. pause: seconds that each forward takes longer."""

    def __init__(self, samples: int = 310, width: int = 128, pause: float = 0.003) -> None:
        self.samples, self.width, self.pause = samples, width, pause

    def dataset(self, split: str) -> Points | None:
        return {"train": Points(self.samples, 0), "val": Points(70, 1)}.get(split)

    def network(self) -> nn.Module:
        width = self.width
        return nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 2)
        )

    def augment(self, batch: Batch) -> Batch:
        return batch | {"x": batch["x"] + 0.1 * batch["random"].normal("noise", 8)}

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        time.sleep(self.pause)
        error = (network(batch["x"]) - batch["y"]).square().sum(1)
        return Loss((error * batch["weight"]).sum(), {"abs": (error.detach().sqrt() * batch["weight"]).sum()})


def start(folder: Path, name: str) -> multiprocessing.Process:
    """A process that trains run ``name``, or continues it."""
    command = [f"--config={folder / 'chaos.yaml'}", f"--run.root={folder}", f"--name={name}", "--resume=auto"]
    gc.collect()  # here: in the child, what goes might wait for threads that a fork leaves behind
    process = multiprocessing.get_context("fork").Process(target=_train_quietly, args=(command, folder / f"{name}.log"))
    process.start()
    return process


def _train_quietly(command: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        sys.exit(train(command))


def kill_at_random(process: multiprocessing.Process, checkpoints: Path, rng: random.Random, longest: float) -> str:
    """SIGKILL the process after a random time, or in the middle of a save; returns where it was hit, or 'finished'."""
    left_before = half_written(checkpoints)
    until = time.monotonic() + rng.uniform(0.0, longest)
    while time.monotonic() < until and process.is_alive():
        time.sleep(0.005)
    in_save = rng.random() < 0.5
    while in_save and process.is_alive() and not half_written(checkpoints) - left_before:
        pass  # spinning, to hit the few hundred microseconds in which the file is there
    if process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    if process.exitcode == 0:
        return "finished"
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"the run failed by itself with code {process.exitcode}; see the log beside {checkpoints}")
    return "in a save" if half_written(checkpoints) - left_before else "elsewhere"


def half_written(checkpoints: Path) -> set[tuple[str, int]]:
    """The files that are being written, or that a kill left so: name and time of the last write."""
    found: set[tuple[str, int]] = set()
    with contextlib.suppress(FileNotFoundError):  # a file renamed, or a folder without a checkpoint begun anew
        found.update((path.name, path.lstat().st_mtime_ns) for path in checkpoints.glob(".*.tmp"))
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for times."""
    saved = load(folder / "checkpoints" / "last.pt")
    del saved["counters"]["seconds"], saved["config"]["name"], saved["states"]["history"]
    with open(folder / "metrics.csv") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    history = json.loads((folder / "history.json").read_text())
    for evaluation in history["evaluations"]:
        del evaluation["seconds"]
    best = {name: entry["metrics"] for name, entry in read_index(folder / "checkpoints").items()}
    snapshots = {path.name: read(path) for path in (folder / "ema").glob("step-*.pt")}
    for snapshot in snapshots.values():
        del snapshot["counters"]["seconds"], snapshot["config"]
    return {"checkpoint": saved, "metrics.csv": rows, "history": history, "kept": best, "snapshots": snapshots}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees differ; tensors and numbers bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    return [] if same else [path]


def rampage(folder: Path, kills: int, seed: int = 0) -> tuple[int, int, dict[str, int]]:
    """Kill ``kills`` times, over as many runs as it takes. Returns runs, runs that ended otherwise than the
    uninterrupted one, and how many kills fell where. Prints a line per run."""
    (folder / "chaos.yaml").write_text(yaml.safe_dump(CONFIG))
    began = time.monotonic()
    whole = start(folder, "whole")
    whole.join()
    if whole.exitcode != 0:
        raise SystemExit(f"the uninterrupted run failed:\n{(folder / 'whole.log').read_text()[-2000:]}")
    longest = (time.monotonic() - began) / 3
    expected, rng = outcome(folder / "whole"), random.Random(seed)
    hits: dict[str, int] = {}
    runs = bad = 0
    while sum(hits.values()) < kills:
        name, times = f"killed-{runs}", 0
        while True:
            process = start(folder, name)
            if sum(hits.values()) >= kills or times >= 12:
                process.join()
                assert process.exitcode == 0, (folder / f"{name}.log").read_text()[-2000:]
                break
            hit = kill_at_random(process, folder / name / "checkpoints", rng, longest)
            if hit == "finished":
                break
            hits[hit], times = hits.get(hit, 0) + 1, times + 1
        runs += 1
        found = differences(expected, outcome(folder / name))
        bad += bool(found)
        print(f"{name}: {times} kills, {'equal to the uninterrupted run' if not found else found[:5]}", flush=True)
    return runs, bad, hits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, bad, hits = rampage(Path(folder), arguments.kills, arguments.seed)
    print(f"{sum(hits.values())} kills ({hits}) over {runs} runs: {bad} of them ended differently")
    return int(bad > 0)


if __name__ == "__main__":
    # found by its import path in the runs, so that this module is there once
    sys.exit(sys.modules.setdefault("tools.chaos", sys.modules[__name__]).main())
