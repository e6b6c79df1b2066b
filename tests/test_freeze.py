"""Frozen parameters stand still under every optimizer; units, groups and rates; probes leave no trace."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Points, Regression, config

from fabric_trainer import Batch, Loss, Task, checkpoint, fit
from fabric_trainer.checkpoint import Snapshot
from fabric_trainer.config import FreezeConfig
from fabric_trainer.errors import InputError
from fabric_trainer.freeze import Freezer, depth, find_units, places
from fabric_trainer.freeze_plans import Progressive
from fabric_trainer.probe import probe
from fabric_trainer.state import State


class Layer(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2))


class Backbone(nn.Module):
    """stem, layer1 of two blocks, layer2; a head that always trains. ``scale`` the network has frozen itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, width, bias=False), nn.BatchNorm1d(width))
        self.layer1 = nn.Sequential(Layer(width), Layer(width))
        self.layer2 = Layer(width)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x)) * self.scale))


class FineTuning(Regression):
    """24 samples: six windows of 4 an epoch."""

    def __init__(self, samples: int = 24) -> None:
        super().__init__(samples)

    def network(self) -> nn.Module:
        return Backbone()

    def units(self, network: nn.Module) -> list[str]:
        return ["layer2", "layer1.*", "stem"]


UNITS = ["layer2", "layer1.1", "layer1.0", "stem"]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {"weight_decay": 0.1, "args": {"momentum": 0.9}},
    "rmsprop": {"weight_decay": 0.1, "args": {"momentum": 0.9}},
}


def options(strategy: str = "schedule", optimizer: str = "adamw", **changes: Any) -> Any:
    keys = {f"optim.{key}": value for key, value in OPTIMIZERS[optimizer].items()}
    keys |= {"optim.name": optimizer, "optim.lr": 0.01, "ema.decay": 0.9, "freeze.strategy": strategy}
    keys |= {"checkpoint.every": "1 steps", "checkpoint.keep_last": 50, "checkpoint.monitor": "val/loss"}
    made = config(**(keys | changes))
    made.loggers.tensorboard = False
    return made


def files(folder: Path) -> dict[int, dict[str, Any]]:
    """Checkpoints by step."""
    paths = (folder / "checkpoints").glob("step-*.pt")
    return {int(path.stem[5:]): checkpoint.load(path) for path in paths}


def part_of(unit: str, tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tree.items() if name.startswith(unit + ".")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a and a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def moving(saved: dict[int, dict[str, Any]], unit: str, tree: str = "model") -> list[bool]:
    """For every update, whether anything of the unit changed; of statistics and weights all or nothing does."""
    steps = sorted(saved)
    found = []
    for before, after in pairwise(steps):
        a, b = part_of(unit, saved[before][tree]), part_of(unit, saved[after][tree])
        learned = [name for name in a if tree == "model" or name.endswith(("weight", "bias"))]
        changed = {name: not torch.equal(a[name], b[name]) for name in learned}
        assert len(set(changed.values())) == 1, changed
        found.append(next(iter(changed.values())))
    return found


# ---- units --------------------------------------------------------------------------------------------------------


def test_a_pattern_makes_a_unit_of_each_module_it_meets_the_last_first():
    found = find_units(Backbone(), ["layer*", "stem"])
    assert list(found) == ["layer2", "layer1", "stem"]
    assert list(find_units(Backbone(), ["layer2", "layer1.*", "stem"])) == UNITS
    assert found["stem"] == (("stem",), ("stem.0.weight", "stem.1.weight", "stem.1.bias"))
    assert find_units(Backbone(), {"body": ["layer*"], "rest": ["stem.1"]})["rest"][1] == (
        "stem.1.weight",
        "stem.1.bias",
    )


def test_a_pattern_may_name_a_parameter():
    assert find_units(Backbone(), ["head.weight"]) == {"head.weight": (("head.weight",), ("head.weight",))}


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["layer3"], "layer3 meets no trainable parameter; the network has stem, layer1, layer2, head"),
        (["layer1", "layer1.0"], "layer1.0.0.weight is in layer1 and in layer1.0"),
        (["scale"], "scale meets no trainable parameter"),
        ({"a": ["stem"], "b": ["st*"]}, "stem.0.weight is in a and in b"),
    ],
)
def test_wrong_units_are_named(patterns, message):
    with pytest.raises(InputError, match=message):
        find_units(Backbone(), patterns)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_pattern_is_compared_part_by_part(parts, length):
    name = ".".join(parts)
    pattern = ".".join(["*"] * length)
    if length > len(parts):
        with pytest.raises(InputError):
            places(pattern, [name])
    else:
        assert places(pattern, [name]) == [".".join(parts[:length])]


