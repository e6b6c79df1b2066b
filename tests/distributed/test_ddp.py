"""Two real processes over gloo make the same updates as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY

from fabric_trainer import cli
from fabric_trainer.checkpoint import load

pytestmark = pytest.mark.distributed

CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 47}},
    "batch": {"micro_batch_size": 4, "accumulate": 2},
    "optim": {"args": {"eps": 1e-6}},
    "clip": {"norm": 1.0},
    "ema": {"decay": 0.9},
    "run": {"max_epochs": 2},
    "fabric": {"accelerator": "cpu", "precision": "64-true"},
    "loggers": {"tensorboard": False},
}


def start(folder: Path, name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [*(launcher or (sys.executable,)), str(REPOSITORY / "train.py"), "--config", str(folder / "toy.yaml")]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--name", name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_two_ranks_make_the_updates_of_one(folder, monkeypatch):
    """Ragged windows of 47 samples, and of 33 on 2 x 8: the last has one sample, so a rank has only padding."""
    monkeypatch.chdir(folder)
    one = ["--config", "toy.yaml", "--name", "one", "--batch.accumulate", "4"]
    for samples in ("47", "33"):
        args = ("--task.args.samples", samples, "--overwrite")
        assert cli.main([*one, *args]) == 0
        done = start(folder, "two", "--fabric.devices", "2", *args)
        assert done.returncode == 0, done.stderr
        a, b = (load(folder / "runs" / name / "checkpoints" / "last.pt") for name in ("one", "two"))
        assert a["counters"]["samples"] == b["counters"]["samples"] == 2 * int(samples)
        assert a["counters"]["step"] == b["counters"]["step"]
        for tree in ("model", "ema"):
            for name in a[tree]:
                torch.testing.assert_close(a[tree][name], b[tree][name], rtol=1e-10, atol=1e-10)
        for name, moments in a["optimizer"]["state"].items():
            torch.testing.assert_close(moments, b["optimizer"]["state"][name], rtol=1e-10, atol=1e-10)
        for epoch_a, epoch_b in zip(*(s["states"]["history"]["epochs"] for s in (a, b)), strict=True):
            assert epoch_a == pytest.approx(epoch_b, rel=1e-10)
        for row_a, row_b in zip(*(s["states"]["history"]["evaluations"] for s in (a, b)), strict=True):
            del row_a["seconds"], row_b["seconds"]
            assert row_a == pytest.approx(row_b, rel=1e-10)


def test_saved_on_two_ranks_resumed_on_one(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = start(folder, "two", "--fabric.devices", "2", "--run.max_steps", "4")
    assert done.returncode == 0, done.stderr
    assert start(folder, "whole", "--fabric.devices", "2").returncode == 0
    assert cli.main(["--config", "toy.yaml", "--name", "two", "--resume", "auto"]) == 0
    a, b = (load(folder / "runs" / name / "checkpoints" / "last.pt") for name in ("whole", "two"))
    assert b["batch"] == {"micro_batch_size": 4, "accumulate": 4, "world_size": 1, "epoch_samples": 47}
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-10, atol=1e-10)


def test_wrong_input_under_fabric_run_is_still_one_line(folder):
    fabric = str(Path(sys.executable).parent / "fabric")
    done = start(folder, "x", "--fabric.devices", "3", launcher=(fabric, "run", "--accelerator=cpu", "--devices=2"))
    assert done.returncode != 0
    assert "error: fabric.devices is 3 and the launcher started 2 processes" in done.stderr
