"""What limits, measures and ends a run: each key counted against what it says."""

from __future__ import annotations

import csv
import json
import math
import os
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_evaluate import rank
from test_strategies import configured, refusal
from torch import nn
from toys import Points, Regression, config

from fabric_trainer import Batch, Loss, cli, fit, windows
from fabric_trainer import state as state_module
from fabric_trainer.checkpoint import load
from fabric_trainer.checks import check
from fabric_trainer.clip import part_norms, total_norm
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split
from fabric_trainer.launch import Resolved
from fabric_trainer.order import First, Order, Shuffled, limited
from fabric_trainer.random import make_deterministic
from fabric_trainer.run import read_status
from fabric_trainer.state import State
from fabric_trainer.strategies import check_strategy

QUIET = {"loggers.tensorboard": False, "loggers.csv": False}


class Counting(Regression):
    """Keeps the indices of every training micro-batch and every evaluation batch."""

    def __init__(self, samples: int = 50) -> None:
        super().__init__(samples)
        self.trained: list[list[int]] = []
        self.evaluated: list[list[int]] = []

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        if network.training:
            self.trained.append(batch["index"].tolist())
        return super().loss(network, batch)

    def evaluate(self, network, batch, meters):
        self.evaluated.append(batch["index"].tolist())
        return super().evaluate(network, batch, meters)


class Watch:
    """Steps at which things happened."""

    def __init__(self) -> None:
        self.evaluations: list[int] = []
        self.epochs: list[int] = []
        self.updates = 0

    def on_evaluation_end(self, state, metrics):
        self.evaluations.append(state.counters.step)

    def on_epoch_end(self, state, metrics):
        self.epochs.append(state.counters.step)

    def on_update_end(self, state, metrics):
        self.updates += 1


@pytest.fixture
def watch(fabric):
    made = Watch()
    fabric._callbacks.append(made)
    yield made
    fabric._callbacks.remove(made)


def whole_epochs(samples: int, size: int, seed: int = 42, epochs: int = 2) -> list[list[list[int]]]:
    """[epoch][update] -> the samples' indices, of a run without limits."""
    orders = [np.random.default_rng((seed, epoch)).permutation(samples).tolist() for epoch in range(epochs)]
    return [[order[i : i + size] for i in range(0, samples, size)] for order in orders]


def flat(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


# ---- how long -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, updates", [
    ({"run.max_epochs": 3}, 39),  # 13 updates of 4, the last of 2
    ({"run.max_epochs": 3, "run.max_steps": 20}, 20),
    ({"run.max_epochs": 1, "run.max_steps": 20}, 13),
    ({"run.max_epochs": None, "run.max_steps": 20}, 20),
    ({"run.limit_train_batches": 5}, 10),
    ({"run.limit_train_batches": 0.5}, 12),  # of 13, rounded down
    ({"run.limit_train_batches": 0.01}, 2),
    ({"run.limit_train_batches": 1.0}, 26),
    ({"run.limit_train_batches": 1}, 2),
    ({"run.limit_train_batches": 1000}, 26),
    ({"run.limit_train_batches": 5, "run.max_epochs": None, "run.max_steps": 13}, 13),
    ({"run.overfit_batches": 3}, 6),
    ({"run.overfit_batches": 3, "run.limit_train_batches": 2}, 4),
])  # fmt: skip
def test_the_updates_of_a_run(fabric, watch, changes, updates):
    state = fit(fabric, Regression(50), config(**QUIET | changes))
    assert state.steps == state.counters.step == watch.updates == updates


def test_limited_epochs_begin_as_whole_ones_do(fabric, watch):
    """Two micro-batches an update; half an epoch and a whole one are measured by what is left of it."""
    changes = {"run.limit_train_batches": 4, "batch.accumulate": 2, "evaluate.every": "0.5 epochs"}
    changes |= {"schedule.name": "linear", "optim.lr": 1.0}
    task = Counting()
    state = fit(fabric, task, config(**QUIET | changes))
    expected = [update for epoch in whole_epochs(50, 8) for update in epoch[:4]]
    seen = [a + b for a, b in zip(task.trained[::2], task.trained[1::2], strict=True)]
    assert seen == expected
    assert watch.epochs == [4, 8] and watch.evaluations == [2, 4, 6, 8]
    assert state.set_learning_rate()["lr/all"] == 0.0, "the schedule ends with the run"


