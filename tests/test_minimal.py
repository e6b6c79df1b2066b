"""Without wandb, torch-optimizer and every extra, all that does not use them runs; what does, names what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

OPTIONAL = ("wandb", "torch_optimizer", "accelerate", "hypothesis", "pytest", "_pytest", "ruff", "mypy", "mypyc")
OPTIONAL += ("onnx", "onnxruntime", "onnxscript", "safetensors", "optuna", "mlflow")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed packages but for the optional ones: a folder of links to them."""
    site, links = Path(torch.__file__).parent.parent, tmp_path_factory.mktemp("site")
    for entry in site.iterdir():
        name = entry.name.lower().replace("-", "_").partition(".")[0]
        if not any(name == package or name.startswith(f"{package}_") for package in OPTIONAL):
            (links / entry.name).symlink_to(entry)
    assert not (links / "wandb").exists() and (links / "torch").exists()
    return links


def train(without: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(without), "FABRIC_TRAINER_DATA": str(tmp_path / "data")}
    # -S: without the interpreter's own site-packages
    command = [sys.executable, "-S", "train.py", "--config", "configs/burgers_tiny.yaml"]
    command += ["--run.root", str(tmp_path / "runs"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_run_needs_none_of_them(without, tmp_path):
    done = train(without, tmp_path, "--name", "a")
    assert done.returncode == 0, done.stderr
    assert "val/nrmse " in done.stdout
    assert (tmp_path / "runs" / "a" / "report.html").exists()


def test_what_needs_one_says_which(without, tmp_path):
    done = train(without, tmp_path, "--loggers.wandb", "{project: x}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install wandb" in done.stderr
    done = train(without, tmp_path, "--optim.name", "lamb")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install torch-optimizer" in done.stderr
