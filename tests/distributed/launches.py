"""Launches of worker.py, and what its ranks left."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from systems import STRATEGIES, document

AVERAGES: dict[str, Any] = {  # six updates whose averages are followed
    "run": {"max_steps": 6},
    "schedule": {"warmup": 0},
    "ema": {"snapshots": "3 steps"},
    "evaluate": {"every": "100 steps"},
    "checkpoint": {"every": "100 steps"},
}
HERE = Path(__file__).resolve().parent
COMPILING = ("ddp", "fsdp")
QUICK = ("single", "ddp", "fsdp", "deepspeed2")  # whose controls are tested in every run of the tests
CONTROLLED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
COMPILED: dict[str, dict[str, Any]] = {  # the section ``compile``; systems.py has the backends
    "eager": {},
    "whole": {"scope": "whole", "backend": "counted"},
    "recomputed": {"scope": "blocks", "backend": "counted", "recomputed": ["Residual"]},
    "forward": {"scope": "blocks", "backend": "fails_on_1"},
    "backward": {"scope": "whole", "backend": "fails_backward_on_1"},
    "later": {"scope": "blocks", "backend": "fails_later_on_1", "dynamic": False},
    "required": {"scope": "blocks", "backend": "fails_on_1", "require": True},
}


def run_worker(
    folder: Path, strategy: str, jobs: dict[str, Any], name: str | None = None, timeout: float = 300, **sections: Any
) -> None:
    """One launch: the jobs (functions of worker.py) one after the other, in the strategy's processes.

    name: what the launch leaves its results under, where that isn't the strategy; sections: of the configuration.
    """
    name = name or strategy
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(document(strategy, **sections)))
    command = [sys.executable, str(HERE / "worker.py"), str(folder), name, json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = warm.run(command, env=environment, timeout=timeout)
    assert done.returncode == 0, f"{strategy}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def results(folder: Path, strategy: str, job: str) -> list[Any]:
    """What the ranks left."""
    paths = sorted((folder / strategy).glob(f"{job}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def ending(made: dict[str, Any]) -> dict[str, Any]:
    """Stops early after the third update, where the best is one before it; norms of modules are logged."""
    sections: dict[str, Any] = {
        "evaluate": {"every": "1 steps"},
        "checkpoint": {"mode": "max", "every": "100 steps"},
        "early_stopping": {"patience": 2, "mode": "min", "min_delta": 1e9, "restore_best": True},
    }
    if made["fabric"].get("strategy") != "deepspeed":
        sections["run"] = {"log_gradient_norms": "modules"}
    return made | {name: made.get(name, {}) | keys for name, keys in sections.items()}


def finders(strategy: str) -> dict[str, Any]:
    """Under ddp one rank has less memory; where weights are sharded a failure would end the launch."""
    task = {"path": "systems.Tight", "args": {"limit": 3 if strategy == "ddp" else 99}}
    return {"config": document(strategy, task=task, tune={"updates": 20}), "sizes": [1, 2, 3, 4, 5]}


def prepare(folder: Path) -> Callable[..., Path]:
    """A function that gives a strategy's folder, after a launch with the jobs that need no other strategy; with
    ``controls=True`` also those of ``controls``."""
    done: set[str] = set()
    failed: dict[str, AssertionError] = {}

    def launch(strategy: str, jobs: dict[str, Any], key: str) -> None:
        if key in failed:
            raise failed[key]  # not once more for every test that asks
        if key not in done:
            try:
                run_worker(folder, strategy, jobs)
            except AssertionError as error:
                failed[key] = error
                raise
            done.add(key)

    def trained(strategy: str, controls: bool = False) -> Path:
        together = strategy in QUICK
        launch(strategy, basics(strategy) | (control(strategy) if together else {}), strategy)
        if controls and not together:
            launch(strategy, control(strategy), f"{strategy} controls")
        return folder / strategy

    return trained


def basics(strategy: str) -> dict[str, Any]:
    """Jobs that show a strategy's updates."""
    quiet = {"run": {"log_every_n_steps": 100}, "evaluate": {"every": "100 steps"}}
    dropout = {"task": {"args": {"dropout": 0.3}}, "schedule": {"warmup": 0}, "run": {"max_steps": 3}}
    jobs: dict[str, Any] = {
        "train": {},
        "collectives": {"config": document(strategy, **quiet, checkpoint={"every": "100 steps"})},
        "recompute": {"config": document(strategy, **dropout)},
        "memory": {},
    }
    return jobs | ({"sync_after_accumulation": {}} if strategy == "fsdp" else {})


def control(strategy: str) -> dict[str, Any]:
    """Jobs that show what is controlled beside: averages, the end, freezing, finders, optimizers, the compiler."""
    frozen = {"strategy": "schedule", "schedule": {0: [], 4: ["blocks.1"], 7: ["blocks.*", "embed"]}}
    steady = {"task": {"path": "systems.Normed"}, "schedule": {"name": "constant", "warmup": 0}}
    jobs: dict[str, Any] = {
        "averages": {"config": document(strategy, **AVERAGES)},
        "ends": {"config": ending(document(strategy))},
        "finders": finders(strategy),
        "freezing": {"config": document(strategy, freeze=frozen, **steady), "resumes": [3, 4, 7, 8]},
    }
    if strategy != "deepspeed3":  # which can't
        fixed = document(strategy, freeze={"strategy": "fixed"}, run={"max_steps": 1}, **steady)
        jobs["probing"] = {"config": fixed}
    if strategy in ("single", "ddp", "fsdp", "tensor_parallel"):
        few = {"run": {"max_steps": 6}, "evaluate": {"every": "100 steps"}}
        jobs["optimizers"] = {"config": document(strategy, **few)}
    if strategy in COMPILING:
        jobs["compiled"] = compiled(strategy)
    return jobs | ({"profile": {}} if strategy == "ddp" else {})


def compiled(strategy: str, **sections: Any) -> dict[str, Any]:
    """The job of that name: five updates with dropout on, the fourth of one row."""
    few = {
        "task": {"args": {"dropout": 0.3}},
        "schedule": {"warmup": 0},
        "run": {"max_steps": 5, "log_every_n_steps": 100},
        "evaluate": {"every": "100 steps"},
    }
    return {"config": document(strategy, **few, **sections), "cases": COMPILED}
