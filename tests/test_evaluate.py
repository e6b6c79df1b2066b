"""Metrics over a split are those of one pass over all of it, however it is cut."""

from __future__ import annotations

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.regression import MeanSquaredError
from toys import Points, Regression

from fabric_trainer.checkpoint import load
from fabric_trainer.cli import main
from fabric_trainer.evaluate import Split, evaluate, evaluating

NAMES = ("error", "ratio", "parts")


class Double(Regression):
    """In float64; it gives its sums: squared errors, large errors and the weight."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(len(weights), batch_norm=True)
        self.points = Points(len(weights), 3, weights)
        self.points.x, self.points.y = self.points.x.double(), self.points.y.double()

    def evaluate(self, network: nn.Module, batch: dict, meters: dict) -> dict[str, Tensor]:
        error = (network(batch["x"]) - batch["y"]).square().sum(1)
        large = (error > 1).double()
        return {
            "error": (error * batch["weight"]).sum(),
            "large": (large * batch["weight"]).sum(),
            "weight": batch["weight"].sum(),
        }

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return sums  # of one rank; its share of the split may weigh nothing


def rank(number: int, world_size: int) -> SimpleNamespace:
    """One of several ranks whose sums are added up by hand."""
    return SimpleNamespace(world_size=world_size, global_rank=number, device=torch.device("cpu"), strategy=None)


def alone(split: Split) -> Split:
    """The same share of the data, with nobody to add its sums to."""
    split.ranks = split.ranks._replace(size=1)
    return split


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=40),
    micro=st.integers(1, 11),
    ranks=st.integers(1, 5),
)
def test_sums_over_ragged_batches_and_ranks_are_those_of_one_pass(weights, micro, ranks):
    weights = torch.tensor(weights, dtype=torch.float64)
    task = Double(weights)
    torch.manual_seed(0)
    network = task.network().double()
    worlds = [rank(number, ranks) for number in range(ranks)]
    parts = [evaluate(r, task, network, alone(Split(r, task, task.points, micro))) for r in worlds]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    with torch.no_grad():
        error = (network.eval()(task.points.x) - task.points.y).square().sum(1)
    expected = {
        "error": (error * weights).sum().item(),
        "large": weights[error > 1].sum().item(),
        "weight": weights.sum().item(),
    }
    assert total == pytest.approx(expected, rel=1e-12)


def test_float32_losses_are_added_up_in_float64(fabric):
    class Large(Regression):
        def evaluate(self, network, batch, meters):
            return {"sum": batch["x"].new_tensor(2.0**24 if int(batch["index"][0]) == 0 else 1.0)}

        def figures(self, sums):
            return sums

    task = Large()
    assert evaluate(fabric, task, task.network(), Split(fabric, task, Points(9, 0), 1)) == {"sum": 2.0**24 + 8}


def test_the_default_figures_are_means_over_the_weight(fabric):
    task, points = Regression(), Points(23, 1)
    torch.manual_seed(0)
    network = task.network()
    metrics = evaluate(fabric, task, network, Split(fabric, task, points, 5))
    with torch.no_grad():
        error = (network.eval()(points.x) - points.y).square().sum(1).double()
    assert metrics == pytest.approx({"loss": error.mean().item(), "abs": error.sqrt().mean().item()}, rel=1e-6)


class Metered(Regression):
    def meters(self):
        return {"mse": MeanSquaredError(), "accuracy": BinaryAccuracy()}

    def evaluate(self, network, batch, meters):
        predicted = network(batch["x"])
        meters["mse"].update(predicted[:, 0], batch["y"][:, 0])
        meters["accuracy"].update((predicted[:, 1] > 0).int(), (batch["y"][:, 1] > 0).int())
        return {"weight": batch["weight"].sum()}


def test_meters_are_fresh_at_every_pass_and_equal_a_computation_by_hand(fabric):
    task, points = Metered(), Points(23, 1)
    torch.manual_seed(0)
    network = task.network()
    split = Split(fabric, task, points, 5)
    with torch.no_grad():
        predicted = network(points.x)
    hits = sum((p > 0) == (t > 0) for p, t in zip(predicted[:, 1].tolist(), points.y[:, 1].tolist(), strict=True))
    squares = [(p - t) ** 2 for p, t in zip(predicted[:, 0].tolist(), points.y[:, 0].tolist(), strict=True)]
    expected = {"mse": sum(squares) / 23, "accuracy": hits / 23}
    assert 0 < hits < 23
    for _ in range(2):
        assert evaluate(fabric, task, network, split) == pytest.approx(expected, rel=1e-5)


def test_modes_are_as_before_also_after_an_error():
    network = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.Dropout())
    network.train()
    network[1].eval()  # a frozen part
    before = [module.training for module in network.modules()]
    assert True in before and False in before
    with pytest.raises(RuntimeError, match="inside"), evaluating(network):
        assert not any(module.training for module in network.modules())
        raise RuntimeError("inside")
    assert [module.training for module in network.modules()] == before


class Spy(Regression):
    """Keeps what its evaluation saw."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5, batch_norm=True)
        self.seen: list[dict] = []

    def evaluate(self, network, batch, meters):
        output = network(batch["x"])
        self.seen.append(
            {
                "random": batch["random"].uniform("noise", 3),
                "torch": torch.rand(2),
                "index": batch["index"],
                "graph": torch.tensor(output.requires_grad or torch.is_grad_enabled()),
            }
        )
        return {"loss": output.square().sum(), "weight": batch["weight"].sum()}

    def augment(self, batch):
        raise AssertionError("evaluation does not augment")