@example(100, 29)  # 0.29 x 100 is 28.999…
@given(st.integers(1, 10_000), st.integers(1, 100))
def test_a_share_is_rounded_down_to_at_least_one(batches, percent):
    assert limited(percent / 100, batches) == max(1, batches * percent // 100)
    assert limited(percent, batches) == min(percent, batches) and limited(None, batches) == batches


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 200),
    accumulate=st.sampled_from([6, {"window": {0: 6, 3: 12, 8: 6}}, {"epoch": {0: 12, 2: 6}}]),
    limit=st.one_of(st.integers(1, 20), st.floats(0.01, 1.0)),
    ranks=st.sampled_from([2, 3, 6]),
    window=st.integers(0, 60),
)
def test_a_limited_order_is_the_same_on_any_number_of_ranks_and_from_anywhere(
    samples, accumulate, limit, ranks, window
):
    def order(ranks: int) -> Order:
        """Of the same effective batches."""
        share = accumulate // ranks if isinstance(accumulate, int) else {
            clock: {at: count // ranks for at, count in steps.items()} for clock, steps in accumulate.items()
        }  # fmt: skip
        return Order(Shuffled(samples, 1), 2, share, ranks, 0, limit)

    one, many = order(1), order(ranks)
    walked = [one.span(number) for number in range(window + 1)]
    assert walked[-1] == many.span(window) == order(1).span(window)
    for epoch in {span.epoch for span in walked}:
        of_epoch = [span for span in walked if span.epoch == epoch]
        assert of_epoch[0].start == 0 and all(a.stop == b.start for a, b in pairwise(of_epoch))
        assert one.length(epoch) <= samples
        if of_epoch[-1].last:
            assert of_epoch[-1].stop == one.length(epoch) == many.length(epoch)


def test_a_resume_under_a_limit_goes_on_in_the_middle_of_its_epoch(fabric, tmp_path):
    changes = QUIET | {"run.limit_train_batches": 5, "run.max_epochs": 3, "checkpoint.every": "7 steps"}
    parts, whole = Counting(), Counting()
    fit(fabric, whole, config(**changes), tmp_path)
    saved = load(tmp_path / "checkpoints" / "step-00000014.pt")
    state = fit(fabric, parts, config(**changes), saved=saved)
    assert state.counters.step == 15 and parts.trained == whole.trained[14:]
    with pytest.raises(InputError, match="epoch has 20 samples, this configuration's has 50"):
        State(fabric, Counting(), config(**QUIET), saved)


def test_overfitting_trains_and_measures_the_same_few_samples(fabric, watch):
    changes = {"run.overfit_batches": 2, "run.max_epochs": 3, "batch.accumulate": 2, "optim.lr": 1e-2}
    task = Counting()
    state = fit(fabric, task, config(**QUIET | changes))
    first, second = whole_epochs(50, 8)[0][:2]
    assert [a + b for a, b in zip(task.trained[::2], task.trained[1::2], strict=True)] == [first, second] * 3
    assert flat(task.evaluated) == (first + second) * 3 and watch.evaluations == [2, 4, 6]
    # the last epoch's loss on them, by hand
    rows, data = torch.tensor(first + second), Points(50, 0)
    with torch.no_grad():
        loss = (state.module(data.x[rows]) - data.y[rows]).square().sum(1).mean().item()
    assert state.history.evaluations[-1]["val/loss"] == pytest.approx(loss, rel=1e-6)


def test_overfitting_needs_no_val_split(fabric):
    class Blind(Regression):
        def dataset(self, split):
            return Points(50, 0) if split == "train" else None

    state = fit(fabric, Blind(), config(**QUIET | {"run.overfit_batches": 1, "optim.lr": 0.05, "run.max_epochs": 200}))
    assert state.history.evaluations[-1]["val/loss"] < 0.01 * state.history.evaluations[0]["val/loss"]


