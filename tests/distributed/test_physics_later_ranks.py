"""The distillation on two ranks, whose every batch is of one of two tasks: one process's updates and figures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from conftest import REPOSITORY
from torch import nn

from fabric_trainer import cli
from fabric_trainer.checkpoint import load, write
from models.physics.residual_stage import ResidualStage

pytestmark = pytest.mark.distributed

STAGE: dict[str, Any] = {
    "tasks": ["burgers1d", "darcy2d"],
    "made": {"burgers1d": {"nx": 32, "frames": 5}, "darcy2d": {"nx": 8}},
    "samples": {"train": 4, "val": 3},
    "sampling": "balanced",
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
    "reach": 50.0,
}
CONFIG: dict[str, Any] = {
    "task": {"path": "models.physics.distill_stage.DistillStage", "args": STAGE | {"start": "residual.pt"}},
    "data": {"root": "data"},
    "batch": {"micro_batch_size": 2},
    "optim": {"name": "sgd", "lr": 0.05},
    "clip": {"norm": 1.0},
    "ema": {"decay": 0.5},
    "run": {"max_steps": 6, "max_epochs": None},
    "checkpoint": {"monitor": "val/nrmse"},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corrector to start from, and a run of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        task = ResidualStage(**STAGE)
        task.prepare(Path("data"))
        network = task.network()
        for name, parameter in network.named_parameters():
            if name.startswith(("corrector.", "operator.output_norm")):
                nn.init.normal_(parameter, std=0.3)
        write(
            Path("residual.pt"), {"format": 1, "model": network.state_dict(), "ema": {}, "counters": {}, "config": {}}
        )
        Path("one.yaml").write_text(yaml.safe_dump(CONFIG))
        Path("two.yaml").write_text(yaml.safe_dump(CONFIG | {"batch": {"micro_batch_size": 1}}))
        assert cli.main(["--config", "one.yaml", "--name", "one"]) == 0
    return folder


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_make_the_updates_of_one(folder: Path, strategy: str) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", "two.yaml", "--name", strategy]
    command += ["--fabric.devices", "2", "--fabric.strategy", strategy]
    done = warm.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (folder / "runs" / name for name in ("one", strategy))
    expected, found = load(one / "checkpoints" / "last.pt"), load(two / "checkpoints" / "last.pt")
    begun = load(folder / "residual.pt")["model"]
    assert found["counters"]["step"] == 6 and found["model"].keys() == begun.keys()  # the teacher is in no file
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["ema"][name], expected["ema"][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(found["model"][name], begun[name]) == (not name.startswith("corrector."))
    histories = [json.loads((run / "history.json").read_text()) for run in (one, two)]
    theirs, ours = (history["evaluations"][-1] for history in histories)
    figures = {name for name in theirs if name.startswith("val")}
    assert figures >= {
        "val/nrmse",
        "val/nrmse_teacher",
        "val/burgers1d/nrmse",
        "val/darcy2d/nrmse_physical",
        "val/drift",
    }
    assert {n: ours[n] for n in figures} == pytest.approx({n: theirs[n] for n in figures}, rel=1e-3)
