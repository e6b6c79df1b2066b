"""A gradient that is not finite, and requests to stop."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from toys import Points, Regression, config

from fabric_trainer import fit
from fabric_trainer.config import FaultsConfig
from fabric_trainer.errors import INTERRUPTED, TRY_AGAIN, BadGradientError
from fabric_trainer.faults import Agree, Agreement, Guard, StopSignals
from fabric_trainer.order import Sequential
from fabric_trainer.state import State

OPTIMIZERS = [
    ("AdamW", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adagrad", {}),
]


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Uninitialised memory is NaN: who reads it is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Trained:
    """A network with BatchNorm, an optimizer, and a guard or none, all starting alike."""

    def __init__(self, name: str, keys: dict, guarded: bool, on_device: bool = False, **faults) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = getattr(torch.optim, name)(self.network.parameters(), lr=0.1, fused=True, **keys)
        faults = FaultsConfig(**faults)
        self.guard = Guard(self.optimizer, self.network, faults, on_device=on_device) if guarded else None

    def update(self, seed: int, bad: float | None = None):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        if bad is not None:
            x[2, 1] = bad
        if self.guard:
            self.guard.before_forward()
        self.optimizer.zero_grad()
        self.network(x).square().mean().backward()
        if not self.guard:
            return self.optimizer.step()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.network.parameters()])
        self.guard.step(norm)
        assert self.guard.unsettled
        return self.guard.settle()

    def everything(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        moments = {
            f"{names[id(parameter)]} {key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            if value is not None
        }
        return copy.deepcopy(dict(self.network.state_dict()) | moments)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name, keys", OPTIMIZERS)
def test_a_bad_gradient_touches_nothing_and_the_next_update_is_right(name, keys, bad, on_device):
    guarded, plain = Trained(name, keys, True, on_device), Trained(name, keys, False)
    assert guarded.guard.on_device == on_device
    for seed in range(2):
        verdict = guarded.update(seed)
        assert verdict.applied
        plain.update(seed)
    before = guarded.everything()
    verdict = guarded.update(99, bad)
    assert not verdict.applied and not math.isfinite(verdict.norm)
    assert_same(guarded.everything(), before)
    assert before["1.num_batches_tracked"] == 2
    assert guarded.update(3).applied
    plain.update(3)
    assert_same(guarded.everything(), plain.everything())


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("name, keys", OPTIMIZERS)
def test_the_very_first_gradient_may_be_bad(name, keys, on_device, filled_memory):
    # torch's fused SGD takes its momentum from uninitialised memory where found_inf refuses the first step
    guarded, plain = Trained(name, keys, True, on_device), Trained(name, keys, False)
    weights = copy.deepcopy(guarded.network.state_dict())
    for seed in (98, 99):
        assert not guarded.update(seed, math.nan).applied
    assert_same(dict(guarded.network.state_dict()), dict(weights))
    for seed in range(2):
        assert guarded.update(seed).applied
        plain.update(seed)
    assert_same(guarded.everything(), plain.everything())


@pytest.mark.parametrize("on_device", [True, False])
def test_raise_stops_before_the_update(on_device):
    guarded = Trained("AdamW", {}, True, on_device, nonfinite="raise")
    assert guarded.update(0).applied
    before = guarded.everything()
    with pytest.raises(BadGradientError, match="nan"):
        guarded.update(1, math.nan)
    after = guarded.everything()
    learned = [name for name in after if not name.startswith("1.running") and "tracked" not in name]
    assert_same({name: after[name] for name in learned}, {name: before[name] for name in learned})


def test_settle_tells_each_step_once():
    guarded = Trained("SGD", {}, True)
    assert guarded.guard.settle() is None and not guarded.guard.unsettled
    assert guarded.update(0).applied
    assert guarded.guard.settle() is None and not guarded.guard.unsettled


# ---- in the loop ----------------------------------------------------------------------------------------------------


class Marked(Regression):
    """48 samples in their own order: windows of 12, four an epoch. The rows of window 1 are spoilt: with NaN as
    input, or by weighing nothing."""

    def __init__(self, spoilt: str) -> None:
        super().__init__(48, batch_norm=True)
        self.points = Points(48, 0, torch.ones(48))
        if spoilt == "nan":
            self.points.x[17] = math.nan
        else:
            self.points.weights[12:24] = 0

    def dataset(self, split):
        return self.points if split == "train" else None

    def plan(self, dataset, seed):
        return Sequential(len(dataset))


GOOD = [0, 2, 3, 4, 6, 7]  # windows, over two epochs


def settings(**changes):
    keys = {"batch.accumulate": 3, "optim.lr": 0.02, "schedule.name": "cosine", "ema.decay": 0.9}
    keys |= {"optim.weight_decay": 0.1, "optim.decay_everything": True}
    return config(**(keys | changes))


def plain_loop(updates: int = 6, total: int = 8) -> tuple[dict, dict]:
    """The good windows alone, without the library; the schedule goes by applied updates."""
    torch.manual_seed(42)
    net, data = Regression(batch_norm=True).network(), Points(48, 0)
    opt = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    average = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for step, window in enumerate(GOOD[:updates]):
        start = window % 4 * 12
        for rows in (slice(start + i, start + i + 4) for i in (0, 4, 8)):
            (((net(data.x[rows]) - data.y[rows]).square().sum(1) * torch.ones(4)).sum() / 12).backward()
        opt.param_groups[0]["lr"] = 0.02 * (0.5 * (1 + math.cos(math.pi * step / total)))
        opt.step()
        opt.zero_grad()
        decay = min(0.9, (2 + step) / (11 + step))
        for name, parameter in net.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
    return net.state_dict(), average


def assert_is_plain(state: State, updates: int = 6, total: int = 8) -> None:
    weights, average = plain_loop(updates, total)
    assert_same(dict(state.module.state_dict()), dict(weights))
    assert_same({name: state.ema.state_dict()[name] for name in average}, average)


@pytest.mark.parametrize("on_device", [True, False])
def test_windows_with_nan_are_left_out_of_everything(fabric, on_device):
    changes = settings()
    state = State(fabric, Marked("nan"), changes)
    state.guard = Guard(state.engine.optimizer, state.module, changes.faults, on_device=on_device)
    fit(fabric, state.task, changes, state=state)
    counters = state.counters
    assert (counters.window, counters.step, counters.samples) == (8, 6, 72)
    assert (counters.skipped, counters.empty) == (2, 0)
    assert_is_plain(state)
    assert all(math.isfinite(value) for row in state.history.epochs for value in row.values())


def test_max_steps_counts_applied_updates(fabric):
    state = fit(fabric, Marked("nan"), settings(**{"run.max_epochs": None, "run.max_steps": 5}))
    assert (state.counters.window, state.counters.step, state.counters.skipped) == (7, 5, 2)
    assert_is_plain(state, updates=5, total=5)


@pytest.mark.parametrize("budget, updates", [(0, 1), (1, 4)])
def test_past_the_budget_the_run_ends(fabric, budget, updates):
    changes = settings(**{"faults.budget": budget})
    state = State(fabric, Marked("nan"), changes)
    with pytest.raises(BadGradientError, match=f"budget allows {budget}"):
        fit(fabric, state.task, changes, state=state)
    assert state.counters.skipped == budget + 1 and state.counters.step == updates
    # the count is read when the next window has been forward already: its statistics moved, no weight did
    weights, average = plain_loop(updates)
    averages = state.ema.state_dict()
    for name, parameter in state.module.named_parameters():
        assert torch.equal(parameter, weights[name]) and torch.equal(averages[name], average[name]), name


def test_raise_ends_the_run_before_the_update(fabric):
    changes = settings(**{"faults.nonfinite": "raise"})
    state = State(fabric, Marked("nan"), changes)
    with pytest.raises(BadGradientError, match="nan"):
        fit(fabric, state.task, changes, state=state)
    weights, _ = plain_loop(updates=1)
    assert (state.counters.step, state.counters.skipped) == (1, 0)
    for name, parameter in state.module.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_a_window_without_weight_is_consumed_and_changes_nothing(fabric):
    state = fit(fabric, Marked("weight"), settings(**{"faults.budget": 0}))
    counters = state.counters
    assert (counters.window, counters.step, counters.samples) == (8, 6, 72)
    assert (counters.skipped, counters.empty) == (0, 2)
    assert_is_plain(state)


# ---- agreement and signals ------------------------------------------------------------------------------------------


def test_one_process_agrees_with_itself(fabric):
    agree = Agree(fabric)
    assert agree.group is None
    agree.ask(3.5, TRY_AGAIN, 1.25, 2)
    assert agree.answer() == Agreement(3.5, TRY_AGAIN, 1.25, 2)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, TRY_AGAIN), (signal.SIGUSR1, TRY_AGAIN), (signal.SIGINT, INTERRUPTED)]
)
def test_a_signal_becomes_a_request(number, code, capfd):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.stop == 0
        signal.raise_signal(number)
        assert signals.stop == code
    assert signal.getsignal(number) is before
    (line,) = capfd.readouterr().err.splitlines()
    assert signal.Signals(number).name in line and str(code) in line


def test_a_second_interrupt_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        assert left == []
        signal.raise_signal(signal.SIGINT)
    assert left == [INTERRUPTED]


def test_handlers_come_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_caught():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with StopSignals() as signals:
            inside.append((signals.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [(0, before)]


class Stopping(Regression):
    """Sends a signal in the middle of its second window."""

    def loss(self, network, batch):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 5:
            signal.raise_signal(signal.SIGTERM)
        return super().loss(network, batch)


def test_the_loop_finishes_the_update_under_way(fabric):
    state = fit(fabric, Stopping(48), config(**{"batch.accumulate": 3}))
    # the request is seen when the next window's control numbers are exchanged
    assert state.stopped == TRY_AGAIN and state.counters.window == state.counters.step == 3
