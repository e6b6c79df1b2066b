"""A gradient that is not finite, and requests to stop."""

from __future__ import annotations

import copy
import math
import signal
import threading
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Points, Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import FaultsConfig
from fabric_trainer.errors import INTERRUPTED, TRY_AGAIN, BadGradientError
from fabric_trainer.faults import Agree, Agreement, Guard, StopSignals
from fabric_trainer.order import Sequential
from fabric_trainer.spikes import RunningNorm
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


# ---- spikes ---------------------------------------------------------------------------------------------------------


def plain_verdicts(norms: list[float], factor: float, warmup: int) -> tuple[list[bool], float]:
    mean, count, verdicts = 0.0, 0, []
    for norm in norms:
        spike = math.isfinite(norm) and count >= warmup and mean > 0 and norm > factor * mean
        verdicts.append(spike)
        if math.isfinite(norm):
            taken = factor * mean if spike else norm
            mean += max(1 - 0.97, 1 / (count + 1)) * (taken - mean)
            count += 1
    return verdicts, mean


@hypothesis.settings(max_examples=100, deadline=None)
@given(
    norms=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0, 40.0, math.inf, math.nan]), max_size=80),
    factor=st.sampled_from([1.5, 3.0, 10.0]),
    warmup=st.integers(1, 30),
    cut=st.integers(0, 80),
)
def test_spikes_are_told_by_the_running_mean_also_over_a_resume(norms, factor, warmup, cut):
    running, verdicts = RunningNorm(factor, warmup), []
    for place, norm in enumerate(norms):
        if place == cut:
            saved = running.state_dict()
            running = RunningNorm(factor, warmup)
            running.load_state_dict(saved)
        verdicts.append(bool(running.judge(torch.tensor(norm, dtype=torch.float64))))
    expected, mean = plain_verdicts(norms, factor, warmup)
    assert verdicts == expected and running.mean.item() == pytest.approx(mean, rel=1e-12)


def test_a_lasting_rise_is_followed():
    running = RunningNorm(3.0, 10)
    assert not any(running.judge(torch.tensor(1.0)) for _ in range(40))
    verdicts = [bool(running.judge(torch.tensor(4.0))) for _ in range(20)]
    # the limit is 3 x 1.06^n, above 4 from n = 5 on
    assert verdicts == [True] * 5 + [False] * 15


class Spiked(Marked):
    """As with NaN, but the rows of window 1 are a hundred times too large."""

    def __init__(self) -> None:
        super().__init__("nan")
        self.points.x[17] = Points(48, 0).x[17]
        self.points.y[12:24] *= 100


@pytest.mark.parametrize("on_device", [True, False])
def test_windows_with_a_spike_are_left_out_of_everything(fabric, on_device, capsys):
    changes = settings(**{"faults.spike": 10.0, "faults.spike_warmup": 1})
    state = State(fabric, Spiked(), changes)
    state.guard = Guard(state.engine.optimizer, state.module, changes.faults, on_device=on_device)
    fit(fabric, state.task, changes, state=state)
    counters = state.counters
    assert (counters.window, counters.step, counters.skipped, counters.spikes) == (8, 6, 2, 2)
    assert_is_plain(state)
    (first, _) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert first.startswith("window 1: gradient norm ") and ", the limit is " in first and "(1 of 10)" in first
    norm, limit = first.split("norm ")[1].split(", the limit is ")
    assert float(norm) > float(limit.partition(",")[0]) > 0


def test_spikes_past_the_budget_end_the_run(fabric):
    with pytest.raises(BadGradientError, match=r"or a spike, the last in window 5; faults\.budget allows 1"):
        fit(fabric, Spiked(), settings(**{"faults.spike": 10.0, "faults.spike_warmup": 1, "faults.budget": 1}))


def test_nonfinite_raise_still_skips_spikes(fabric):
    changes = {"faults.spike": 10.0, "faults.spike_warmup": 1, "faults.nonfinite": "raise"}
    assert fit(fabric, Spiked(), settings(**changes)).counters.spikes == 2


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_the_running_norm_survives_a_resume(fabric, tmp_path, stop):
    changes = {"faults.spike": 10.0, "faults.spike_warmup": 1, "checkpoint.every": "1 steps", "checkpoint.keep_last": 9}
    whole = fit(fabric, Spiked(), settings(**changes), tmp_path)
    assert whole.counters.spikes == 2
    saved = load(tmp_path / "checkpoints" / f"step-{stop:08d}.pt")
    resumed = fit(fabric, Spiked(), settings(**changes), saved=saved)
    assert resumed.guard.spikes.state_dict() == whole.guard.spikes.state_dict()
    assert resumed.counters.spikes == 2
    assert_same(dict(whole.module.state_dict()), dict(resumed.module.state_dict()))
    del saved["states"]["spikes"], saved["counters"]["spikes"]  # of before there were any
    assert State(fabric, Spiked(), settings(**changes), saved).guard.spikes.count == 0


def test_a_spike_under_a_scaler_leaves_its_scale_alone():
    """The scaler has unscaled by then: it must close the update, or would refuse to unscale the next."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    class Scaled:
        def __init__(self) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            scaler.step(optimizer)
            scaler.update()

    guard = Guard(Scaled(), network, FaultsConfig(spike=5.0, spike_warmup=1), scaler)
    applied = []
    for factor in (1.0, 1.0, 1000.0, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(network(torch.ones(4, 3)).sum() * factor).backward()
        scaler.unscale_(optimizer)
        before = network.weight.detach().clone()
        guard.step(nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()]))
        applied.append(guard.settle().applied)
        assert torch.equal(network.weight, before) != applied[-1]
    assert applied == [True, True, False, True, False, True]
    assert scaler.get_scale() == 4.0, "lowered once, for what was not finite"


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
