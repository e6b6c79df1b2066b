"""Optimizers by name, and which parameter lands in which group."""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import partial

import pytest
import torch
import torch_optimizer
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from toys import Regression
from toys import config as configured

from fabric_trainer import fit
from fabric_trainer.config import OptimConfig
from fabric_trainer.errors import InputError
from fabric_trainer.optim import build_optimizer, optimizer_class, parameter_groups
from fabric_trainer.portable import fetch, load_group_state, load_optimizer_state, optimizer_groups, optimizer_state

TORCH = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]
FUSED = {"Adagrad", "Adam", "AdamW", "SGD"}
OTHERS = [
    "AdaBelief",
    "AdaBound",
    "AdaMod",
    "AdamP",
    "DiffGrad",
    "Lamb",
    "LARS",
    "MADGRAD",
    "NovoGrad",
    "QHAdam",
    "Ranger",
    "SGDP",
    "SGDW",
    "Yogi",
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))


def refusal(call, *arguments, **keys) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def updated(net: nn.Module, optimizer: torch.optim.Optimizer, updates: int = 2) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 20).view(5, 4)
    for _ in range(updates):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "aDaMw", "torch.optim.AdamW"])
def test_a_name_of_torch_in_any_case_or_by_path(name):
    assert optimizer_class(name) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["lamb", "Lamb", "LAMB", "torch_optimizer.Lamb"])
def test_a_name_of_torch_optimizer_in_any_case_or_by_path(name):
    assert optimizer_class(name) is importlib.import_module("torch_optimizer").Lamb


@pytest.mark.parametrize("name", ["radam", "adafactor"])
def test_where_both_have_a_name_it_is_torchs(name):
    assert optimizer_class(name).__module__.startswith("torch.optim")


def test_an_unknown_name_is_answered_with_near_ones():
    assert "adamw" in refusal(optimizer_class, "adamww") and "adamww" in refusal(optimizer_class, "adamww")
    assert "lamb" in refusal(optimizer_class, "lambb")
    assert "sgd" in refusal(optimizer_class, "zzzzzz"), "nothing is near: all are named"
    assert "no module nowhere" in refusal(optimizer_class, "nowhere.Adam")
    assert "no Adamm" in refusal(optimizer_class, "torch.optim.Adamm")
    assert "not a torch.optim.Optimizer" in refusal(optimizer_class, "torch.nn.Linear")
    assert "import path" in refusal(optimizer_class, ".Adam")


def test_without_torch_optimizer_torchs_names_work_and_others_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_optimizer", None)
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    after = updated(net, build_optimizer(net, OptimConfig("sgd", lr=0.1), "cpu"), 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "pip install torch-optimizer" in refusal(optimizer_class, "lamb")
    assert "adamw" in refusal(optimizer_class, "adamww")


def test_unknown_arguments_are_answered_with_the_accepted_ones():
    message = refusal(build_optimizer, network(), OptimConfig("adamw", args={"beta": 0.9, "epps": 1}), "cpu")
    assert "takes no beta, epps" in message
    assert all(name in message for name in ("lr", "betas", "eps", "amsgrad"))
    assert "params" not in message


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig("adamw", lr=-1.0),
        OptimConfig("adamw", args={"betas": [2.0, 0.9]}),
        OptimConfig("adamw", args={"betas": 1}),
        OptimConfig("sgd", args={"nesterov": True}),
        OptimConfig("rprop", weight_decay=0.1),
    ],
)
def test_wrong_values_are_refused_in_one_line(config):
    assert refusal(build_optimizer, network(), config, "cpu").startswith("optim")


@pytest.mark.parametrize("args", [{"lr": 0.5}, {"weight_decay": 0.5}])
def test_an_argument_that_has_a_key_of_its_own_is_not_ignored(args):
    # optim.args.weight_decay would lose against the groups' own, optim.args.lr would win over optim.lr
    (name,) = args
    assert f"optim.{name}" in refusal(build_optimizer, network(), OptimConfig("sgd", lr=0.1, args=args), "cpu")


def test_an_optimizer_that_needs_a_closure_is_refused():
    assert "closure" in refusal(build_optimizer, network(), OptimConfig("lbfgs"), "cpu")


