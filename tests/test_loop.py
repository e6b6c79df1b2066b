"""What the loop promises beside exactness: what is logged and called, and what is nobody's business."""

from __future__ import annotations

import csv
import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from toys import Regression, config

from fabric_trainer import Batch, Loss, Task, fit
from fabric_trainer.checkpoint import load
from fabric_trainer.errors import InputError
from fabric_trainer.state import State


class Watcher:
    """Notes every call: (point, step, metrics)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, dict]] = []

    def on_update_end(self, state: State, metrics: dict) -> None:
        self.calls.append(("update", state.counters.window, dict(metrics)))

    def on_epoch_end(self, state: State, metrics: dict) -> None:
        self.calls.append(("epoch", state.counters.step, dict(metrics)))

    def on_evaluation_end(self, state: State, metrics: dict) -> None:
        self.calls.append(("evaluation", state.counters.step, dict(metrics)))

    def on_checkpoint_saved(self, state: State, metrics: dict, path: Path) -> None:
        self.calls.append(("saved", state.counters.step, {"path": path.name}))

    def on_fit_end(self, state: State, metrics: dict) -> None:
        self.calls.append(("end", state.counters.step, dict(metrics)))


@pytest.fixture
def watched() -> tuple:
    from lightning.fabric import Fabric

    watcher = Watcher()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[watcher])
    fabric.launch()
    return fabric, watcher


def test_the_five_points(watched, tmp_path):
    fabric, watcher = watched
    fit(fabric, Regression(50), config(**{"batch.accumulate": 3}), tmp_path)
    points = [(name, when) for name, when, _ in watcher.calls]
    expected = []
    for step in range(1, 11):
        if step in (5, 10):
            expected += [("epoch", step), ("evaluation", step), ("saved", step)]
        expected.append(("update", step))
    assert points == [*expected, ("end", 10)]
    assert all("train_epoch/loss" in metrics for name, _, metrics in watcher.calls if name == "epoch")
    assert set(watcher.calls[-1][2]) == {"val/loss", "val/abs"}


def test_epoch_means_are_the_exact_sums_of_the_updates(fabric, tmp_path):
    state = fit(fabric, Regression(50), config(**{"batch.accumulate": 3, "run.log_every_n_steps": 4}), tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    counts = [12, 12, 12, 12, 2] * 2
    for epoch, (start, end) in enumerate(((0, 5), (5, 10))):
        for name in ("loss", "abs"):
            total = sum(float(rows[i][f"train/{name}"]) * counts[i] for i in range(start, end))
            mean = state.history.epochs[epoch][f"train_epoch/{name}"]
            assert mean == pytest.approx(total / 50, rel=1e-14)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(fabric, tmp_path, workers):
    class Noisy(Regression):
        def augment(self, batch: Batch) -> Batch:
            return batch | {"x": batch["x"] + batch["random"].normal("noise", 8)}

    def train(number: int) -> State:
        made = config(**{"data.num_workers": number, "run.max_epochs": 2, "batch.accumulate": 2})
        return fit(fabric, Noisy(30, dropout=0.3), made)

    a, b = train(0), train(workers)
    assert a.history.evaluations[-1]["val/loss"] == b.history.evaluations[-1]["val/loss"]
    for name, value in a.module.state_dict().items():
        assert torch.equal(value, b.module.state_dict()[name])


def test_logging_evaluating_and_saving_change_nothing(fabric, tmp_path):
    (tmp_path / "a").mkdir()
    often = {"run.log_every_n_steps": 1, "evaluate.every": "1 steps", "checkpoint.every": "1 steps"}
    a = fit(fabric, Regression(30, dropout=0.3, batch_norm=True), config(**often, **{"ema.decay": 0.9}), tmp_path / "a")
    b = fit(fabric, Regression(30, dropout=0.3, batch_norm=True), config(**{"ema.decay": 0.9}))
    for name, value in a.module.state_dict().items():
        assert torch.equal(value, b.module.state_dict()[name])
        assert torch.equal(a.ema.state_dict()[name], b.ema.state_dict()[name])


def test_nothing_is_written_without_a_folder(fabric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(fabric, Regression(), config())
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_the_task_goes_through_and_nothing_is_lost(fabric, tmp_path):
    class Breaks(Regression):
        calls = 0

        def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
            Breaks.calls += 1
            if Breaks.calls == 20:
                raise RuntimeError("mine")
            return super().loss(network, batch)

    with pytest.raises(RuntimeError, match="mine"):
        fit(fabric, Breaks(), config(**{"checkpoint.every": "5 steps", "evaluate.every": "9 epochs"}), tmp_path)
    assert load(tmp_path / "checkpoints" / "last.pt")["counters"]["step"] == 15


class Frozen(Regression):
    """Notes how many objects the collector leaves alone; breaks at the end where asked."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks, self.counts = breaks, []

    def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
        self.counts.append(gc.get_freeze_count())
        if self.breaks and len(self.counts) == 3:
            raise RuntimeError("mine")
        return super().loss(network, batch)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_collector_leaves_alone_what_was_there_and_takes_it_back(fabric, breaks):
    task = Frozen(breaks)
    gc.unfreeze()
    try:
        with pytest.raises(RuntimeError, match="mine") if breaks else nullcontext():
            fit(fabric, task, config())
        assert min(task.counts) > 10_000 and gc.get_freeze_count() == 0
    finally:
        gc.collect()
        gc.freeze()


