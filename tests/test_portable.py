"""Optimizer state by parameter name, and strict loading of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fabric_trainer.errors import InputError
from fabric_trainer.portable import (
    Fragment,
    check_names,
    check_optimizer_names,
    like,
    load_optimizer_state,
    local,
    optimizer_groups,
    optimizer_state,
    put,
    whole,
)

OPTIMIZERS = [
    ("AdamW", {"fused": True}),
    ("AdamW", {"fused": False, "amsgrad": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {}),
    ("Adagrad", {"fused": True}),
    ("Adagrad", {}),
    ("Adafactor", {}),
]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def optimizer(net: nn.Module, name: str, keys: dict, backwards: bool = False, lr: float = 0.1) -> torch.optim.Optimizer:
    """Two groups; with ``backwards`` both the groups and what is in them come the other way round."""
    named = dict(net.named_parameters())
    groups = [
        {"name": "decay", "params": [named[n] for n in named if named[n].ndim == 2], "weight_decay": 0.1},
        {"name": "rest", "params": [named[n] for n in named if named[n].ndim < 2], "weight_decay": 0.0},
    ]
    if backwards:
        groups = [group | {"params": group["params"][::-1]} for group in groups[::-1]]
    return getattr(torch.optim, name)(groups, lr=lr, **keys)


def update(net: nn.Module, opt: torch.optim.Optimizer, seed: int) -> None:
    opt.zero_grad()
    net(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    opt.step()


def names(net: nn.Module, opt: torch.optim.Optimizer) -> list[list[str]]:
    of = {id(parameter): name for name, parameter in net.named_parameters()}
    return [[of[id(parameter)] for parameter in group["params"]] for group in opt.param_groups]


def here(value: torch.Tensor) -> torch.Tensor:
    """What brings a saved tensor to a single process."""
    return value


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, keys", OPTIMIZERS)
def test_state_goes_by_name_into_groups_of_another_order(name, keys, tmp_path):
    net = network()
    opt = optimizer(net, name, keys)
    for seed in range(3):
        update(net, opt, seed)
    torch.save({"model": net.state_dict(), "optimizer": optimizer_state(opt, net)}, tmp_path / "file.pt")
    saved = torch.load(tmp_path / "file.pt", weights_only=True)
    other = network(seed=9)
    other.load_state_dict(saved["model"])
    theirs = optimizer(other, name, keys, backwards=True)
    load_optimizer_state(theirs, other, saved["optimizer"], here)
    for seed in range(3, 6):
        update(net, opt, seed)
        update(other, theirs, seed)
    for (key, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), key
    fresh = network(seed=9)
    fresh.load_state_dict(saved["model"])
    without = optimizer(fresh, name, keys, backwards=True)
    for seed in range(3, 6):
        update(fresh, without, seed)
    assert torch.equal(fresh[0].weight, net[0].weight) == (name == "SGD" and not keys), "moments must matter here"


def test_the_form_of_the_state():
    net = network()
    opt = optimizer(net, "AdamW", {})
    net[2].bias.requires_grad_(False)
    update(net, opt, 0)
    state, groups = optimizer_state(opt, net), optimizer_groups(opt, names(net, opt))
    every = [name for name, _ in net.named_parameters()]
    assert sorted(state) == sorted(set(every) - {"2.bias"})
    assert set(state["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["0.weight"]["exp_avg"] is opt.state[net[0].weight]["exp_avg"], "live: nothing is copied"
    assert [group["params"] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    first = groups[0]
    assert (first["name"], first["lr"], first["weight_decay"], first["betas"]) == ("decay", 0.1, 0.1, [0.9, 0.999])


def test_moments_are_taken_over_and_options_are_not():
    net = network()
    opt = optimizer(net, "AdamW", {})
    update(net, opt, 0)
    saved = copy.deepcopy(optimizer_state(opt, net))
    other = network()
    theirs = optimizer(other, "AdamW", {"betas": (0.5, 0.6)}, lr=0.7)
    update(other, theirs, 5)
    load_optimizer_state(theirs, other, saved, here)
    assert theirs.param_groups[0]["lr"] == 0.7 and theirs.param_groups[0]["betas"] == (0.5, 0.6)
    for name, values in optimizer_state(theirs, other).items():
        for key, value in values.items():
            assert torch.equal(value, saved[name][key])
            assert value.data_ptr() != saved[name][key].data_ptr(), "a copy: the file stays as it is"


def test_an_unknown_parameter_is_named():
    saved = {"2.weight": {}, "2.bias": {}, "0.weight": {}}
    message = refusal(check_optimizer_names, ["0.weight", "0.bias"], saved)
    assert "2.weight" in message and "2.bias" in message and "0.weight" not in message
    check_optimizer_names(["2.weight", "2.bias", "0.weight"], saved)


def test_what_does_not_fit_the_network_is_listed():
    net = network()
    saved = dict(network(seed=5).state_dict())
    saved["extra"] = saved.pop("1.bias")
    saved["2.weight"] = torch.zeros(3, 4)
    message = refusal(check_names, net.state_dict(), saved, "file.pt")
    assert message.startswith("file.pt")
    for part in ("missing: 1.bias", "unexpected: extra", "misshapen: 2.weight (3, 4) for (2, 4)"):
        assert part in message


def test_long_lists_are_cut():
    saved = dict(network().state_dict()) | {f"x{i}": torch.zeros(1) for i in range(9)}
    message = refusal(check_names, network().state_dict(), saved, "file.pt")
    assert "x0, x1, x2, x3, x4 and 4 more" in message and "missing" not in message


def test_what_fits_is_accepted():
    check_names(network().state_dict(), network(seed=5).state_dict(), "file.pt")


# ---- leaves ---------------------------------------------------------------------------------------------------------


def test_a_plain_tensor_is_its_own_leaf():
    leaf = nn.Parameter(torch.randn(3, 2))
    assert whole(leaf) is leaf and local(leaf).data_ptr() == leaf.data_ptr()
    put(leaf, torch.ones(3, 2))
    copied = like(leaf, torch.float64)
    assert torch.equal(leaf, torch.ones(3, 2)) and copied.dtype == torch.float64 and not copied.requires_grad


@pytest.mark.parametrize("start, length", [(0, 3), (2, 4), (3, 3), (6, 0)])
def test_a_fragment_takes_its_slice_of_the_whole(start, length):
    flat = torch.full((8,), -1.0)
    leaf = Fragment(torch.Size((2, 3)), flat[1 : 1 + length], start)
    put(leaf, torch.arange(6.0).view(2, 3))
    assert local(leaf).tolist() == list(range(start, start + length))
    assert flat.tolist() == [-1.0, *map(float, range(start, start + length)), *[-1.0] * (7 - length)], "live, no more"
    twin = like(leaf)
    local(twin).zero_()
    assert local(leaf).tolist() == list(range(start, start + length)), "a copy"