class NoClosure(torch.optim.SGD):
    def step(self):
        super().step()


def test_a_step_without_a_closure_argument_will_do(monkeypatch):
    monkeypatch.setattr(torch.optim, "NoClosure", NoClosure, raising=False)
    assert isinstance(build_optimizer(network(), OptimConfig("noclosure"), "cpu"), NoClosure)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("adahessian", "differentiates the gradient"),
        ("torch_optimizer.Adahessian", "differentiates the gradient"),
        ("sparseadam", "sparse gradients"),
        ("lookahead", "optim.lookahead"),
        ("swats", "learning rate"),
    ],
)
def test_optimizers_that_the_loop_can_not_serve_are_refused_before_training(name, reason):
    assert reason in refusal(build_optimizer, network(), OptimConfig(name), "cpu")


# ---- groups ---------------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every kind of module that matters, with a scalar gain and a matrix inside a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv2d(1, 2, 3)
        self.layer, self.layers = nn.LayerNorm(6), nn.LayerNorm((6, 6))
        self.batch, self.group, self.rms = nn.BatchNorm2d(2), nn.GroupNorm(2, 4), nn.RMSNorm(6)
        self.instance = nn.InstanceNorm2d(2, affine=True)
        self.attention = nn.MultiheadAttention(6, 2)
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.ones(3, 3))
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight


DECAYED = {
    "embed.weight",
    "linear.weight",
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
}


def named_groups(net: nn.Module, config: OptimConfig) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, config)
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    trainable = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(trainable), "each trainable parameter once"
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_norms_biases_and_gains_are_not_decayed():
    net = Zoo()
    groups = named_groups(net, OptimConfig("adamw", weight_decay=0.1))
    assert groups["decay"] == DECAYED
    assert groups["no_decay"] == {name for name, _ in net.named_parameters()} - DECAYED
    rates = {group["name"]: group["weight_decay"] for group in parameter_groups(net, OptimConfig(weight_decay=0.1))}
    assert rates == {"decay": 0.1, "no_decay": 0.0}


def test_one_group_where_there_is_one_kind():
    def only(net: nn.Module, config: OptimConfig) -> float:
        (group,) = parameter_groups(net, config)
        assert group["name"] == "all"
        named_groups(net, config)
        return group["weight_decay"]

    assert only(Zoo(), OptimConfig()) == 0
    assert only(Zoo(), OptimConfig(weight_decay=0.1, decay_everything=True)) == 0.1
    assert only(network(), OptimConfig(weight_decay=0.1)) == 0.1
    assert only(nn.LayerNorm(4), OptimConfig(weight_decay=0.1)) == 0
    assert only(nn.LayerNorm(4), OptimConfig(weight_decay=0.1, decay_everything=True)) == 0.1


def test_frozen_parameters_are_left_out():
    net = Zoo()
    net.attention.requires_grad_(False)
    net.layer.requires_grad_(False)
    groups = named_groups(net, OptimConfig(weight_decay=0.1))
    assert groups["decay"] == {"embed.weight", "linear.weight", "conv.weight"}
    assert not any(name.startswith(("layer.", "attention.")) for name in groups["no_decay"])


@pytest.mark.parametrize("net", [nn.ReLU(), network().requires_grad_(False)])
def test_nothing_to_train_is_an_error(net):
    assert "nothing to train" in refusal(build_optimizer, net, OptimConfig(), "cpu")


def test_the_decay_that_counts_is_ours_and_not_the_optimizers_default():
    optimizer = build_optimizer(network(), OptimConfig("adamw"), "cpu")
    assert optimizer.param_groups[0]["weight_decay"] == 0  # torch's own is 0.01


# ---- updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH)
def test_updates_of_torchs_optimizers_are_theirs(name):
    keys = {"lr": 1e-2} | ({} if name in ("Rprop", "ASGD") else {"weight_decay": 0.1})
    config = OptimConfig(name.lower(), lr=1e-2, weight_decay=keys.get("weight_decay", 0.0))
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours, config, "cpu")
    assert bool(optimizer.param_groups[0].get("fused")) == (name in FUSED)
    keys |= {"weight_decay": 0.0} if name == "ASGD" else {}
    got = updated(ours, optimizer)
    expected = updated(theirs, getattr(torch.optim, name)(theirs.parameters(), **keys))
    start = [parameter.detach() for parameter in network().parameters()]
    for a, b, before in zip(got, expected, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_updates_of_torch_optimizers_are_theirs(name):
    ours, theirs = network(), network()
    got = updated(ours, build_optimizer(ours, OptimConfig(name, lr=1e-2), "cpu"))
    cls = getattr(importlib.import_module("torch_optimizer"), name)
    expected = updated(theirs, cls(theirs.parameters(), lr=1e-2, weight_decay=0.0))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[0], next(network().parameters()))


