"""SAM and Lookahead in the loop, against plain loops."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from toys import Points, Regression
from toys import config as configured

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import LookaheadConfig, OtherConfig, SamConfig
from fabric_trainer.faults import Guard
from fabric_trainer.order import Sequential
from fabric_trainer.precision import Double
from fabric_trainer.state import State


class Wide(Regression):
    """48 samples in their own order, in float64: windows of 12, four an epoch. bad: a sample whose input is NaN."""

    def __init__(self, bad: int | None = None, **keys) -> None:
        super().__init__(48, **keys)
        self.points = Points(48, 0, torch.ones(48, dtype=torch.float64))
        self.points.x, self.points.y = self.points.x.double(), self.points.y.double()
        if bad is not None:
            self.points.x[bad] = math.nan

    def dataset(self, split):
        return self.points if split == "train" else None

    def plan(self, dataset, seed):
        return Sequential(len(dataset))


@pytest.fixture
def double() -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[Double()])
    fabric.launch()
    return fabric


def settings(**changes):
    keys = {"batch.accumulate": 3, "optim.lr": 0.05, "optim.name": "sgd", "optim.args": {"momentum": 0.9}}
    return configured(**(keys | {"run.max_epochs": None, "run.max_steps": 7} | changes))


def fresh(**keys) -> tuple[nn.Module, Points]:
    task = Wide(**keys)
    torch.manual_seed(42)
    return task.network().double(), task.points


def loss(net: nn.Module, data: Points, window: int) -> torch.Tensor:
    """Of a whole window in one batch: the mean over its samples."""
    rows = slice(window % 4 * 12, window % 4 * 12 + 12)
    return (net(data.x[rows]) - data.y[rows]).square().sum(1).mean()


def close(ours: nn.Module, theirs: nn.Module, bound: float = 1e-12) -> None:
    other = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=bound, msg=name)


def same(ours: nn.Module, theirs: nn.Module) -> list[str]:
    other = theirs.state_dict()
    return [name for name, value in ours.state_dict().items() if not torch.equal(value, other[name])]


# ---- SAM ------------------------------------------------------------------------------------------------------------


def plain_sam(net: nn.Module, data: Points, rho: float, adaptive: bool, clip, windows=range(7), momentum=0.9) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)
    for window in windows:
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(loss(net, data, window), parameters)
        scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
        norm = torch.cat([(s * g).flatten() for s, g in zip(scales, gradients, strict=True)]).norm()
        before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            for p, s, g in zip(parameters, scales, gradients, strict=True):
                p += rho * s * s * g / norm
        optimizer.zero_grad()
        loss(net, data, window).backward()
        net.load_state_dict(before)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


@pytest.mark.parametrize("adaptive, rho", [(False, 0.3), (True, 0.5)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_sam_over_micro_batches_is_sam_of_one_batch(double, adaptive, rho, clip):
    changes = {"optim.sam": SamConfig(rho, adaptive), "clip.norm": clip}
    state = fit(double, Wide(), settings(**changes))
    net, data = fresh()
    plain_sam(net, data, rho, adaptive, clip)
    close(state.module, net)
    without = fit(double, Wide(), settings(**(changes | {"optim.sam": None})))
    assert max((a - b).abs().max() for a, b in zip(without.module.parameters(), net.parameters(), strict=True)) > 1e-3


def test_the_losses_logged_are_those_at_the_weights_themselves(double, tmp_path):
    changes = {"optim.sam": SamConfig(0.3), "run.max_steps": 4, "optim.args": {}}
    state = fit(double, Wide(), settings(**changes), tmp_path)
    net, data = fresh()
    expected = []
    for window in range(4):
        expected.append(loss(net, data, window).item())
        plain_sam(net, data, 0.3, False, None, [window], momentum=0)
    with open(tmp_path / "metrics.csv") as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == pytest.approx(expected, rel=1e-12)
    assert state.history.epochs[0]["train_epoch/loss"] == pytest.approx(sum(expected) / 4, rel=1e-12)


class Drops(Wide):
    """Notes the dropout of every forward."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5, batch_norm=True)
        self.masks: list[torch.Tensor] = []

    def network(self):
        net = super().network()
        net[3].register_forward_hook(lambda module, inputs, output: self.masks.append(output == 0))
        return net