def spied(fabric, passes: int, **keys) -> list[list[dict]]:
    task = Spy()
    network = task.network().train()
    split, seen = Split(fabric, task, Points(23, 1), 5, **keys), []
    for _ in range(passes):
        task.seen = []
        torch.rand(3)  # training goes on in between
        evaluate(fabric, task, network, split)
        seen.append(task.seen)
    return seen


def test_every_pass_sees_the_same_batches_and_random_numbers(fabric):
    first, second = spied(fabric, 2, seed=7)
    assert len(first) == len(second) == 5
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.cat([batch["index"] for batch in first]).tolist() == list(range(23))
    other = spied(fabric, 1, seed=8)[0]
    assert not torch.equal(other[0]["random"], first[0]["random"])
    assert not torch.equal(other[0]["torch"], first[0]["torch"])


def test_a_sample_has_the_same_random_numbers_in_any_batch_but_none_of_trainings(fabric):
    from fabric_trainer.random import SampleRandom

    small, large = (torch.cat([batch["random"] for batch in spied_batches(fabric, size)]) for size in (3, 23))
    assert torch.equal(small, large)
    assert not torch.equal(SampleRandom(0, 0, torch.arange(23)).uniform("noise", 3), large)


def spied_batches(fabric, micro: int) -> list[dict]:
    task = Spy()
    evaluate(fabric, task, task.network(), Split(fabric, task, Points(23, 1), micro))
    return task.seen


def test_no_graph_is_kept_and_nothing_changes_in_the_network(fabric):
    task = Spy()
    network = task.network().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(fabric, task, network, Split(fabric, task, Points(23, 1), 5))
    assert not any(batch["graph"] for batch in task.seen)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("limit, batches", [(None, 5), (1, 1), (3, 3), (100, 5), (0.5, 2), (0.1, 1), (1.0, 5)])
def test_the_first_batches_alone(fabric, limit, batches):
    (seen,) = spied(fabric, 1, limit=limit)
    assert torch.cat([batch["index"] for batch in seen]).tolist() == list(range(min(23, 5 * batches)))


class Drawn(Double):
    """With an array and a NaN among its figures, and a picture that says which weights it is of."""

    def __init__(self, parts: bool = False) -> None:
        super().__init__(torch.ones(12))
        self.parts = parts

    def dataset(self, split: str) -> Points:
        return self.points

    def network(self) -> nn.Module:
        return super().network().double()

    def figures(self, sums: dict) -> dict:
        parts = {"parts": np.array([1.5, np.nan])} if self.parts else {}
        return {"error": sums["error"] / sums["weight"], "ratio": np.nan, **parts}

    def pictures(self, network: nn.Module, device: torch.device) -> dict:
        assert not network.training
        return {f"{sum(p.double().sum() for p in network.parameters()).item():.12f}": plt.figure()}


def test_metrics_in_a_file_and_a_report_with_the_pictures_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {
        "task": {"path": "test_evaluate.Drawn"},
        "batch": {"micro_batch_size": 4},
        "run": {"max_epochs": 2},
        "ema": {"decay": 0.5},
        "loggers": {"tensorboard": False},
        "fabric": {"accelerator": "cpu", "precision": "64-true"},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(config))
    (tmp_path / "found").mkdir()
    path = "runs/a/checkpoints/step-00000003.pt"
    assert main(["--config", "toy.yaml", "--name", "a"]) == 0
    report = (tmp_path / "runs/a/report.html").read_text()
    capsys.readouterr()

    arguments = ["--config", "toy.yaml", "--evaluate", path, "--split", "test"]
    # a warm-up longer than a run on this data is no matter here
    arguments += ["--task.args.parts", "true", "--schedule.warmup", "100", "--out", "found/metrics.json"]
    assert main(arguments) == 0
    saved, out = load(tmp_path / path), capsys.readouterr().out
    found = json.loads((tmp_path / "found/metrics.json").read_text())
    assert {key: found[key] for key in ("checkpoint", "step", "split")} == {
        "checkpoint": path, "step": 3, "split": "test",
    }  # fmt: skip
    assert set(found["metrics"]) == {f"{kind}/{name}" for kind in ("test", "test_ema") for name in NAMES}
    assert found["metrics"]["test/parts"] == [1.5, "NaN"] and found["metrics"]["test/ratio"] == "NaN"
    assert f"test/error {found['metrics']['test/error']!r}" in out.splitlines()
    assert "metrics found/metrics.json\nreport found/report.html\n" in out

    (picture,) = (tmp_path / "found/pictures").iterdir()
    averages = [(saved["model"] | saved["ema"])[name] for name, _ in Drawn().network().named_parameters()]
    assert picture.stem == f"{sum(value.sum() for value in averages).item():.12f}"
    text = (tmp_path / "found/report.html").read_text()
    assert picture.stem in text and "test_ema/error" in text
    assert (tmp_path / "runs/a/report.html").read_text() == report, "the run's own stays"

    for out, says in (("found/metrics.csv", "--evaluate writes .json"), ("no/metrics.json", "there is no folder no")):
        assert main([*arguments[:-1], out]) == 2
        assert says in capsys.readouterr().err