REFUSED = {"Adahessian", "Lookahead", "SWATS"}
LIST = sorted(name for name, cls in vars(torch_optimizer).items() if isinstance(cls, type) and name != "Optimizer")


def test_the_list_is_the_packages_own():
    assert set(OTHERS) | REFUSED < set(LIST) and len(LIST) == 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIST)
def test_each_of_torch_optimizer_trains_and_resumes_bit_for_bit_or_is_refused(name, tmp_path, fabric):
    """Through a file, as ``fit`` saves and loads it."""
    path = f"torch_optimizer.{name}"
    accepted = inspect.signature(getattr(torch_optimizer, name)).parameters
    config = OptimConfig(path, lr=1e-2, args={"momentum": 0.9} if "momentum" in accepted else {})
    if name in REFUSED:
        refusal(build_optimizer, network(), config, "cpu")
        return
    whole, resumed = network(), network()
    optimizer = build_optimizer(whole, config, "cpu")
    updated(whole, optimizer)
    names = [[name for name, _ in whole.named_parameters()]]
    tree = {"state": optimizer_state(optimizer, whole), "groups": optimizer_groups(optimizer, names)}
    torch.save({"model": whole.state_dict(), "optimizer": tree}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    other = build_optimizer(resumed, config, "cpu")
    load_optimizer_state(other, resumed, saved["optimizer"]["state"], partial(fetch, fabric))
    load_group_state(other, saved["optimizer"]["groups"])
    got, expected = updated(resumed, other, 3), updated(whole, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(got, network().parameters(), strict=True))


def test_the_fused_kernel_is_used_unless_it_cannot_or_must_not():
    def fused(**keys) -> bool:
        args = keys.pop("args", {})
        optimizer = build_optimizer(network(), OptimConfig("adamw", args=args), **{"device_type": "cpu", **keys})
        return bool(optimizer.param_groups[0]["fused"])

    assert fused()
    assert not fused(scaled=True), "an fp16 scaler could not unscale for clipping"
    assert not fused(args={"fused": False}) and not fused(args={"foreach": True})
    assert not fused(device_type="vulkan")
    assert fused(scaled=True, args={"fused": True}), "who asks for it gets it"


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
def test_parameters_in_shards_are_stepped_as_whole_ones(name):
    """torch has no fused kernel of SGD and Adagrad for them: the first step of a run under FSDP failed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole, sharded = network(), network()
        for module in sharded.modules():
            for key, value in list(module.named_parameters(recurse=False)):
                setattr(module, key, torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)])))
        for net in (whole, sharded):
            optimizer = build_optimizer(net, OptimConfig(name, lr=0.1), "cpu")
            for parameter in net.parameters():
                parameter.grad = parameter.detach().clone()
            optimizer.step()
        for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(other.full_tensor(), one)
    finally:
        torch.distributed.destroy_process_group()


class Wide(Regression):
    def dataset(self, split):
        points = super().dataset(split)
        if points is not None:
            points.x, points.y = points.x.double(), points.y.double()
        return points


@pytest.mark.parametrize("name", ["adagrad", "adamw"])
def test_state_that_an_optimizer_makes_at_once_follows_the_weights(name):
    # Adagrad makes its sums when it is built: they must have the dtype and device that Fabric gives the weights
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    fabric.launch()
    state = fit(fabric, Wide(), configured(**{"optim.name": name, "run.max_epochs": None, "run.max_steps": 2}))
    assert state.counters.step == 2 and next(state.module.parameters()).dtype == torch.float64
    for values in state.engine.bare_optimizer.state.values():
        assert {value.dtype for key, value in values.items() if key != "step"} == {torch.float64}