def test_what_the_caller_has_frozen_stays_frozen(fabric):
    """conftest.py freezes. Now and then one of so many objects goes, none is added."""
    task, before = Frozen(False), gc.get_freeze_count()
    fit(fabric, task, config())
    counts = [*task.counts, gc.get_freeze_count()]
    assert 10_000 < before - 1000 < min(counts) <= max(counts) <= before


def test_a_task_without_validation_trains_and_saves(fabric, tmp_path):
    class Blind(Regression):
        def dataset(self, split: str) -> object:
            return super().dataset(split) if split == "train" else None

    state = fit(fabric, Blind(), config(), tmp_path)
    assert state.history.evaluations == [] and len(state.history.epochs) == 2
    assert (tmp_path / "checkpoints" / "last.pt").exists() and not (tmp_path / "checkpoints" / "best.pt").exists()


def test_max_steps_ends_within_an_epoch_evaluated_and_saved(fabric, tmp_path):
    state = fit(fabric, Regression(), config(**{"run.max_steps": 7}), tmp_path)
    assert state.counters.step == 7 and state.history.evaluations[-1]["step"] == 7
    assert load(tmp_path / "checkpoints" / "last.pt")["counters"]["window"] == 7


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precisions_train_on_a_cpu(precision):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    changes = {"clip.norm": 1.0, "ema.decay": 0.9, "run.max_epochs": 20, "optim.lr": 1e-2}

    class Cast(Regression):
        def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
            dtype = torch.float64 if precision == "64-true" else torch.float32
            batch = batch | {name: batch[name].to(dtype) for name in ("x", "y", "weight")}
            return super().loss(lambda x: network(x).to(dtype), batch)

    state = fit(fabric, Cast(), config(**changes))
    losses = [entry["train_epoch/loss"] for entry in state.history.epochs]
    assert losses[-1] < 0.6 * losses[0]


def test_a_configuration_made_by_hand_is_checked_too(fabric):
    with pytest.raises(InputError, match=r"run\.max_epochs or run\.max_steps must say"):
        fit(fabric, Regression(), config(**{"run.max_epochs": None}))


def test_a_batch_that_is_no_dict_is_named(fabric):
    class Tuples(Task):
        def dataset(self, split: str) -> object:
            return [(torch.zeros(1), torch.zeros(1))] * 8 if split == "train" else None

        def network(self) -> torch.nn.Module:
            return torch.nn.Linear(1, 1)

    with pytest.raises(TypeError, match="a batch must be a dict"):
        fit(fabric, Tuples(), config())