def test_the_first_of_a_plan_are_the_same_in_every_epoch():
    plan = First(Shuffled(30, 5), 7)
    assert [plan.length(epoch) for epoch in range(3)] == [7] * 3
    assert all(plan(epoch).tolist() == Shuffled(30, 5)(0)[:7].tolist() for epoch in range(3))


# ---- time -----------------------------------------------------------------------------------------------------------


class Minutes:
    """A clock that an update takes a minute by."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(state_module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def on_update_end(self, state, metrics):
        self.now += 60.0


TIMED = QUIET | {
    "run.max_epochs": None,
    "run.max_steps": 20,
    "evaluate.every": "3 steps",
    "checkpoint.every": "100 steps",
    "checkpoint.monitor": "val/loss",
    "early_stopping.patience": 50,
    "schedule.name": "plateau",
    "schedule.patience": 0,
    "schedule.threshold": 0.2,
    "ema.decay": 0.9,
}


def test_a_run_whose_time_is_up_can_be_continued_as_if_it_never_had_been(fabric, tmp_path, monkeypatch):
    """Evaluated and saved after the update that saw it; the evaluation is off the plan and decides nothing."""
    clock, parts, whole = Minutes(monkeypatch), tmp_path / "parts", tmp_path / "whole"
    fabric._callbacks.append(clock)
    state = fit(fabric, Regression(), config(**TIMED | {"run.max_time": "00:05:00"}), parts)
    # the time is read while the update before is computed: five minutes are over at the seventh
    assert state.counters.step == 7 and state.stopped == 0 and state.finished and not state.complete
    assert [entry["step"] for entry in state.history.evaluations] == [3, 6, 7]
    saved = load(parts / "checkpoints" / "last.pt")
    assert saved["counters"]["step"] == 7 and saved["counters"]["seconds"] == 360.0
    assert State(fabric, Regression(), config(**TIMED | {"run.max_time": "6m"}), saved).finished
    # twelve minutes in all: six more of them
    state = fit(fabric, Regression(), config(**TIMED | {"run.max_time": "12m"}), parts, saved=saved)
    assert state.counters.step == 7 + 8 and not state.complete
    saved = load(parts / "checkpoints" / "last.pt")
    state = fit(fabric, Regression(), config(**TIMED | {"run.max_time": "1d"}), parts, saved=saved)
    straight = fit(fabric, Regression(), config(**TIMED), whole)
    fabric._callbacks.clear()
    assert state.complete and state.counters.step == straight.counters.step == 20
    assert [entry["step"] for entry in straight.history.evaluations] == [3, 6, 9, 12, 15, 18, 20]
    a, b = (load(folder / "checkpoints" / "last.pt") for folder in (parts, whole))
    for tree in ("model", "ema"):
        assert all(torch.equal(value, b[tree][name]) for name, value in a[tree].items())
    assert a["states"]["plateau"] == b["states"]["plateau"] and b["states"]["plateau"]["share"] < 1
    assert a["states"]["early_stopping"] == b["states"]["early_stopping"]


def test_a_bare_number_is_no_time(tmp_path):
    """YAML reads 12:00:00 as 43200."""
    with pytest.raises(InputError, match=r"43200 is a number.*write '12:00:00' or 12h"):
        check(config(**{"run.max_time": 43200}))
    with pytest.raises(InputError, match=r"run.max_time must read like '02:12:00:00' \(days first\).*not '12'"):
        check(config(**{"run.max_time": "12"}))


# ---- evaluations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, steps", [
    ("4 steps", [4, 8, 12, 16, 20, 24, 26]),
    ("100 steps", [26]),
    ("1 epochs", [13, 26]),
    ("2 epochs", [26]),
    ("0.5 epochs", [7, 13, 20, 26]),
    ("0.25 epochs", [4, 7, 10, 13, 17, 20, 23, 26]),
])  # fmt: skip
def test_evaluations_come_as_often_as_asked(fabric, watch, every, steps):
    """Epochs of 50 samples, in 13 updates of 4: the share is that of the samples."""
    fit(fabric, Regression(50), config(**QUIET | {"evaluate.every": every}))
    assert watch.evaluations == steps


@pytest.mark.parametrize("limit, samples", [(1, 4), (3, 12), (100, 23), (0.5, 12), (0.01, 4), (1.0, 23)])
def test_limited_evaluations_see_the_first_samples_on_any_number_of_ranks(fabric, limit, samples):
    """23 samples in batches of 4, the last of 3."""
    task = Counting()
    state = fit(fabric, task, config(**QUIET | {"run.limit_val_batches": limit, "run.max_steps": 1}))
    assert flat(task.evaluated) == list(range(samples))
    with torch.no_grad():
        points = Points(23, 1)
        loss = (state.module(points.x) - points.y).square().sum(1)[:samples].mean().item()
    assert state.history.evaluations[-1]["val/loss"] == pytest.approx(loss, rel=1e-6)
    for world in (1, 2, 3):
        splits = [Split(rank(i, world), task, points, 4, limit=limit) for i in range(world)]
        rows = [batch for split in splits for batch in split.batches]
        seen = [
            i for batch in rows for i, w in zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True) if w
        ]
        assert sorted(seen) == list(range(samples))


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate, counts", [
    (3, [3, 3, 3, 3, 1] * 2),
    ({"window": {0: 1, 3: 4, 5: 2}}, [1, 1, 1, 4, 4, 2] + [2] * 6 + [1]),
    ({"epoch": {0: 5, 1: 13}}, [5, 5, 3, 13]),
])  # fmt: skip
def test_the_micro_batches_of_each_update(fabric, accumulate, counts):
    """Of 4 samples, 13 an epoch, the last of 2; two epochs."""
    task, seen = Counting(), []

    class PerUpdate:
        def on_update_end(self, state, metrics):
            seen.append(len(task.trained) - sum(seen))

    fabric._callbacks.append(PerUpdate())
    state = fit(fabric, task, config(**QUIET | {"batch.accumulate": accumulate}))
    fabric._callbacks.clear()
    assert seen == counts and state.counters.step == len(counts)
    assert flat(task.trained) == [i for epoch in whole_epochs(50, 50) for i in epoch[0]]


# ---- gradient norms -------------------------------------------------------------------------------------------------


class Parted(Regression):
    """Modules with names, one within another, and a parameter of the network's own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6))
            self.head = nn.Linear(6, 2)
            self.unused = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.head(self.body(x)) * self.scale

    def network(self):
        return self.Net()


