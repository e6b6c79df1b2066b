"""The real ``fabric run``: each of its flags beside the configuration's key. The whole product is in test_launch.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

pytestmark = pytest.mark.distributed

CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 30}},
    "batch": {"micro_batch_size": 4},
    "run": {"max_epochs": 1},
    "loggers": {"tensorboard": False},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def launch(folder: Path, flags: str, keys: str) -> subprocess.CompletedProcess:
    fabric = str(Path(sys.executable).parent / "fabric")
    train = [str(REPOSITORY / "train.py"), "--config", str(folder / "toy.yaml"), "--fast_dev_run"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "SLURM_"))}
    environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [fabric, "run", *flags.split(), *train, *keys.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


CPU = "--fabric.accelerator=cpu"
ACCEPTED = {  # (launcher's flags, configuration's keys, what the summary says)
    "strategy": ("--strategy=ddp --devices=2", f"{CPU} --fabric.strategy=ddp", "x 2 ranks"),
    "strategy, by a name of its own": ("--strategy=ddp_find_unused_parameters_true", CPU, "x 1 rank"),
    "strategy, fsdp": ("--strategy=fsdp --devices=2", CPU, "x 2 ranks"),
    "precision": ("--precision=bf16", f"{CPU} --fabric.precision=bf16-mixed", "x 1 rank"),
    "accelerator": ("--accelerator=cpu", "", "x 1 rank"),
    "devices": ("--devices=2", f"{CPU} --fabric.devices=2", "x 2 ranks"),
    "num_nodes": ("--num-nodes=1", f"{CPU} --fabric.num_nodes=1", "x 1 rank"),
}
FAST = ("refused devices",)  # of each the launcher takes ten seconds; test_launching.py has an accepted one


def marked(cases: dict[str, Any], what: str) -> list[Any]:
    return [pytest.param(key, marks=[] if f"{what} {key}" in FAST else pytest.mark.slow) for key in cases]


@pytest.mark.parametrize("which", marked(ACCEPTED, "accepted"))
def test_flags_that_meet_the_configuration(folder, which):
    flags, keys, says = ACCEPTED[which]
    done = launch(folder, flags, keys)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and "val/loss" in done.stdout


REFUSED = {
    "strategy": (
        "--strategy=fsdp",
        f"{CPU} --fabric.strategy=ddp",
        "fabric.strategy is ddp, the launcher's --strategy is fsdp: give one, or make them equal",
    ),
    "strategy, dp": ("--strategy=dp", CPU, "the launcher's --strategy must be one of"),
    "strategy, stage": (
        "--strategy=deepspeed_stage_3",
        f"{CPU} --fabric.strategy=deepspeed",
        "fabric.stage is 2, the launcher's --strategy is deepspeed_stage_3: give one, or make them equal",
    ),
    "precision": (
        "--precision=64",
        f"{CPU} --fabric.precision=bf16",
        "fabric.precision is bf16, the launcher's --precision is 64: give one, or make them equal",
    ),
    "accelerator": (
        "--accelerator=cpu",
        "--fabric.accelerator=cuda",
        "fabric.accelerator is cuda, the launcher's --accelerator is cpu: give one, or make them equal",
    ),
    "devices": (
        "--devices=2",
        f"{CPU} --fabric.devices=3",
        "fabric.devices is 3 and the launcher started 2 processes: leave it at auto, or make them equal",
    ),
    "num_nodes": ("--num-nodes=1", f"{CPU} --fabric.num_nodes=3", "fabric.num_nodes is 3 and the launcher started 1"),
}


@pytest.mark.parametrize("which", marked(REFUSED, "refused"))
def test_flags_that_contradict_the_configuration(folder, which):
    """``fabric run`` reports every failed process as 1; the line, and the 2 in its table, are ours."""
    flags, keys, says = REFUSED[which]
    done = launch(folder, flags, keys)
    assert done.returncode == 1
    assert any(line.startswith("error: ") and says in line for line in done.stderr.splitlines()), done.stderr
    assert "exitcode  : 2" in done.stderr
    assert 'train.py", line' not in done.stderr, "a traceback of ours"