def test_depth_grows_towards_the_head():
    units = ["layer2", "layer1.1", "layer1.0", "stem"]
    assert [depth(units, unit) for unit in units] == [2.0, 1.1, 1.0, 0.0]


def test_a_unit_without_anything_left_to_train_is_refused(fabric):
    with pytest.raises(InputError, match="nothing is left to train"):
        State(fabric, FineTuning(), options("fixed", **{"freeze.units": ["*"]}))


def test_a_task_without_units_is_told(fabric):
    with pytest.raises(InputError, match=r"freeze.strategy: adaptive needs freeze.units: the task names none"):
        State(fabric, Regression(), options("adaptive"))


# ---- standing still -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_stands_still_and_moves_after(fabric, tmp_path, optimizer):
    """Weights, BatchNorm statistics and averages, with weight decay and momentum; frozen again, still again."""
    changes = options(optimizer=optimizer, **{"freeze.schedule": {0: [], 3: ["layer2"], 6: ["layer*"], 9: ["stem"]}})
    state = State(fabric, FineTuning(), changes)
    first = Snapshot().take(state.state_dict())
    fit(fabric, FineTuning(), changes, tmp_path, state=state)
    saved = {0: first} | files(tmp_path)
    expected = {"layer2": range(3, 9), "layer1.0": range(6, 9), "stem": range(9, 12), "head": range(12)}
    for unit, updates in expected.items():
        assert moving(saved, unit) == [step in updates for step in range(12)], unit
        if unit != "head":
            averages = moving(saved, unit, "ema")
            assert averages == [step >= updates[0] for step in range(12)], (
                "an average goes on towards what stands still"
            )
    assert torch.equal(saved[12]["model"]["scale"], torch.ones(8))


def test_an_unfreeze_changes_nothing_of_the_others(fabric, tmp_path):
    """Against a run in which it does not happen: weights, averages and moments after the same number of updates."""
    with_it = options(**{"freeze.schedule": {0: [], 5: ["layer2"]}})
    without = options(**{"freeze.schedule": {0: []}})
    fit(fabric, FineTuning(), with_it, tmp_path / "with")
    fit(fabric, FineTuning(), without, tmp_path / "without")
    a, b = files(tmp_path / "with")[5], files(tmp_path / "without")[5]
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    moments = files(tmp_path / "with")
    assert moments[5]["optimizer"]["state"].keys() == {"head.weight", "head.bias"}
    for name in ("head.weight", "head.bias"):
        assert same(a["optimizer"]["state"][name], b["optimizer"]["state"][name])
    assert float(moments[6]["optimizer"]["state"]["layer2.0.weight"]["step"]) == 1, "its own first Adam step"
    assert float(moments[6]["optimizer"]["state"]["head.weight"]["step"]) == 6


def test_moments_of_what_is_frozen_again_are_kept(fabric, tmp_path):
    fit(fabric, FineTuning(), options(**{"freeze.schedule": {0: ["stem"], 4: []}}), tmp_path)
    saved = files(tmp_path)
    for name in ("stem.0.weight", "stem.1.bias"):
        assert same(saved[4]["optimizer"]["state"][name], saved[12]["optimizer"]["state"][name])