def test_both_passes_draw_the_same_numbers_and_statistics_move_once(double):
    task, once = Drops(), Drops()
    changes = settings(**{"optim.sam": SamConfig(0.1), "run.max_steps": 1})
    state = fit(double, task, changes)
    assert len(task.masks) == 6
    assert all(torch.equal(a, b) for a, b in zip(task.masks[:3], task.masks[3:], strict=True))
    assert not torch.equal(task.masks[0], task.masks[1])
    plain = fit(double, once, settings(**{"run.max_steps": 1}))
    assert state.module[1].num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(state.module[1], name), getattr(plain.module[1], name)), name


def test_weights_come_back_bit_for_bit_and_gradients_are_the_inner_ones(double):
    state = State(double, Wide(), settings(**{"optim.sam": SamConfig(0.5)}))
    before = copy.deepcopy(state.module.state_dict())
    loss(state.module, state.task.points, 0).backward()
    outer = [p.grad for p in state.module.parameters()]
    with state.sam.uphill():
        assert all(p.grad is None for p in state.module.parameters())
        moved = [p - before[name] for name, p in state.module.named_parameters()]
        loss(state.module, state.task.points, 0).backward()
    distance = torch.cat([m.flatten() for m in moved]).norm()
    assert distance.item() == pytest.approx(0.5, rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in state.module.state_dict().items())
    assert not any(torch.equal(p.grad, g) for p, g in zip(state.module.parameters(), outer, strict=True))


class Full(Wide):
    """Runs out of memory in the forwards of more than two rows from the given one on."""

    def __init__(self, since: int) -> None:
        super().__init__(batch_norm=False)
        self.since, self.forwards = since, 0

    def loss(self, network, batch):
        self.forwards += 1
        if self.forwards >= self.since and len(batch["index"]) > 2:
            raise torch.OutOfMemoryError("injected")
        return super().loss(network, batch)


@pytest.mark.parametrize("since", [2, 5])
def test_out_of_memory_in_either_pass_is_split(double, since):
    state = fit(double, Full(since), settings(**{"optim.sam": SamConfig(0.3), "run.max_steps": 3}))
    assert state.memory.rows == 2
    net, data = fresh()
    plain_sam(net, data, 0.3, False, None, range(3))
    close(state.module, net)


def test_a_window_with_nan_is_left_out_and_the_weights_are_as_before(double):
    state = fit(double, Wide(bad=17, batch_norm=True), settings(**{"optim.sam": SamConfig(0.3), "run.max_steps": 3}))
    assert (state.counters.window, state.counters.skipped) == (4, 1)
    assert all(value.isfinite().all() for value in state.module.state_dict().values())
    assert state.module[1].num_batches_tracked == 9


# ---- Lookahead ------------------------------------------------------------------------------------------------------


def plain_lookahead(net: nn.Module, data: Points, k: int, alpha: float, windows) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=True)
    slow = [p.detach().clone() for p in net.parameters()]
    for step, window in enumerate(windows, start=1):
        optimizer.zero_grad()
        for start in (0, 4, 8):
            rows = slice(window % 4 * 12 + start, window % 4 * 12 + start + 4)
            (((net(data.x[rows]) - data.y[rows]).square().sum(1)).sum() / 12).backward()
        optimizer.step()
        if step % k == 0:
            with torch.no_grad():
                for s, p in zip(slow, net.parameters(), strict=True):
                    s += alpha * (p - s)
                    p.copy_(s)


