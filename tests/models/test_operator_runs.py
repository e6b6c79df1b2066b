"""Runs of the operator stage: bit-equal to a plain loop, however cut; the files they leave; lower precision."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.curves import read_metrics
from models.physics.operator_stage import OperatorStage

ENCODER = {"tokens": 8, "dim": 8, "patch": 2, "margin": 2, "frequencies": [1, 2]}
CORE = {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}
DECODER = {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16}
STAGE: dict[str, Any] = {
    "tasks": ["burgers1d"],
    "made": {"burgers1d": {"nu": 0.01, "nx": 32, "frames": 10}},
    "samples": {"train": 6, "val": 3},
    "encoder": ENCODER,
    "operator": {"core": CORE},
    "decoder": DECODER,
    "queries": 8,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def made(root: Path, **more: Any) -> OperatorStage:
    task = OperatorStage(**STAGE | more)
    task.prepare(root)
    return task


# ---- the same updates ---------------------------------------------------------------------------------------------


def test_ten_updates_are_bit_equal_to_a_loop_without_this_library(fabric, root, tmp_path):
    """Forward, spectral, rollout and decoder losses; micro-batches of 3 x 4 with a ragged last window, clipping, decay
    for matrices alone, cosine and an average."""
    losses = {"spectral_weight": 0.05, "rollout_weight": 0.5, "rollout_horizon": 3, "time_stride": 1}
    task = made(root, **losses)
    torch.manual_seed(0)  # the run seeds for itself
    settings = config(
        **{
            "batch.accumulate": 3,
            "optim.lr": 3e-3,
            "optim.weight_decay": 0.05,
            "clip.norm": 0.5,
            "schedule.name": "cosine",
            "ema.decay": 0.95,
            "run.max_epochs": None,
            "run.max_steps": 10,
        }
    )
    fit(fabric, task, settings, tmp_path / "run")
    given = losses | {"seed": 42, "micro": 4, "accumulate": 3, "steps": 10, "lr": 3e-3, "weight_decay": 0.05}
    given |= {"clip": 0.5, "ema": 0.95, "dt": 0.1, "dim": 8, "core": CORE, "decoder": DECODER, "queries": 8}
    given["encoder"] = ENCODER | {"patch": (1, 2), "margin": (0, 2)}
    source = root / "burgers1d" / task.sources[0].generated("train").file_name
    script = Path(__file__).parent / "plain_operator.py"
    command = [sys.executable, str(script), str(source), str(tmp_path / "plain.pt"), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)

    saved = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["counters"]["step"] == 10 and saved["counters"]["samples"] == 12 * 10 - 2 * 6, "two were ragged"
    start = task.network().state_dict()
    for tree in ("model", "ema"):
        learnt = {name: value for name, value in saved[tree].items() if name.startswith(("operator.", "decoder."))}
        assert learnt.keys() == plain[tree].keys() if tree == "ema" else learnt.keys() >= plain[tree].keys()
        for name, expected in plain[tree].items():
            assert torch.equal(learnt[name], expected), f"{tree} {name}"
    for name, value in plain["ema"].items():
        assert not torch.equal(value, plain["model"][name]), f"{name} was not averaged"
        assert not torch.equal(plain["model"][name], start[name]) or not value.any(), f"{name} has not moved"
    logged = read_metrics(tmp_path / "run" / "metrics.csv")
    seen = ~np.isnan(logged["train/loss"])
    assert logged["train/loss"][seen].tolist() == plain["losses"]
    assert logged["grad_norm"][seen].tolist() == plain["norms"] and max(plain["norms"]) > 0.5, "clipping bites"
