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
from lightning.fabric import Fabric
from toys import config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import MuonConfig, OptimConfig
from fabric_trainer.curves import read_metrics
from fabric_trainer.optim import build_optimizer
from fabric_trainer.order import Rows
from fabric_trainer.window import MicroBatches, cut
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


@pytest.mark.parametrize("rows", [1, 5])
def test_the_gradient_of_a_batch_is_that_of_its_pieces(root, rows):
    """Of two tasks on different grids, some of whose rows only pad: what accumulation and a split rely on."""
    more = {"tasks": ["burgers1d", "darcy2d"], "made": STAGE["made"] | {"darcy2d": {"nx": 8}}}
    task = made(root, **more, encoder=ENCODER | {"margin": 1}, physical_weight=1.0, spectral_weight=0.05)
    torch.manual_seed(0)
    network = task.network()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    first = task.dataset("train").sizes[0]
    index, weight = np.array([0, first, 7, 11, first + 3, 20, 5, first + 1]), np.ones(8, np.float32)
    weight[[2, 4]] = 0
    batch = MicroBatches(task, task.dataset("train"), 0, training=True)[Rows(0, index, weight)]

    def gradient(batches: list[dict[str, Any]]) -> torch.Tensor:
        network.zero_grad()
        for each in batches:
            (task.loss(network, each).total / 6).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])

    whole = gradient([batch])
    torch.testing.assert_close(gradient(cut(batch, rows)), whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


# ---- a run's files and precision ----------------------------------------------------------------------------------


def test_files_are_named_by_their_metric_and_the_best_three_are_kept(fabric, root, tmp_path):
    settings = config(
        **{
            "run.max_epochs": 7,
            "batch.micro_batch_size": 16,
            "optim.lr": 0.02,
            "checkpoint.name": "operator-epoch={epoch:02d}-val_nrmse={val/nrmse:.4f}",
            "checkpoint.monitor": "val/nrmse",
            "checkpoint.top_k": 3,
            "checkpoint.keep_last": 1,
        }
    )
    fit(fabric, made(root), settings, tmp_path)
    evaluations = json.loads((tmp_path / "history.json").read_text())["evaluations"]
    values = [evaluation["val/nrmse"] for evaluation in evaluations]
    assert len(set(values)) == 7
    files = {path.name for path in (tmp_path / "checkpoints").glob("operator-*.pt")}
    kept = sorted(range(7), key=values.__getitem__)[:3]
    assert files == {f"operator-epoch={epoch + 1:02d}-val_nrmse={values[epoch]:.4f}.pt" for epoch in {*kept, 6}}
    best = (tmp_path / "checkpoints" / "best.pt").resolve().name
    assert float(best.removesuffix(".pt").rpartition("=")[2]) == round(min(values), 4)


def test_bf16_is_within_two_percent(root):
    """The validation loss that forty updates leave, in units of the change."""
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        fabric.launch()
        settings = config(**{"run.max_epochs": None, "run.max_steps": 40, "batch.micro_batch_size": 8})
        state = fit(fabric, made(root, reach=5.0, decoder_weight=0.0), settings)
        found[precision] = state.history.evaluations[-1]
        assert found[precision]["val/nrmse_ratio"] < 1, "it learns"
    full, half = (found[precision]["val/loss"] for precision in ("32-true", "bf16-mixed"))
    assert half == pytest.approx(full, rel=0.02) and half != full


# ---- Muon ---------------------------------------------------------------------------------------------------------


def test_muon_has_the_operators_hidden_matrices_and_its_updates_are_near_orthogonal(root):
    task = made(root, operator={"architecture": "pdet_stack", "core": {"hidden_dim": 32, "depth": 2, "num_heads": 2}})
    network = task.network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    muon = MuonConfig(lr=1.0, weight_decay=0.0, adjust_lr_fn="original")
    chosen = OptimConfig(name="muon_hybrid", lr=1e-3, weight_decay=0.0, muon=muon)
    optimizer = build_optimizer(network, chosen, "cpu", blocks=task.blocks(network))
    named = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    groups = [[named[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(named.values()), "each in exactly one group"
    (matrices,) = [group for own, group in zip(optimizer.param_groups, groups, strict=True) if own["name"] == "muon"]
    assert all(name.startswith("operator.core.layers.") and before[name].ndim == 2 for name in matrices)
    assert len(matrices) == 2 * 4  # qkv, proj and two of the feed-forward net
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()
    for name, p in network.named_parameters():
        if name in matrices:
            rows, columns = p.shape
            moved = (p.detach() - before[name]) / max(1, rows / columns) ** 0.5
            singular = torch.linalg.svdvals(moved)
            assert singular.min() > 0.6 and singular.max() < 1.25, f"{name}: {singular.min():.3f}, {singular.max():.3f}"
