"""The histograms of a run on two ranks, and of a compiled one, are those of the plain one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY
from test_wandb_logger import Sent, sessions

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONFIG = {
    "task": {"path": "toys.Regression"},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optim": {"name": "sgd", "lr": 0.05},
    "clip": {"norm": 0.5},
    "run": {"max_epochs": 1, "log_every_n_steps": 3},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False, "wandb": {"mode": "offline", "watch": "all"}},
}
TWO = ("--fabric.devices", "2", "--fabric.strategy", "ddp")
COMPILED = ("--compile.scope", "whole", "--compile.backend", "aot_eager", "--compile.require", "true")


def sent(folder: Path, name: str, *arguments: str) -> Sent:
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", "toy.yaml", "--name", name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests"), "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_SERVICE", None)  # that of a test in this process
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (found,) = sessions(folder / "runs" / name)
    return found


def test_two_ranks_and_a_compiled_network_show_the_same_gradients(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    plain = sent(tmp_path, "plain")
    for other in (sent(tmp_path, "two", *TWO), sent(tmp_path, "compiled", *COMPILED)):
        assert len(other.rows) == len(plain.rows) == 7
        for mine, theirs in zip(plain.rows, other.rows, strict=True):
            drawn = {name: value for name, value in mine.items() if isinstance(value, dict)}
            assert len(drawn) == (0 if mine["_step"] % 3 else 8) and drawn.keys() <= theirs.keys()
            for name, value in drawn.items():
                assert theirs[name]["bins"] == pytest.approx(value["bins"], rel=1e-4, abs=1e-6), name
                moved = np.abs(np.subtract(theirs[name]["values"], value["values"])).sum()
                assert moved <= 2, name  # an element within a rounding of an edge
