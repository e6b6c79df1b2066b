"""What rollouts are measured by: against sums by hand, closed forms, and however the split is cut."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fabric_trainer.cli import main
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluate
from models.physics import rollouts
from models.physics.evaluation import EvaluationNetwork, EvaluationStage
from models.physics.rollout_pictures import edges
from models.physics.rollouts import Trajectories

MIXED: dict[str, Any] = {
    "tasks": ["burgers1d", "reaction_diffusion2d", "darcy2d"],
    "made": {
        "burgers1d": {"nu": 0.01, "nx": 32, "frames": 9},
        "reaction_diffusion2d": {"nx": 8, "frames": 7},
        "darcy2d": {"nx": 8},
    },
    "samples": {"train": 6, "val": 4, "test": 5},
    "time_stride": 2,
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
}


def one(task: str) -> dict[str, Any]:
    return MIXED | {"tasks": [task], "made": {task: MIXED["made"][task]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def prepared(root, settings: dict[str, Any], **more: Any) -> tuple[EvaluationStage, EvaluationNetwork]:
    """With an operator that does something."""
    stage = EvaluationStage(**settings | more)
    stage.prepare(root)
    torch.manual_seed(0)
    network = stage.network().eval()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.05)
    return stage, network


def measured(fabric, stage: EvaluationStage, network: EvaluationNetwork, size: int = 2) -> dict[str, Any]:
    return evaluate(fabric, stage, network, Split(fabric, stage, stage.dataset("test"), size))


@torch.no_grad()
def by_hand(
    stage: EvaluationStage, network: EvaluationNetwork, task: int, space: str, difference: bool
) -> dict[str, Tensor]:
    """Sums over trajectories and points, a trajectory and a step at a time."""
    u = stage.sets["test"][task].tensor()[:, :: 1 if stage.grids[task].steady else stage.stride]
    steps, steady = u.shape[1] - 1, stage.grids[task].steady
    sums = {
        name: torch.zeros(steps) for name in ("truth", "model", "persistence", "linear", "one", "one_floor", "z", "dz")
    }

    def told(u0: Tensor, z0: Tensor, z1: Tensor) -> Tensor:
        return network.advance(u0, z0, z1, task) if difference else network.decode(z1, task)

    for trajectory in u:
        first = trajectory[:1]
        z0 = z = network.encode(first, task)
        field = stencil = first
        for k in range(steps):
            before, after = trajectory[k : k + 1], trajectory[k + 1 : k + 2]
            if space == "field":
                z = network.encode(field, task)
                field = told(field, z, network.step(z, task))
            else:
                z = network.step(z, task)
                field = told(first, z0, z)
            stencil = network.linear[task](stencil)
            true0, true1 = network.encode(before, task), network.encode(after, task, frame=1)
            one = told(before, true0, network.step(true0, task))
            still = stage.normalisers[task].mean[1][:, None, None] if steady else first
            values = {
                "truth": after,
                "model": field - after,
                "persistence": still - after,
                "linear": stencil - after,
                "one": one - after,
                "one_floor": told(before, true0, true1) - after,
                "z": true1,
                "dz": network.step(true0, task) - true1,
            }
            for name, value in values.items():
                sums[name][k] += value.pow(2).sum()
    return sums


@pytest.mark.parametrize("space, difference", [("latent", True), ("field", True), ("latent", False), ("field", False)])
def test_figures_are_those_of_sums_by_hand(root, fabric, space, difference):
    stage, network = prepared(
        root, MIXED, space=space, difference=difference, val_every=3
    )  # of pairs: trajectories all count
    found = measured(fabric, stage, network)
    for number, task in enumerate(stage.grids):
        sums = by_hand(stage, network, number, space, difference)
        expected = {
            "rollout_nrmse/steps": (sums["model"] / sums["truth"]).sqrt(),
            "rollout_nrmse_persistence/steps": (sums["persistence"] / sums["truth"]).sqrt(),
            "rollout_nrmse_linear/steps": (sums["linear"] / sums["truth"]).sqrt(),
            "nrmse_physical": (sums["one"].sum() / sums["truth"].sum()).sqrt(),
            "nrmse_physical_floor": (sums["one_floor"].sum() / sums["truth"].sum()).sqrt(),
            "nrmse": (sums["dz"].sum() / sums["z"].sum()).sqrt(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[f"{task.name}/{name}"], value.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
        assert found[f"{task.name}/rollout_nrmse"] == found[f"{task.name}/rollout_nrmse/steps"][-1]
    names = [grid.name for grid in stage.grids]
    assert found["rollout_nrmse"] == pytest.approx(np.mean([found[f"{name}/rollout_nrmse"] for name in names]))


def test_a_rollouts_first_step_is_a_single_step(root, fabric):
    stage, network = prepared(root, one("burgers1d"), rollout_steps=1)
    found = measured(fabric, stage, network)
    for kind in ("", "_persistence", "_linear", "_floor"):
        assert found[f"rollout_nrmse{kind}/steps"].shape == (1,)
        assert found[f"rollout_nrmse{kind}"] == pytest.approx(found[f"nrmse_physical{kind}"], rel=1e-5)


def test_two_ranks_of_which_one_lacks_a_task_are_as_one(root, fabric, monkeypatch):
    """Ranks by hand: their sums have the same names in the same order, and add up to those of one process."""
    stage, network = prepared(root, MIXED)
    expected = measured(fabric, stage, network, 4)
    monkeypatch.setattr(stage, "figures", lambda sums: sums)
    whole, parts = measured(fabric, stage, network, 4), []
    for number in range(2):
        own = SimpleNamespace(world_size=2, global_rank=number, device=torch.device("cpu"), strategy=None)
        split = Split(own, stage, stage.dataset("test"), 2)
        split.ranks = split.ranks._replace(size=1)
        parts.append(evaluate(own, stage, network, split))
    assert list(parts[0]) == list(parts[1]) == list(whole)
    assert min(part["burgers1d/weight"] for part in parts) > 0
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-5, atol=1e-9, err_msg=name)
    monkeypatch.undo()
    assert all(math.isfinite(value) for value in expected.values() if isinstance(value, float))


def test_a_batch_without_a_task_has_its_sums_and_they_are_zero(root):
    stage, network = prepared(root, MIXED)
    batch = stage.preprocess(stage.dataset("test").__getitems__([0, 1]) | {"weight": torch.ones(2)})
    sums = network(batch)
    absent = {name: value for name, value in sums.items() if not name.startswith("burgers1d/")}
    assert len(absent) == 2 * (len(sums) // 3) and not any(value.any() for value in absent.values())


def test_a_rollout_that_blows_up_counts_as_infinite(root, fabric):
    stage, network = prepared(root, one("burgers1d"))
    torch.nn.init.constant_(network.operator.output_norm.weight, 1e20)
    found = measured(fabric, stage, network)
    assert found["rollout_nrmse"] == math.inf and math.isfinite(found["rollout_nrmse_linear"])
    assert found["time_accurate"] == 0


def test_steady_tasks_have_one_step_and_the_mean_solution(root, fabric):
    stage, network = prepared(root, one("darcy2d"), rollout_steps=50)
    found = measured(fabric, stage, network)
    train, test = (stage.sets[split][0].tensor().double() for split in ("train", "test"))
    error = test[:, 1] - train[:, 1].mean()
    expected = (error.pow(2).sum() / test[:, 1].pow(2).sum()).sqrt().item()
    assert found["nrmse_physical_persistence"] == pytest.approx(expected, rel=1e-5)
    assert found["rollout_nrmse/steps"].shape == (1,)


def test_trajectories_start_where_they_have_room():
    u = torch.arange(2 * 11.0).reshape(2, 11, 1, 1, 1)
    some = Trajectories(u, steps=2, time_stride=2, starts=3)
    assert len(some) == 6
    frames = some.__getitems__(list(range(6)))["u"].flatten(1)
    assert frames[:, 0].tolist() == [0, 4, 6, 11, 15, 17]
    assert (frames.diff(dim=1) == 2).all()
    assert Trajectories(u, steps=50, time_stride=2).steps == 5 and len(Trajectories(u, 50, 2, starts=4)) == 2
    assert Trajectories(u[:, :2], 50, time_stride=3, steady=True)[0]["u"].flatten().tolist() == [0, 1]
    with pytest.raises(InputError, match="no step"):
        Trajectories(u, 5, time_stride=11)


@pytest.mark.parametrize("shape", [(2, 1, 1, 16), (2, 3, 1, 15), (2, 2, 8, 8), (2, 1, 6, 9)])
@pytest.mark.parametrize("periodic", [True, False])
def test_spectra_add_up_to_the_mean_square(shape, periodic):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rollouts.spectrum(u, periodic).sum(1), u.pow(2).mean((1, 2, 3)))


def test_spectra_have_waves_where_they_are():
    x = (torch.arange(32) + 0.5) / 32
    waves = torch.cos(2 * math.pi * 3 * x)[None, None, None]
    assert rollouts.spectrum(waves).argmax() == 3 and rollouts.wavenumbers(17, True)[3] == 3
    torch.testing.assert_close(rollouts.spectrum(waves)[0, 3], torch.tensor(0.5))
    diagonal = torch.cos(2 * math.pi * (3 * x[:, None] + 4 * x))[None, None]
    assert rollouts.spectrum(diagonal).argmax() == 5
    half = torch.cos(math.pi * 3 * x)[None, None, None]  # a wave and a half between walls
    assert rollouts.spectrum(half, periodic=False).argmax() == 3 and rollouts.wavenumbers(4, False)[3] == 1.5


def test_correlation_and_the_time_it_is_lost():
    x = torch.arange(64) / 64
    truth = torch.sin(2 * math.pi * x)[None, None, None]
    angle = torch.tensor([0.0, 0.3, 0.6, 0.7, 1.2])
    moved = torch.sin(2 * math.pi * x + angle[:, None])[:, None, None]
    found = rollouts.correlation(3 * moved + 5, truth.expand_as(moved))
    torch.testing.assert_close(found, angle.cos(), rtol=1e-4, atol=1e-5)
    good = (found >= rollouts.CORRELATED)[None]  # cos 0.6 = 0.83, cos 0.7 = 0.76
    assert rollouts.leading(good).tolist() == [3]
    assert rollouts.leading(torch.tensor([[True, False, True], [False, True, True], [True] * 3])).tolist() == [1, 0, 3]
    assert not (rollouts.correlation(truth * math.nan, truth) >= rollouts.CORRELATED)


def test_pictures(root):
    import matplotlib.pyplot as plt

    stage, network = prepared(root, MIXED)
    figures = stage.pictures(network, torch.device("cpu"))
    kinds = ("burgers1d, test: 4 steps", "burgers1d, test: error", "reaction_diffusion2d, test: 3 steps")
    for kind in (*kinds, "reaction_diffusion2d, test: error", "darcy2d, test: the solutions of 4"):
        assert any(title.startswith(kind) for title in figures), (kind, list(figures))
    plt.close("all")
    assert edges(np.array([-0.75, -0.25, 0.25, 0.75])) == (-1.0, 1.0)


def test_the_command_measures_a_stages_checkpoint(root, tmp_path, monkeypatch, capsys):
    """An operator's checkpoint by its evaluation: same names, strictly; training with it is refused."""
    import yaml

    monkeypatch.chdir(tmp_path)
    config = {
        "task": {"path": "models.physics.operator_stage.OperatorStage", "args": one("burgers1d") | {"queries": 8}},
        "run": {"max_steps": 2},
        "batch": {"micro_batch_size": 4},
        "data": {"root": str(root)},
        "fabric": {"accelerator": "cpu", "devices": 1},
        "name": "small",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", "train.yaml"]) == 0
    config["task"] = {"path": "models.physics.evaluation.EvaluationStage", "args": one("burgers1d")}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config | {"name": None}))
    capsys.readouterr()
    command = ["--config", "evaluate.yaml", "--evaluate", "runs/small/checkpoints/last.pt", "--split", "test"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "test/rollout_nrmse_linear " in printed and "/steps" not in printed
    assert main(["--config", "evaluate.yaml"]) == 2
    assert "--evaluate FILE" in capsys.readouterr().err