# ---- plans in a run -----------------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, Any]] = {
    "schedule": {"freeze.schedule": {0: [], 4: ["layer2"], 8: ["layer*"]}},
    "adaptive": {"freeze.adaptive.patience": 1, "freeze.adaptive.min_improvement": 10.0},
    "progressive": {"freeze.progressive.interval": 1},
    "fixed": {"freeze.fixed.phase1_epochs": 2, "freeze.fixed.unfreeze": 2},
    "early_gradual": {"freeze.early_gradual.target": 0.9, "freeze.early_gradual.from_epoch": 1},
    "advanced": {
        "freeze.advanced.threshold": 1e-6,
        "freeze.advanced.analysis_window": 1,
        "freeze.advanced.patience": 0,
        "freeze.advanced.emergency_epoch": 2,
    },
    "gradient_guided": {
        "freeze.gradient_guided.threshold": 0.0,
        "freeze.gradient_guided.sampling_epochs": 1,
        "freeze.gradient_guided.patience": 0,
    },
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_resume_at_every_boundary_equals_the_uninterrupted_run(fabric, tmp_path, plan):
    changes = options(plan, **(PLANS[plan] | {"run.max_epochs": 4}))
    fit(fabric, FineTuning(), changes, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert not all(same(part_of(u, whole[1]["model"]), part_of(u, whole[24]["model"])) for u in UNITS), "all frozen"
    for step in (3, 4, 6, 7, 12, 18):
        fit(fabric, FineTuning(), changes, tmp_path / f"from {step}", saved=whole[step])
        end = files(tmp_path / f"from {step}")[24]
        for tree in ("model", "ema"):
            assert same(whole[24][tree], end[tree]), f"{tree} from step {step}"
        assert end["states"]["freeze"] == whole[24]["states"]["freeze"]


def test_a_plan_advances_once_per_epoch_on_its_last_evaluation(fabric, tmp_path, capsys):
    """Evaluated every 2 of 6 updates: three evaluations an epoch, one advance."""
    keys = {"evaluate.every": "2 steps", "run.max_epochs": 4}
    state = fit(fabric, FineTuning(), options("adaptive", **(PLANS["adaptive"] | keys)), tmp_path)
    # epoch 0 is the best; 1, 2 and 3 gain less than 10: one unit each
    assert state.freezer.plan.unfrozen == ["layer2", "layer1.1", "layer1.0"]
    assert len(state.history.evaluations) == 12
    assert capsys.readouterr().out.count("freeze: step") == 3


def test_an_epoch_is_evaluated_at_its_end_where_the_plan_follows_the_metric(fabric, tmp_path):
    keys = {"evaluate.every": "100 steps", "run.max_epochs": 3}
    state = fit(fabric, FineTuning(), options("adaptive", **(PLANS["adaptive"] | keys)), tmp_path)
    assert [e["step"] for e in state.history.evaluations] == [6, 12, 18]
    assert state.freezer.plan.unfrozen == ["layer2", "layer1.1"]


def test_a_metric_that_does_not_exist_is_named(fabric, tmp_path):
    with pytest.raises(InputError, match=r"freeze.monitor: no val/acc among the metrics"):
        fit(fabric, FineTuning(), options("adaptive", **{"freeze.monitor": "val/acc"}), tmp_path)


# ---- groups and rates ---------------------------------------------------------------------------------------------


def test_every_unit_has_its_own_groups_and_rate(fabric):
    keys = {"freeze.lr": 0.004, "freeze.lr_decay": 0.5, "freeze.progressive.interval": 1}
    state = State(fabric, FineTuning(), options("progressive", **keys))
    groups = state.engine.bare_optimizer.param_groups
    assert [group["name"] for group in groups] == [
        "decay", "no_decay", *(f"{unit}/{kind}" for unit in UNITS for kind in ("decay", "no_decay")),
    ]  # fmt: skip
    assert state.peaks == [0.01, 0.01, *(0.004 * 0.5**i for i in range(4) for _ in range(2))]
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sum(sizes) == sum(p.numel() for n, p in state.module.named_parameters() if n != "scale")
    rates = state.set_learning_rate()
    assert rates["lr/decay"] == 0.01 and rates["lr/layer2/decay"] == 0, "frozen"


def test_discriminative_rates_without_freezing(fabric):
    keys = {"freeze.units": ["layer*", "stem"], "freeze.lr": 0.001, "freeze.lr_decay": 0.1}
    state = State(fabric, FineTuning(), options("none", **keys))
    rates = state.set_learning_rate()
    assert rates["lr/decay"] == 0.01
    assert [rates[f"lr/{unit}/decay"] for unit in ("layer2", "layer1", "stem")] == pytest.approx([1e-3, 1e-4, 1e-5])
    assert all(p.requires_grad for n, p in state.module.named_parameters() if n != "scale")


# ---- probes -------------------------------------------------------------------------------------------------------


def test_a_probe_leaves_no_trace(fabric, tmp_path):
    """Weights, statistics, modes, flags, gradients, moments, and three random streams; in the middle of a run."""
    state = State(fabric, FineTuning(), options("fixed"))
    fit(fabric, FineTuning(), options("fixed", **{"run.max_steps": 3}), state=state)
    taken = Snapshot()
    before = taken.take(state.state_dict())
    before = {key: dict(before[key]) for key in ("model", "ema", "optimizer")}
    copies = {name: value.clone() for name, value in before["model"].items()}
    flags = [(p.requires_grad, p.grad) for p in state.module.parameters()]
    modes = [m.training for m in state.module.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert len(probe(state, 0, 3)) == 3
    assert same(copies, dict(state.module.state_dict()))
    assert flags == [(p.requires_grad, p.grad) for p in state.module.parameters()]
    assert modes == [m.training for m in state.module.modules()]
    assert torch.equal(streams[0], torch.get_rng_state()) and streams[1] == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(streams[2], np.random.get_state(), strict=True))


def test_readings_are_those_of_plain_torch(fabric):
    """On a network without dropout: the mean and variance of |g| and g, from a backward of one's own."""
    task = Plain(24)
    state = State(fabric, task, options("fixed"))
    (reading,) = probe(state, 0, 1)
    assert reading.keys() == {"stem"}
    index = state.order.micro_batches(state.order.span(0))[0].index
    samples = [task.dataset("train")[int(i)] for i in index]
    x, y = (torch.stack([sample[key] for sample in samples]) for key in ("x", "y"))
    twin = task.network()
    twin.load_state_dict(state.module.state_dict())
    output = twin.stem(x)
    (twin.head(output) - y).square().sum(1).mean().backward()
    gradients = [p.grad for p in twin.stem.parameters()]
    assert reading["stem"].mean == pytest.approx([float(g.abs().mean()) for g in gradients], rel=1e-5)
    assert reading["stem"].variance == pytest.approx([float(g.var(correction=0)) for g in gradients], rel=1e-4)
    assert reading["stem"].sign == tuple(int(g.sign().mean().sign()) for g in gradients)
    assert reading["stem"].activation == pytest.approx(float(output.detach().std(correction=0)), rel=1e-5)


class Plain(Task):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def dataset(self, split: str) -> Points | None:
        return Points(self.samples, 0) if split == "train" else None

    def network(self) -> nn.Module:
        network = nn.Module()
        network.stem, network.head = nn.Linear(8, 4), nn.Linear(4, 2)
        network.forward = lambda x: network.head(network.stem(x))
        return network

    def units(self, network: nn.Module) -> list[str]:
        return ["stem"]

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        return Loss(((network(batch["x"]) - batch["y"]).square().sum(1) * batch["weight"]).sum())


def test_a_freezer_of_nothing_changes_nothing():
    network = Backbone()
    freezer = Freezer(network, FreezeConfig(), ["layer2"], 0.1)
    assert not freezer.parts and not freezer.frozen and freezer.next_change is None
    freezer.apply(network)
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["scale"]


def test_a_rollback_brings_the_best_weights_back(fabric, tmp_path, monkeypatch):
    """Weights, averages and moments of best.pt, when the plan says so; the counters go on."""
    changes = options("progressive", **{"freeze.progressive.interval": 1, "run.max_epochs": 3})
    decide = Progressive.decide
    monkeypatch.setattr(Progressive, "decide", lambda *a: decide(*a)._replace(restore=a[2] == 1))
    state = fit(fabric, FineTuning(), changes, tmp_path)
    saved = files(tmp_path)
    best = min((6, 12), key=lambda step: next(e["val/loss"] for e in state.history.evaluations if e["step"] == step))
    assert same(saved[12]["model"], saved[best]["model"]) and same(saved[12]["ema"], saved[best]["ema"])
    for name, moments in saved[best]["optimizer"]["state"].items():
        assert same(moments, saved[12]["optimizer"]["state"][name])
    assert saved[12]["counters"]["step"] == 12 and state.counters.step == 18
    resumed = fit(fabric, FineTuning(), changes, tmp_path / "again", saved=saved[12])
    assert same(dict(state.module.state_dict()), dict(resumed.module.state_dict()))
