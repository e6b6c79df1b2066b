"""The finders: what they find, and that they leave everything as it was."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_cli import CONFIG
from torch import Tensor, nn
from toys import Points, Regression, config

from fabric_trainer import Batch, Loss, Task, cli, fit, jobs
from fabric_trainer.batch import resolve_accumulate, with_micro_batches
from fabric_trainer.checkpoint import load
from fabric_trainer.config import BatchConfig, LookaheadConfig, SamConfig
from fabric_trainer.describe import describe
from fabric_trainer.errors import InputError
from fabric_trainer.order import accumulation
from fabric_trainer.state import State
from fabric_trainer.tune import Sweep, sweep_lr
from fabric_trainer.tune_batch import all_sizes, find_micro_batch_size, largest


class Quadratic(Task):
    """curvature / 2 |x|^2: gradient descent is stable below a rate of 2 / curvature, fastest at 1 / curvature."""

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature

    def dataset(self, split: str) -> Points | None:
        return Points(40, 0) if split == "train" else None

    def network(self) -> nn.Module:
        return nn.Linear(10, 1, bias=False)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        return Loss(0.5 * self.curvature * network.weight.square().sum() * batch["weight"].sum())


class Limited(Regression):
    """Forwards of more than ``limit`` rows do not fit. With what a run carries made hard: noise, dropout, BatchNorm."""

    def __init__(self, limit: int = 13, samples: int = 50, dropout: float = 0.2, batch_norm: bool = True) -> None:
        super().__init__(samples, dropout, batch_norm)
        self.limit, self.tried = limit, []

    def augment(self, batch: Batch) -> Batch:
        random.random(), np.random.rand(), torch.rand(1)
        return batch | {"x": batch["x"] + 0.1 * batch["random"].normal("noise", 8)}

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        rows = len(batch["x"])
        if network.training:
            self.tried.append(rows)
            if rows > self.limit:
                raise torch.OutOfMemoryError(f"{rows} rows, as injected")
        loss = super().loss(network, batch)
        if not network.training:
            return loss
        seen = {f"sample{i}": ((batch["index"] == i) * batch["weight"]).sum() for i in range(self.samples)}
        return Loss(loss.total, seen)


HARD = {
    "ema.decay": 0.9,
    "clip.norm": 0.5,
    "batch.accumulate": 3,
    "optim.weight_decay": 0.1,
    "schedule.name": "cosine",
    "schedule.warmup": 2,
    "tune.updates": 30,
    "evaluate.every": "9 epochs",
}


# ---- learning rate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [0.5, 10.0, 300.0, 1e5])
def test_the_suggestion_on_a_quadratic_is_near_the_fastest_rate(fabric, curvature):
    state = State(fabric, Quadratic(curvature), config(**{"optim.name": "sgd"}))
    sweep = sweep_lr(state)
    assert 0.1 < sweep.suggestion * curvature < 10
    assert sweep.rates[-1] < 100 / curvature, "it ends soon after it diverges"
    # the losses are those of gradient descent by hand
    x, expected = state.module.weight.detach().double(), []
    for rate in sweep.rates:
        x = x - rate * curvature * x
        expected.append(float(0.5 * curvature * x.square().sum()))
    np.testing.assert_allclose(sweep.losses[:40], expected[:40], rtol=1e-4)
    average = np.zeros(())
    for count, (loss, smoothed) in enumerate(zip(sweep.losses, sweep.smoothed, strict=True), 1):
        average = 0.9 * average + 0.1 * loss
        assert smoothed == pytest.approx(average / (1 - 0.9**count))


def test_the_rates_keep_the_ratio_of_the_groups(fabric):
    state = State(fabric, Regression(), config(**{"optim.weight_decay": 0.1, "tune.updates": 20}))
    state.peaks = [1e-3, 1e-4]
    seen = []
    state.engine.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    sweep = sweep_lr(state)
    np.testing.assert_allclose(seen, np.stack([sweep.rates, sweep.rates / 10], 1), rtol=1e-12)
    np.testing.assert_allclose(sweep.rates[1:] / sweep.rates[:-1], sweep.rates[1] / sweep.rates[0])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_sweep_and_is_no_error(fabric, where):
    class Breaks(Regression):
        updates = 0

        def loss(self, network: nn.Module, batch: Batch) -> Loss:
            loss = super().loss(network, batch)
            Breaks.updates += torch.is_grad_enabled()
            if Breaks.updates <= 25:
                return loss
            return Loss(loss.total * math.nan) if where == "loss" else Loss(loss.total + infinite_gradient(network))

    state = State(fabric, Breaks(), config(**{"faults.nonfinite": "raise", "tune.updates": 60}))
    sweep = sweep_lr(state)
    assert len(sweep.rates) == len(sweep.losses) == 25 and np.isfinite(sweep.losses).all()


def infinite_gradient(network: nn.Module) -> Tensor:
    """0, with a gradient of infinity."""
    return (next(network.parameters()).flatten()[0].detach() * 0 + next(network.parameters()).flatten()[0] * 0).sqrt()


def test_a_loss_that_falls_nowhere_has_no_suggestion():
    rates = np.geomspace(1e-7, 1, 50)
    assert Sweep(rates, np.ones(50), np.linspace(1, 2, 50)).suggestion is None
    assert Sweep(rates[:6], np.ones(6), np.linspace(2, 1, 6)).suggestion is None, "too short to tell"
    curve = 1 / (1 + np.exp(4 * np.log10(rates / 1e-3)))  # falls fastest at 1e-3
    assert Sweep(rates, curve, curve).suggestion == pytest.approx(1e-3, rel=0.3)


# ---- micro-batch ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 400), st.integers(1, 400), st.integers(1, 400))
def test_the_search_finds_any_limit_from_any_start(limit, start, most):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest(fits, range(1, most + 1), start) == min(limit, most)
    assert len(tried) == len(set(tried)) <= 2 * math.log2(most) + 3


@given(st.integers(0, 100), st.integers(1, 100), st.sets(st.integers(1, 100), min_size=1), st.integers(0, 100))
def test_a_search_goes_on_from_what_is_known(limit, start, candidates, known):
    low, high = (known, float("inf")) if known <= limit else (0, known)
    found = largest(lambda size: low < size <= limit, sorted(candidates), start, low, high)
    assert found == max([low, *(size for size in candidates if size <= limit)])


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.integers(0, 70), st.booleans())
def test_other_micro_batches_make_the_same_updates(micro, accumulate, ranks, most, fixed):
    rows = micro * accumulate
    batch = BatchConfig(micro, 1, rows * ranks) if fixed else BatchConfig(micro, {"epoch": {0: accumulate, 2: 1}})
    made = with_micro_batches(batch, ranks, most)
    assert made.micro_batch_size <= max(1, most)
    before, after = (resolve_accumulate(one, ranks) for one in (batch, made))
    for epoch in (0, 5):
        assert made.micro_batch_size * accumulation(after, 0, epoch) == micro * accumulation(before, 0, epoch)
    unit = rows if fixed else micro
    assert made.micro_batch_size == max(size for size in range(1, max(1, most) + 1) if unit % size == 0)


@pytest.mark.parametrize("limit, start", [(13, 4), (13, 32), (13, 13), (2, 32), (50, 4), (49, 32)])
def test_a_limit_of_13_is_found_as_13(fabric, limit, start):
    task = Limited(limit)
    state = State(fabric, task, config(**{"batch.micro_batch_size": start}))
    found = find_micro_batch_size(state, all_sizes(state))
    assert found.size == limit and max(task.tried) <= 50
    assert all(attempt.fits == (attempt.size <= limit) == (attempt.pace > 0) for attempt in found.attempts)


def test_no_more_is_tried_than_asked_or_than_there_is(fabric):
    state = State(fabric, Limited(1000), config(**{"tune.max_batch_size": 20}))
    assert find_micro_batch_size(state, all_sizes(state)).size == 20
    state = State(fabric, Limited(1000, samples=17), config())
    assert find_micro_batch_size(state, all_sizes(state)).size == 17


def test_moments_and_gradients_are_in_memory_when_a_size_is_judged(fabric):
    class Watched(Limited):
        state: State
        seen: list = []

        def loss(self, network: nn.Module, batch: Batch) -> Loss:
            gradients = all(parameter.grad is not None for parameter in network.parameters())
            self.seen.append((bool(self.state.engine.bare_optimizer.state), gradients))
            return super().loss(network, batch)

    task = Watched()
    state = task.state = State(fabric, task, config(**HARD | {"tune.max_batch_size": 4}))
    find_micro_batch_size(state, [4])
    assert task.seen == [(False, False), (False, True), (True, False), (True, True)]


def test_one_row_that_does_not_fit_and_other_errors_go_through(fabric):
    with pytest.raises(torch.OutOfMemoryError, match="1 rows, as injected"):
        find_micro_batch_size(state := State(fabric, Limited(0, batch_norm=False), config()), all_sizes(state))

    class Mistaken(Regression):
        def loss(self, network: nn.Module, batch: Batch) -> Loss:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        find_micro_batch_size(state := State(fabric, Mistaken(), config()), all_sizes(state))


# ---- nothing is touched ---------------------------------------------------------------------------------------------


def streams() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b


def clone(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [clone(value) for value in tree]
    return tree.detach().clone() if isinstance(tree, Tensor) else tree


FINDERS: dict[str, Callable[[State], Any]] = {
    "lr": sweep_lr,
    "batch_size": lambda state: find_micro_batch_size(state, all_sizes(state)),
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("resumed", [False, True])
def test_everything_is_as_before_and_the_run_the_same(fabric, tmp_path, finder, optimizer, resumed):
    changes = HARD | {"optim.name": optimizer, "optim.args": {"momentum": 0.9} if optimizer == "sgd" else {}}
    changes |= {"optim.sam": SamConfig(), "optim.lookahead": LookaheadConfig(k=2)} if optimizer == "adamw" else {}
    if resumed:
        fit(fabric, Limited(), config(**changes | {"run.max_epochs": 1}), tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    plain = fit(fabric, Limited(), config(**changes), saved=load(path) if resumed else None)
    state = State(fabric, Limited(), config(**changes), load(path) if resumed else None)
    assert state.counters.window == 5 * resumed
    frozen = state.module[0].eval()
    before, random_before = clone(state.state_dict()), clone(streams())
    assert bool(before["optimizer"]["state"]) == resumed
    FINDERS[finder](state)
    assert same(before, state.state_dict()) and same(random_before, streams())
    assert all(parameter.grad is None for parameter in state.module.parameters())
    assert not frozen.training and state.module.training and state.guard.settle() is None
    fit(fabric, state.task, state.config, state=state)
    for tree in (plain, state):  # of wall-clock time
        tree.counters.seconds = 0.0
        for entry in tree.history.evaluations:
            entry["seconds"] = 0.0
    assert same(clone(plain.state_dict()), clone(state.state_dict()))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    task = {"path": "test_tune.Limited", "args": {"limit": 13, "batch_norm": False}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG | {"task": task}))
    monkeypatch.setattr(jobs, "conclude", lambda *_: None)  # the report takes seconds
    return tmp_path


def run(*argv: str) -> int:
    return cli.main(["--config", "toy.yaml", *argv])


def test_tune_lr(home, capsys):
    assert run("--tune", "lr", "--optim.name", "sgd") == 0
    lines = capsys.readouterr().out.splitlines()
    key, value = lines[-1].split()
    assert key == "optim.lr" and 1e-4 < float(value) < 10
    assert {path.name for path in (home / "runs").iterdir()} == {"tune-lr-toy.png", "tune-lr-toy.csv"}
    assert (home / "runs/tune-lr-toy.png").read_bytes().startswith(b"\x89PNG")
    with open(home / "runs/tune-lr-toy.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["lr"]) == pytest.approx(1e-7) and any(f"{float(row['lr']):.3g}" == value for row in rows)
    assert run("--tune", "lr", "--out", "here.svg", "--tune.updates", "40") == 0
    assert "<svg" in (home / "here.svg").read_text() and (home / "here.csv").is_file()
    assert run("--tune", "lr", "--tune.min_lr", "1e3", "--tune.max_lr", "1e4", "--optim.name", "sgd") == 2
    assert "error: --tune lr: the loss falls nowhere from tune.min_lr 1000.0 on" in capsys.readouterr().err


def test_tune_batch_size(home, capsys):
    assert run("--tune", "batch_size", "--batch.accumulate", "6") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "batch.micro_batch_size 13; 14 do not fit",
        "for the same updates: batch.micro_batch_size 12, batch.accumulate 2",
    ]
    assert [line.split()[0] for line in lines[:-2]] == ["4", "8", "16", "12", "14", "13"]
    assert [path.name for path in (home / "runs").iterdir()] == ["tune-batch_size-toy.json"]
    found = json.loads((home / "runs/tune-batch_size-toy.json").read_text())
    assert found["size"] == 13 and found["batch"] == {
        "micro_batch_size": 12,
        "accumulate": 2,
        "global_batch_size": None,
    }


@pytest.mark.parametrize("argv, line", [
    (("--tune", "size"), "--tune must be lr or batch_size, not size"),
    (("--tune", "lr", "--evaluate", "best"), "--tune and --evaluate are both given: one at a time"),
    (("--tune", "lr", "--resume", "auto"), "--tune and --resume are both given: one at a time"),
    (("--tune", "lr", "--dry_run"), "--tune and --dry_run are both given: one at a time"),
    (("--tune", "lr", "--out", "a.csv"), "--out a.csv: --tune lr writes .png, .svg, .pdf, by the suffix"),
    (("--tune", "batch_size", "--out", "a.png"), "--out a.png: --tune batch_size writes .json, by the suffix"),
    (("--tune", "lr", "--tune.min_lr", "2", "--tune.max_lr", "1"), "tune.min_lr must be above 0 and below tune.max_lr"),
    (("--tune", "lr", "--tune.smoothing", "1"), "tune.smoothing must be at least 0 and below 1, not 1.0"),
    (("--tune", "lr", "--tune.updates", "5"), "tune.updates must be at least 20, not 5"),
    (("--batch.micro_batch_size", "auto", "--batch.accumulate", "1"),
     "batch.micro_batch_size: auto needs batch.global_batch_size, which says how much an update is"),
])  # fmt: skip
def test_wrong_commands_get_one_line(home, capsys, argv, line):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and error.count("\n") == 1, error
    assert not (home / "runs").exists()


# ---- auto -----------------------------------------------------------------------------------------------------------

AUTO = ("--batch.micro_batch_size", "auto", "--batch.accumulate", "1", "--batch.global_batch_size", "24")


def weights(folder: Path) -> dict[str, Any]:
    return load(folder / "checkpoints" / "last.pt")


def test_auto_takes_the_largest_that_makes_the_updates_and_a_resume_the_same(home, capsys):
    assert run("--name", "a", *AUTO) == 0
    out = capsys.readouterr().out
    assert "micro-batches of 12; 24 do not fit" in out and "12 micro x 2 accumulate x 1 rank = 24" in out
    assert json.loads((home / "runs/a/memory.json").read_text()) == {"micro_batch_size": 12}
    assert yaml.safe_load((home / "runs/a/config.yaml").read_text())["batch"]["micro_batch_size"] == 12
    # as if the number had been given
    assert run("--name", "b", *AUTO, "--batch.micro_batch_size", "12") == 0
    a, b = weights(home / "runs/a"), weights(home / "runs/b")
    for key in ("model", "ema", "optimizer"):
        assert same(a[key], b[key]), key
    # a resume takes what was found, by its note or its checkpoint, and ends with the same bits
    assert run("--name", "c", *AUTO, "--run.max_steps", "1") == 0
    capsys.readouterr()
    assert run("--name", "c", *AUTO, "--resume", "auto", "--run.max_steps", "2") == 0
    out = capsys.readouterr().out
    assert "micro-batches of 12 instead of auto: found before (runs/c/memory.json)" in out and "do not fit" not in out
    assert "resumed with another batch" not in out
    (home / "runs/c/memory.json").unlink()
    assert run("--name", "c", *AUTO, "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "12 micro x 2 accumulate" in out and "do not fit" not in out
    c = weights(home / "runs/c")
    assert c["counters"]["step"] == 6 and same(a["model"], c["model"]) and same(a["optimizer"], c["optimizer"])


def test_auto_beside_the_other_commands(home, capsys):
    assert run(*AUTO, "--dry_run") == 0
    assert "batch.micro_batch_size auto: found at the start of the run" in capsys.readouterr().out
    assert run(*AUTO, "--fast_dev_run", "--task.args.limit", "50") == 0
    assert run("--name", "a", *AUTO) == 0
    assert run("--name", "a", *AUTO, "--evaluate", "last") == 0
    assert run("--tune", "lr", *AUTO, "--task.args.limit", "50") == 0
    assert run("--tune", "batch_size", *AUTO) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "for the same updates: batch.micro_batch_size 12"


def test_auto_in_a_state_of_ones_own_is_refused(fabric):
    with pytest.raises(InputError, match=r"auto is found by train\.py"):
        State(fabric, Regression(), config(**{"batch.micro_batch_size": "auto", "batch.global_batch_size": 8}))


# ---- out of memory in a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_above_k_rows_the_run_is_that_of_k_rows(fabric, tmp_path, limit):
    """Updates of 24 samples, the last of an epoch of 2, at first of micro-batches of 8; BatchNorm and dropout depend on
    the split, so there are none."""
    plain = {"batch.global_batch_size": 24, "run.max_epochs": 3, "ema.decay": 0.9, "run.log_every_n_steps": 1}
    task = Limited(limit, dropout=0.0, batch_norm=False)
    split = fit(fabric, task, config(**plain | {"batch.micro_batch_size": 8}), tmp_path)
    small = Limited(limit, dropout=0.0, batch_norm=False)
    whole = fit(fabric, small, config(**plain | {"batch.micro_batch_size": limit}))
    assert max(small.tried) == limit, "it never ran out"
    kept = {1: 1, 3: 2, 6: 4}[limit]
    assert split.memory.rows == kept and max(task.tried[-10:]) == kept, "the smaller size is kept"
    assert sum(rows > limit for rows in task.tried) == split.memory.halvings, "each size is tried once"
    assert describe(split)["out of memory"] == f"split, {kept} rows a forward: 8 did not fit"
    saved = load(tmp_path / "checkpoints" / "last.pt")
    resumed = State(fabric, task, config(**plain | {"batch.micro_batch_size": 8}), saved)
    assert resumed.memory.rows == kept, "a resume splits as the run did: dropout depends on it"
    assert split.counters.step == whole.counters.step == 9 and split.counters.samples == 150
    for epoch in split.history.epochs:
        counts = [epoch[f"train_epoch/sample{i}"] * 50 for i in range(50)]
        assert counts == pytest.approx([1.0] * 50, abs=1e-12), "every sample once"
    for (name, a), (_, b) in zip(split.module.state_dict().items(), whole.module.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
