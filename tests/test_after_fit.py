"""After the last update the test split is measured once, with the weights that the run is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from toys import Points, Regression, config

from fabric_trainer import cli, fit
from fabric_trainer.checkpoint import load
from fabric_trainer.evaluate import Split, evaluate
from fabric_trainer.run import read_status, set_status


class Three(Regression):
    """With a test split, and a loss by kind of sample."""

    def dataset(self, split: str) -> Points | None:
        return Points(17, 2) if split == "test" else super().dataset(split)

    def evaluate(self, network, batch, meters):
        sums = super().evaluate(network, batch, meters)
        error = (network(batch["x"]) - batch["y"]).square().sum(1) * batch["weight"]
        kind = (batch["x"][:, 0] > 0).long()
        return sums | {"by_kind": error.new_zeros(2, 1).index_add(0, kind, error[:, None])}

    def figures(self, sums):
        parts = sums.pop("by_kind")
        assert isinstance(parts, np.ndarray) and parts.shape == (2, 1) and parts.dtype == np.float64
        return super().figures(sums) | {f"loss/{kind}": float(part) for kind, part in zip("ab", parts[:, 0])}


class Pictured(Three):
    """Its picture is what the network has."""

    drawn: dict[str, torch.Tensor]

    def pictures(self, network, device):
        type(self).drawn = dict(network.state_dict())
        return {}


def by_hand(network: nn.Module, weights: dict[str, torch.Tensor]) -> float:
    network.load_state_dict(weights)
    points = Points(17, 2)
    with torch.no_grad():
        return (network.eval()(points.x) - points.y).square().sum(1).double().mean().item()


@pytest.mark.parametrize("monitor", ["val/loss", "val_ema/loss", "val_ema_0.5/loss", None])
def test_the_weights_tested_are_those_that_the_monitor_speaks_of(fabric, tmp_path, monitor):
    changes = {"checkpoint.monitor": monitor, "checkpoint.mode": "max", "ema.decay": [0.9, 0.5]}
    task = Three()
    made = config(**changes, **{"evaluate.weights": "all", "optim.lr": 0.005})
    state = fit(fabric, task, made, tmp_path)
    (entry,) = state.history.tests
    assert entry == json.loads((tmp_path / "history.json").read_text())["tests"][0]
    saved = load(tmp_path / "checkpoints" / ("best.pt" if monitor else "last.pt"))
    assert entry["step"] == saved["counters"]["step"] == (13 if monitor else 26), "the worst comes first"
    weights = {"val/loss": saved["model"], "val_ema/loss": saved["ema"], None: saved["ema"]}
    weights["val_ema_0.5/loss"] = saved["averages"].get("0.5")
    assert entry["test/loss"] == pytest.approx(by_hand(task.network(), weights[monitor]), rel=1e-6)
    assert entry["test/loss/a"] + entry["test/loss/b"] == pytest.approx(17 * entry["test/loss"], rel=1e-6)


def test_sums_with_a_shape_are_added_up_as_the_others(fabric):
    task = Three()
    network = task.network()
    whole, cut = (evaluate(fabric, task, network, Split(fabric, task, Points(17, 2), size)) for size in (17, 3))
    assert cut == pytest.approx(whole, rel=1e-6)


def test_without_a_test_split_there_is_no_test(fabric, tmp_path):
    assert fit(fabric, Regression(), config(), tmp_path).history.tests == []


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tree = {
        "task": {"path": f"{__name__}.Three"},
        "run": {"max_epochs": 2},
        "batch": {"micro_batch_size": 4},
        "checkpoint": {"monitor": "val/loss"},
        "fabric": {"accelerator": "cpu"},
        "loggers": {"tensorboard": False},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def run(*argv: str) -> int:
    return cli.main(["--config", "toy.yaml", *argv])


def test_it_is_the_last_line_and_in_the_report(home, capsys):
    assert run("--name", "a") == 0
    out = capsys.readouterr().out
    (entry,) = json.loads((home / "runs/a/history.json").read_text())["tests"]
    assert out.splitlines()[-2:] == [f"test/{name} {entry[f'test/{name}']:.4f}" for name in ("loss", "abs")]
    assert "test/loss/a" not in out, "parts are not printed"
    page = (home / "runs/a/report.html").read_text()
    assert "test/loss" in page and "test/loss/a" not in page
    assert run("--fast_dev_run") == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("test/loss ")


@pytest.mark.parametrize("monitor, key", [("val/loss", "model"), ("val_ema/loss", "ema")])
def test_pictures_are_of_the_weights_that_were_tested(home, monitor, key):
    path = f"{__name__}.Pictured"
    assert run("--name", "a", f"--task.path={path}", "--ema.decay=0.9", f"--checkpoint.monitor={monitor}") == 0
    saved = load(home / "runs/a/checkpoints/best.pt")
    assert all(torch.equal(Pictured.drawn[name], value) for name, value in saved[key].items())
    assert not torch.equal(saved["model"]["0.weight"], saved["ema"]["0.weight"])


def test_a_run_that_was_killed_before_its_test_is_tested_when_it_is_resumed(home, capsys):
    assert run("--name", "a") == 0
    before = (home / "runs/a/history.json").read_text()
    set_status(home / "runs/a", "running")
    assert run("--name", "a", "--resume", "auto") == 0
    assert (home / "runs/a/history.json").read_text() == before
    assert read_status(home / "runs/a")["status"] == "finished"
    assert "test/loss" in capsys.readouterr().out
    assert run("--name", "a", "--resume", "auto") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_whose_time_is_up_is_tested_once_it_is_complete(home, capsys):
    assert run("--name", "a", "--run.max_time", "0.0001s") == 0
    assert "test/" not in capsys.readouterr().out
    assert run("--name", "a", "--resume", "auto") == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("test/loss ")
