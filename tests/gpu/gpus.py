# ruff: noqa: E402  (imports after the path)
"""What the tests on GPUs share: how many there are, and launches of tests/distributed/worker.py on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

import pytest
import torch
import yaml
from systems import document

from fabric_trainer.strategies import TABLE

COUNT = torch.cuda.device_count()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(COUNT))))  # the worker hides them otherwise
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "tensor_parallel": {"strategy": "tensor_parallel"},
    "fsdp1": {"strategy": "fsdp1"},
    "deepspeed1": {"strategy": "deepspeed", "stage": 1},
    "deepspeed2": {"strategy": "deepspeed", "stage": 2},
    "deepspeed3": {"strategy": "deepspeed", "stage": 3},
}
BATCH = {"micro_batch_size": 2, "global_batch_size": 16}  # on one, two and four data-parallel ranks alike


def needs(count: int) -> pytest.MarkDecorator:
    wanted = "a GPU" if count == 1 else f"{count} GPUs"
    return pytest.mark.skipif(count > COUNT, reason=f"needs {wanted}, this machine has {COUNT or 'none'}")


def takes(strategy: str, precision: str) -> bool:
    """By the table."""
    return precision in TABLE[STRATEGIES[strategy]["strategy"]].precisions


def configured(count: int, strategy: str, precision: str, **sections: dict[str, Any]) -> dict[str, Any]:
    fabric = {"accelerator": "cuda", "devices": count, "precision": precision} | STRATEGIES[strategy]
    return document("single", **{"fabric": fabric, "batch": BATCH} | sections)


class Launches:
    """Each run is launched once, for all tests that ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()

    def trained(self, count: int, strategy: str, precision: str) -> Path:
        """The folder of its ten updates, ``run``, and of two short runs with dropout."""
        name = f"{count} x {strategy} {precision}"
        if name not in self.done:
            short: dict[str, Any] = {"run": {"max_steps": 3}, "schedule": {"warmup": 0}}
            dropout = configured(count, strategy, precision, task={"args": {"dropout": 0.3}}, **short)
            jobs = {"train": {}, "recompute": {"config": dropout}}
            self.launch(name, configured(count, strategy, precision), jobs)
            self.done.add(name)
        return self.folder / name

    def launch(self, name: str, configuration: dict[str, Any], jobs: dict[str, Any]) -> Path:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(configuration))
        command = [sys.executable, str(TESTS / "distributed/worker.py"), str(self.folder), name, json.dumps(jobs)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": VISIBLE}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return self.folder / name