GROUPS = {
    "decay": ["body.0.weight", "body.2.weight", "head.weight", "unused.weight"],
    "no_decay": ["body.0.bias", "body.2.bias", "head.bias", "unused.bias", "scale"],
}
MODULES = {
    "body": ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"],
    "head": ["head.weight", "head.bias"],
    "scale": ["scale"],
    "unused": [],
}


@pytest.mark.parametrize("kind, parts", [("groups", GROUPS), ("modules", MODULES)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_norms_of_parts_are_those_before_clipping(fabric, tmp_path, kind, parts, p):
    made = config(**{
        "run.log_gradient_norms": kind, "clip.p": p, "clip.norm": 0.01, "optim.weight_decay": 0.1,
        "batch.accumulate": 3, "loggers.tensorboard": False, "run.max_epochs": 1,
    })  # fmt: skip
    start, task = State(fabric, Parted(), made), Parted()
    window = next(windows(task, start.train_set, start.order, made.seed))
    for batch in window.micro_batches:
        (task.loss(start.module, batch).total / 12).backward()
    gradients = {name: q.grad for name, q in start.module.named_parameters() if q.grad is not None}
    fit(fabric, Parted(), made, tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert len(rows) == 5 and {key for key in rows[0] if key.startswith("grad_norm/")} == {
        f"grad_norm/{n}" for n in parts
    }
    for name, members in parts.items():
        elements = [gradients[member].flatten() for member in members if member in gradients]
        expected = torch.linalg.vector_norm(torch.cat(elements), p).item() if elements else 0.0
        assert float(rows[0][f"grad_norm/{name}"]) == pytest.approx(expected, rel=1e-5)
    for row in rows:
        of_parts = torch.tensor([float(row[f"grad_norm/{name}"]) for name in parts])
        assert torch.linalg.vector_norm(of_parts, p).item() == pytest.approx(float(row["grad_norm"]), rel=1e-5)
        assert float(row["grad_norm"]) > 0.01


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    p=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
)
def test_a_part_without_elements_has_norm_zero(sizes, p):
    torch.manual_seed(0)
    parts = [[torch.randn(size) for size in part] for part in sizes]
    found = part_norms(parts, p)
    assert found.shape == (len(parts),)
    for part, norm in zip(parts, found, strict=True):
        elements = torch.cat([torch.zeros(1), *part])
        torch.testing.assert_close(norm, torch.linalg.vector_norm(elements, p))
    if tensors := [tensor for part in parts for tensor in part]:
        torch.testing.assert_close(torch.linalg.vector_norm(found, p), total_norm(tensors, p))


def test_logging_norms_of_parts_changes_no_bit(fabric):
    """Nor is anything measured where nobody asks."""
    changes = QUIET | {"clip.norm": 0.1}
    states = [
        fit(fabric, Parted(), config(**changes | {"run.log_gradient_norms": kind})) for kind in ("none", "modules")
    ]
    a, b = (state.module.state_dict() for state in states)
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert states[0].engine.part_norms == {} and set(states[1].engine.part_norms) == set(MODULES)


def test_deepspeed_has_no_gradients_to_measure():
    made = configured(run__log_gradient_norms="groups")
    line = refusal(check_strategy, made, Resolved("deepspeed", "cuda", 2, 1, "32-true", 2, 1, 2, False, ()))
    assert "run.log_gradient_norms" in line and "deepspeed" in line
    check_strategy(made, Resolved("fsdp", "cpu", 2, 1, "32-true", 2, 1, 2, False, ()))


# ---- the log interval, the seed, determinism ------------------------------------------------------------------------


def test_values_are_fetched_and_shown_as_often_as_asked(fabric, tmp_path, capsys):
    fit(fabric, Regression(50), config(**{"run.log_every_n_steps": 4, "loggers.tensorboard": False}), tmp_path)
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == [f"{step}/26" for step in (4, 8, 12, 16, 20, 24, 26)]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 26, "every update has its row"


def test_the_seed_draws_weights_and_order(fabric):
    tasks = [Counting() for _ in range(3)]
    states = [fit(fabric, task, config(**QUIET | {"seed": seed})) for task, seed in zip(tasks, (7, 7, 8), strict=True)]
    weights = [State(fabric, Regression(), config(seed=seed)).module[0].weight for seed in (7, 7, 8)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert tasks[0].trained == tasks[1].trained != tasks[2].trained
    assert torch.equal(states[0].module[0].weight, states[1].module[0].weight)


class Scattering(Regression):
    """Uses an operation for which torch has no deterministic algorithm."""

    def loss(self, network, batch):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return super().loss(network, batch)


@pytest.fixture
def lenient(monkeypatch):
    """Torch as it was, afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def test_deterministic_runs_refuse_what_is_not(fabric, home, lenient):
    (home / "toy.yaml").write_text(yaml.safe_dump(CONFIG | {"task": {"path": "test_control.Scattering"}}))
    assert run("--name", "a") == 0
    with pytest.raises(InputError, match="make_deterministic"):
        State(fabric, Regression(), config(**{"run.deterministic": True}))
    torch.backends.cudnn.benchmark = True
    with pytest.raises(RuntimeError, match=r"put_.*deterministic"):
        run("--name", "b", "--run.deterministic", "true")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert State(fabric, Regression(), config(**{"run.deterministic": True})).counters.step == 0


def test_a_workspace_that_the_user_chose_stays(lenient, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# ---- wrong values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, says", [
    ({"run.limit_train_batches": 0}, "run.limit_train_batches must be a count of at least 1 or a share"),
    ({"run.limit_train_batches": 0.0}, "not 0.0"),
    ({"run.limit_val_batches": -1}, "run.limit_val_batches must be a count of at least 1"),
    ({"run.limit_val_batches": 1.5}, "not 1.5"),
    ({"run.limit_val_batches": math.nan}, "not nan"),
    ({"run.overfit_batches": 0}, "run.overfit_batches must be at least 1, not 0"),
    ({"early_stopping.patience": 0, "checkpoint.monitor": "val/loss"}, "early_stopping.patience must be at least 1"),
    ({"early_stopping.patience": 1}, "set early_stopping.monitor or checkpoint.monitor"),
    ({"early_stopping.min_delta": -0.1}, "early_stopping.min_delta must be at least 0, not -0.1"),
    ({"early_stopping.restore_best": True}, "early_stopping.restore_best needs best.pt: set checkpoint.monitor"),
    ({"early_stopping.restore_best": True, "checkpoint.monitor": "a", "checkpoint.top_k": 0}, "top_k above 0"),
])  # fmt: skip
def test_values_that_no_run_can_have(changes, says):
    assert says in refusal(check, config(**changes))


# ---- the command line -----------------------------------------------------------------------------------------------

CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 30}},
    "batch": {"micro_batch_size": 4},
    "run": {"max_epochs": 2},
    "checkpoint": {"monitor": "val/loss"},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def run(*argv: str) -> int:
    return cli.main(["--config", "toy.yaml", *argv])


def test_the_summary_says_what_was_understood(home, capsys):
    limits = ("--run.limit_train_batches", "0.5", "--run.limit_val_batches", "2")
    assert run("--run.max_time", "02:03:00:00", *limits, "--early_stopping.patience", "3", "--name", "a") == 0
    found = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "max time 2 d 3 h",
        "updates 4 in the first epoch, 8 in all",
        "samples 16 an epoch",
        "train limit 16 of 30 samples in the first epoch",
        "val limit 8 of 23 samples",
        "early stopping after 3 evaluations without a better val/loss",
    } <= found
    assert run("--name", "a", "--evaluate", "last", "--run.limit_val_batches", "3") == 0
    assert "split val, 12 of 23 samples" in capsys.readouterr().out
    assert run("--name", "a", "--predict", "last", "--out", "all.csv", "--run.limit_val_batches", "3") == 0
    assert "23 predictions" in capsys.readouterr().out
    assert run("--fast_dev_run", "--run.overfit_batches", "3", "--early_stopping.restore_best", "true") == 0
    assert "the first 3 updates of epoch 0 are the train and the val split" in capsys.readouterr().out


def test_time_that_is_up_ends_well_and_more_of_it_goes_on(home, capsys):
    assert run("--name", "a", "--run.max_time", "0.0001s") == 0
    out = capsys.readouterr().out
    assert "val/loss" in out, "a normal end: measured"
    folder = home / "runs" / "a"
    assert load(folder / "checkpoints/last.pt")["counters"]["step"] == 2
    assert read_status(folder)["status"] == "stopped"
    assert run("--resume", "auto", "--run.max_time", "0.0001s") == 0
    assert "run a has had its run.max_time of 0 s, at step 2; a longer one continues it" in capsys.readouterr().out
    assert run("--resume", "auto", "--run.max_time", "1h") == 0
    assert load(folder / "checkpoints/last.pt")["counters"]["step"] == 16
    assert read_status(folder)["status"] == "finished"


def test_an_early_end_is_an_end_and_the_best_metrics_are_printed(home, capsys):
    stopping = ("--early_stopping.patience=2", "--checkpoint.mode=max", "--evaluate.every=1 steps")
    assert run("--name", "a", *stopping, "--early_stopping.restore_best=true") == 0
    out = capsys.readouterr().out
    history = json.loads((home / "runs/a/history.json").read_text())["evaluations"]
    assert len(history) == 3 and "restored the weights of step 1" in out
    assert out.splitlines()[-2] == f"val/loss {history[0]['val/loss']:.4f}"
    assert read_status(home / "runs/a")["status"] == "finished"
    assert run("--name", "a", "--resume", "auto", *stopping) == 0
    assert "run a is finished: 3 steps (early stopping); nothing to do" in capsys.readouterr().out
