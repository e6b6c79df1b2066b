"""The operator stage on two ranks, each of which lacks a task in every batch: one process's updates and figures."""

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
from test_wandb_logger import sessions
from torch.distributed.tensor import DTensor

from fabric_trainer import cli
from fabric_trainer.checkpoint import load
from fabric_trainer.curves import read_metrics
from models.physics.operator_stage import OperatorStage

pytestmark = pytest.mark.distributed

STAGE: dict[str, Any] = {
    "tasks": ["burgers1d", "darcy2d"],
    "made": {"burgers1d": {"nx": 32, "frames": 5}, "darcy2d": {"nx": 8}},
    "samples": {"train": 4, "val": 3},
    "sampling": "balanced",
    "train_encoder": True,
    "inverse_encoding": 1.0,
    "inverse_warmup": 0,
    "inverse_cap": 1.0,
    "physical_weight": 0.1,
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
    "queries": 8,
}
CONFIG: dict[str, Any] = {
    "task": {"path": "models.physics.operator_stage.OperatorStage", "args": STAGE},
    "data": {"root": "data"},
    "batch": {"micro_batch_size": 2},
    "optim": {"name": "sgd", "lr": 0.05},
    "clip": {"norm": 1.0},
    "ema": {"decay": 0.5},
    "run": {"max_steps": 6, "max_epochs": None, "log_every_n_steps": 1},
    "checkpoint": {"monitor": "val/nrmse"},
    "callbacks": ["test_physics_ranks.Held"],
    "fabric": {"accelerator": "cpu", "precision": "32-true"},
    "loggers": {"tensorboard": False, "wandb": {"mode": "offline"}},
}


class Held:
    """Writes how many elements of the weights each rank has, and of which tasks its rows were."""

    def on_fit_end(self, state: Any) -> None:
        network = list(state.engine.leaves.values())
        own = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in network]
        found = {"own": sum(leaf.numel() for leaf in own), "all": sum(leaf.shape.numel() for leaf in network)}
        Path(f"{state.memory.folder}/held-{state.ranks.rank}.json").write_text(json.dumps(found))


class Seen(OperatorStage):
    """Refuses a micro-batch of several tasks, and so shows that every rank lacks one."""

    def loss(self, network: Any, batch: dict[str, Any]) -> Any:
        assert len(set(batch["tasks"])) == 1 and len(batch["tasks"]) == 1
        return super().loss(network, batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of one process, whose every update has a row of both tasks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "one.yaml").write_text(yaml.safe_dump(CONFIG | {"loggers": {"tensorboard": False}}))
    changes = {"task": {"path": "test_physics_ranks.Seen", "args": STAGE}, "batch": {"micro_batch_size": 1}}
    (folder / "two.yaml").write_text(yaml.safe_dump(CONFIG | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["--config", "one.yaml", "--name", "one"]) == 0
    return folder


def logged(run: Path) -> dict[str, list[float]]:
    """By name: what every update logged but its time, and what every evaluation measured."""
    columns = read_metrics(run / "metrics.csv")
    found = {name: values.tolist() for name, values in columns.items() if name.startswith(("train/", "grad_norm"))}
    for evaluation in json.loads((run / "history.json").read_text())["evaluations"]:
        for name, value in evaluation.items():
            if name.startswith("val"):
                found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_without_a_task_each_make_the_updates_of_one(folder: Path, strategy: str) -> None:
    pytest.importorskip("wandb")
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", "two.yaml", "--name", strategy]
    command += ["--fabric.devices", "2", "--fabric.strategy", strategy]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'tests'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_SERVICE", None)  # that of a test in this process
    done = warm.run(command, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = folder / "runs" / "one", folder / "runs" / strategy

    expected, found = load(one / "checkpoints" / "last.pt"), load(two / "checkpoints" / "last.pt")
    assert found["counters"]["step"] == 6 and found["counters"]["samples"] == expected["counters"]["samples"] == 12
    for tree in ("model", "ema"):
        for name, value in expected[tree].items():
            torch.testing.assert_close(found[tree][name], value, rtol=1e-4, atol=1e-6, msg=f"{tree} {name}")
    theirs, ours = logged(one), logged(two)
    assert ours.keys() == theirs.keys() >= {"train/burgers1d/nrmse", "train/darcy2d/nrmse", "val/darcy2d/nrmse"}
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-3, abs=1e-6, nan_ok=True), name
        assert any(value == value for value in values), name

    # the file is one process's, strictly
    task = OperatorStage(**STAGE)
    task.prepare(folder / "data")
    network = task.network()
    network.load_state_dict(found["model"])
    elements = sum(p.numel() for p in network.parameters())
    share = 0.5 if strategy == "fsdp" else 1.0
    for rank in range(2):
        held = json.loads((two / f"held-{rank}.json").read_text())
        assert held["all"] == elements and held["own"] == pytest.approx(share * elements, rel=0.05)

    # one run in W&B and one file, by rank 0
    (sent,) = sessions(two)
    losses = [row["train/loss"] for row in sent.rows if "train/loss" in row]
    assert losses == [loss for loss in ours["train/loss"] if loss == loss] and len(losses) == 6
    assert [path.name for path in two.rglob("*.csv")] == ["metrics.csv"]
