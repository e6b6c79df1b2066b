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


# two commands in one process
BOTH = """
import sys
from fabric_trainer import cli
print([cli.main(["--config", "configs/burgers_tiny.yaml", "--run.root", sys.argv[1], *command]) for command in
       (["--loggers.wandb", "{project: x}"], ["--optim.name", "lamb"])])
"""


def python(without: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(without), "FABRIC_TRAINER_DATA": str(tmp_path / "data")}
    # -S: without the interpreter's own site-packages
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_run_needs_none_of_them(without, tmp_path):
    where = ("--config", "configs/burgers_tiny.yaml", "--run.root", str(tmp_path / "runs"), "--name", "a")
    done = python(without, tmp_path, "train.py", *where)
    assert done.returncode == 0, done.stderr
    assert "val/nrmse " in done.stdout
    assert (tmp_path / "runs" / "a" / "report.html").exists()


def test_what_needs_one_says_which(without, tmp_path):
    done = python(without, tmp_path, "-c", BOTH, str(tmp_path / "runs"))
    assert done.stdout.splitlines()[-1] == "[2, 2]", done.stderr
    wandb, lamb = done.stderr.splitlines()
    assert "pip install wandb" in wandb and "pip install torch-optimizer" in lamb
