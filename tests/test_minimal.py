"""Without wandb, torch-optimizer and every extra, all that does not use them runs; what does, names what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

OPTIONAL = ("wandb", "torch_optimizer", "accelerate", "hypothesis", "pytest", "ruff", "mypy", "timm", "torchvision")

# put on the Python path as sitecustomize: the packages are as good as not installed
BLOCK = f"""
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def train(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "FABRIC_TRAINER_DATA": str(tmp_path / "data")}
    command = [
        sys.executable,
        "train.py",
        "--config",
        "configs/burgers_tiny.yaml",
        "--run.root",
        str(tmp_path / "runs"),
    ]
    return subprocess.run([*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_run_needs_none_of_them(tmp_path):
    done = train(tmp_path, "--name", "a")
    assert done.returncode == 0, done.stderr
    assert "val/nrmse " in done.stdout
    assert (tmp_path / "runs" / "a" / "report.html").exists()


def test_what_needs_one_says_which(tmp_path):
    done = train(tmp_path, "--loggers.wandb", "{project: x}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install wandb" in done.stderr
    done = train(tmp_path, "--optim.name", "lamb")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install torch-optimizer" in done.stderr
