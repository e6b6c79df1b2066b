"""The moving average against its closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fabric_trainer.ema import EMA


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def walk(net: nn.Module, step: int) -> None:
    """Change every weight, differently at every step."""
    generator = torch.Generator().manual_seed(1000 + step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@settings(max_examples=40, deadline=None)
@given(decay=st.floats(0.0, 0.9999), warmup=st.booleans(), steps=st.integers(1, 30))
def test_the_average_is_its_closed_form(decay, warmup, steps):
    net = network().double()
    ema = EMA(net, decay, warmup)
    history = [{name: p.detach().clone() for name, p in net.named_parameters()}]
    for step in range(1, steps + 1):
        walk(net, step)
        history.append({name: p.detach().clone() for name, p in net.named_parameters()})
        ema.update(step)
    # the weight of theta_k is (1 - d_k) prod_{j > k} d_j, that of the first weights prod_j d_j
    decays = [min(decay, (1 + k) / (10 + k)) if warmup else decay for k in range(1, steps + 1)]
    shares, rest = [], 1.0
    for d in reversed(decays):
        shares.append((1 - d) * rest)
        rest *= d
    shares = [rest, *reversed(shares)]
    assert sum(shares) == pytest.approx(1)
    for name, value in ema.state_dict().items():
        if name in history[0]:
            expected = sum(share * weights[name] for share, weights in zip(shares, history, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_warm_up_forgets_the_first_weights():
    assert EMA(network(), 0.999).decay_at(1) == 2 / 11
    assert EMA(network(), 0.999).decay_at(10**6) == 0.999
    assert EMA(network(), 0.999, warmup=False).decay_at(1) == 0.999


def test_half_precision_is_averaged_in_float32():
    net = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema = EMA(net, 0.999, warmup=False)
    with torch.no_grad():
        net.weight.fill_(2.0)
    for step in range(1, 101):
        ema.update(step)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    # in bfloat16 a step of 0.001 from 1 would round away and the average stand still
    torch.testing.assert_close(average, torch.full((1, 2), 2 - 0.999**100), rtol=1e-5, atol=0)
    with ema.applied():
        assert net.weight.dtype == torch.bfloat16
        assert torch.equal(net.weight, average.to(torch.bfloat16))


def test_state_has_the_networks_names_and_loads_strictly_into_a_bare_one():
    net = network()
    ema = EMA(net, 0.5)
    walk(net, 1)
    net(torch.randn(6, 3))  # moves the running statistics
    ema.update(1)
    state = ema.state_dict()
    assert list(state) == list(net.state_dict()) and "1.running_mean" in state
    fresh = network(seed=9)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh[1].running_mean, net[1].running_mean), "buffers are the network's own"
    assert not torch.equal(fresh[0].weight, net[0].weight)
    with ema.applied():
        assert torch.equal(fresh[0].weight, net[0].weight)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.tokens.weight


def test_tied_weights_are_averaged_under_both_names():
    net = Tied()
    ema = EMA(net, 0.5, warmup=False)
    first = net.tokens.weight.detach().clone()
    walk(net, 1)
    ema.update(1)
    expected = (first + net.tokens.weight.detach()) / 2
    state = ema.state_dict()
    torch.testing.assert_close(state["tokens.weight"], expected)
    torch.testing.assert_close(state["head.weight"], expected)
    fresh = Tied()
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.tokens.weight.detach(), expected)


def test_applied_gives_the_weights_back_whatever_happens():
    net = network()
    ema = EMA(net, 0.9, warmup=False)
    walk(net, 1)
    ema.update(1)
    raw = copy.deepcopy(net.state_dict())
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match="in the body"), ema.applied():
        for name, value in ema.state_dict().items():
            assert torch.equal(net.state_dict()[name], value)
        assert not torch.equal(net[0].weight, raw["0.weight"])
        raise RuntimeError("in the body")
    assert all(torch.equal(value, raw[name]) for name, value in net.state_dict().items())
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers, "an optimizer holds on to them"


def test_a_loaded_average_goes_on_like_the_one_saved():
    net = network()
    ema = EMA(net, 0.9)
    walk(net, 1)
    ema.update(1)
    saved = copy.deepcopy(ema.state_dict())
    other = EMA(copy.deepcopy(net), 0.9)
    other.load_state_dict(saved)
    for average in (ema, other):
        walk(average.network, 2)
        average.update(2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ema.state_dict().items())
    assert not any(torch.equal(saved[name], ema.state_dict()[name]) for name, _ in net.named_parameters())
    with pytest.raises(KeyError, match=r"0\.weight"):
        ema.load_state_dict({})


def test_updates_leave_the_network_and_autograd_alone():
    net = network()
    ema = EMA(net, 0.9)
    before = copy.deepcopy(net.state_dict())
    ema.update(1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(value.requires_grad for value in ema.state_dict().values())