@pytest.mark.parametrize("k, alpha", [(1, 0.5), (3, 0.5), (5, 0.8), (2, 1.0)])
def test_lookahead_is_a_plain_loop(double, k, alpha):
    state = fit(double, Wide(), settings(**{"optim.lookahead": LookaheadConfig(k, alpha)}))
    net, data = fresh()
    plain_lookahead(net, data, k, alpha, range(7))
    assert same(state.module, net) == []
    plain = fit(double, Wide(), settings())
    apart = max((a - b).abs().max() for a, b in zip(plain.module.parameters(), net.parameters(), strict=True))
    assert (apart < 1e-12) == (alpha == 1.0)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("bad", [17, 30])
def test_an_update_left_out_does_not_count(double, on_device, bad):
    changes = settings(**{"optim.lookahead": LookaheadConfig(2, 0.5), "run.max_steps": 6})
    state = State(double, Wide(bad), changes)
    state.guard = Guard(state.engine.optimizer, state.module, changes.faults, on_device=on_device)
    fit(double, state.task, changes, state=state)
    good = [window for window in range(8) if window % 4 != bad // 12]
    assert (state.counters.skipped, state.counters.step) == (2, len(good))
    net, data = fresh()
    plain_lookahead(net, data, 2, 0.5, good)
    assert same(state.module, net) == []


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_resume_at_every_step_is_bit_equal(double, tmp_path, stop):
    changes = {"optim.lookahead": LookaheadConfig(3), "checkpoint.every": "1 steps", "checkpoint.keep_last": 9}
    whole = fit(double, Wide(), settings(**changes), tmp_path)
    saved = load(tmp_path / "checkpoints" / f"step-{stop:08d}.pt")
    resumed = fit(double, Wide(), settings(**changes), saved=saved)
    assert same(whole.module, resumed.module) == []
    assert all(torch.equal(value, resumed.lookahead.slow[name]) for name, value in whole.lookahead.slow.items())


def test_it_may_begin_at_a_resume_and_frozen_weights_stand_still(double, tmp_path):
    fit(double, Wide(), settings(**{"run.max_steps": 4}), tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")
    state = State(double, Wide(), settings(**{"optim.lookahead": LookaheadConfig(2)}), saved)
    slow = state.lookahead.slow
    assert all(torch.equal(slow[name], p) for name, p in state.module.named_parameters())
    frozen = state.module[0].weight
    frozen.requires_grad_(False)
    slow["0.weight"] += 1
    before = frozen.clone()
    fit(double, state.task, state.config, state=state)
    assert torch.equal(frozen, before) and torch.equal(slow["0.weight"], before + 1)


def test_slow_weights_start_where_training_does(double, tmp_path):
    fit(double, Wide(), settings(), tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")
    state = State(double, Wide(), settings(**{"optim.lookahead": LookaheadConfig(2)}))
    state.load_weights({"model": saved["model"]})
    assert all(torch.equal(state.lookahead.slow[name], saved["model"][name]) for name in saved["model"])


def test_both_around_several_optimizers(double):
    changes = {
        "optim.others": [OtherConfig(["*.bias"], "sgd", lr=0.01)],
        "optim.sam": SamConfig(0.1),
        "optim.lookahead": LookaheadConfig(2),
        "ema.decay": 0.9,
    }
    state = fit(double, Wide(), settings(**changes))
    assert state.counters.step == 7
    assert all(value.isfinite().all() for value in state.module.state_dict().values())


def test_half_precision_weights_have_wide_slow_ones():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    fabric.launch()

    class Cast(Regression):
        def loss(self, network, batch):
            batch = batch | {name: batch[name].to(torch.bfloat16) for name in ("x", "y", "weight")}
            return super().loss(network, batch)

    state = fit(fabric, Cast(48), settings(**{"optim.lookahead": LookaheadConfig(2), "run.max_steps": 4}))
    for name, parameter in state.module.named_parameters():
        slow = state.lookahead.slow[name]
        assert slow.dtype == torch.float32 and torch.equal(parameter, slow.to(torch.bfloat16))
