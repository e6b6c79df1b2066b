"""configs/physics_pipeline.yaml: what each stage is better at than what it starts from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from fabric_trainer.history import read_history
from tools.pipeline_file import STAGES, examine, read

FILE = REPOSITORY / "configs" / "physics_pipeline.yaml"


def test_the_file_is_small_and_could_be_run():
    _, stages = read(FILE, None)
    assert tuple(stage.name for stage in stages) == STAGES and examine(stages) == {}
    for stage in stages:
        assert stage.config.run.max_epochs == 1 and stage.config.run.max_steps is None
        assert sum(stage.config.task.args["samples"].values()) <= 64


@pytest.mark.slow
@pytest.mark.distributed
def test_every_stage_in_one_epoch(tmp_path):
    environment = os.environ | {"FABRIC_TRAINER_DATA": str(tmp_path / "data"), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tools.pipeline", "--config", str(FILE)]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    print("", *done.stdout.splitlines()[-6:], f"{seconds:.0f} s in all, data and start-up included", sep="\n")

    operator, residual, distill, prior = (_figures(tmp_path, stage) for stage in STAGES[:-1])
    assert operator("nrmse") < operator("nrmse_persistence")
    assert operator("nrmse_physical") < operator("nrmse_physical_persistence")
    assert residual("nrmse") < residual("nrmse_operator") == pytest.approx(operator("nrmse"), rel=1e-5)
    assert residual("nrmse_physical") < residual("nrmse_physical_operator")
    assert distill("nrmse") < 1.005 * distill("nrmse_teacher"), "one call of the student, several of the teacher"
    assert distill("nrmse") < residual("nrmse") and distill("drift") > 0.05
    assert prior("nrmse") < prior("nrmse_persistence"), "nearer the last state than the state that it is given"

    found = json.loads((tmp_path / "runs/physics/evaluation/metrics.json").read_text())
    assert found["checkpoint"] == "runs/physics/steady_prior/checkpoints/best.pt" and found["split"] == "test"
    assert found["metrics"]["test_ema/nrmse"] < found["metrics"]["test_ema/nrmse_persistence"]
    assert "<img" in (tmp_path / "runs/physics/evaluation/report.html").read_text()
    status = json.loads((tmp_path / "runs/physics/stage_status.json").read_text())["stages"]
    assert {entry["status"] for entry in status.values()} == {"completed"}


def _figures(folder: Path, stage: str) -> Callable[[str], float]:
    """Of the averaged weights that the stage hands over, on the val split."""
    monitor = yaml.safe_load((folder / f"runs/physics/{stage}.yaml").read_text())["checkpoint"]["monitor"]
    best = read_history(folder / "runs/physics" / stage).best(monitor, "min")
    assert best is not None and monitor.startswith("val_ema/")
    return lambda name: best[f"val_ema/{name}"]
