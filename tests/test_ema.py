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


def test_several_averages_each_go_their_own_way():
    """Two decays and a width, beside an average of each alone: no bit is another's."""
    net = network()
    kinds = {"0.5": {"decay": 0.5}, "0.999": {"decay": 0.999}, "power_0.1": {"power": [0.1]}}
    together = EMA(net, [0.5, 0.999], power=[0.1])
    alone = {label: EMA(net, **kind) for label, kind in kinds.items()}
    assert together.main == "0.5" and together.further == ["0.999", "power_0.1"]
    for step in range(1, 20):
        walk(net, step)
        for ema in (together, *alone.values()):
            ema.update(step)
    raw = copy.deepcopy(net.state_dict())
    for label, ema in alone.items():
        assert all(torch.equal(value, together.state_dict(label)[name]) for name, value in ema.state_dict().items())
        with together.applied(label):
            assert torch.equal(net[0].weight, ema.state_dict()["0.weight"])
    assert not torch.equal(together.state_dict("0.5")["0.weight"], together.state_dict("0.999")["0.weight"])
    assert torch.equal(together.state_dict()["0.weight"], together.state_dict("0.5")["0.weight"]), "the main one"
    assert all(torch.equal(value, raw[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("label", ["0.9", "power_0.1"])
def test_until_it_starts_an_average_is_the_weights_and_then_as_one_that_began_there(label):
    net = network()
    ema = EMA(net, [0.9], power=[0.1], start=5)
    for step in range(1, 6):
        walk(net, step)
        ema.update(step)
        assert all(torch.equal(value, ema.state_dict(label)[name]) for name, value in net.state_dict().items())
    later = EMA(net, [0.9], power=[0.1])  # counts its updates from here
    for step in range(6, 12):
        walk(net, step)
        ema.update(step)
        later.update(step - 5)
    assert not torch.equal(ema.state_dict(label)["0.weight"], net[0].weight)
    assert all(torch.equal(v, later.state_dict(label)[name]) for name, v in ema.state_dict(label).items())


@settings(max_examples=30, deadline=None)
@given(decay=st.floats(0.0, 0.9999), width=st.floats(0.02, 0.28), values=st.integers(0, 2**32 - 1))
def test_an_average_of_a_weight_that_stands_still_stays_exactly_that(decay, width, values):
    net = nn.Linear(5, 3)
    with torch.no_grad():
        net.weight.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(values)) * 10 ** (values % 30 - 15))
    ema = EMA(net, [decay], power=[width])
    for step in range(1, 30):
        ema.update(step)
    for label in ema.averages:
        assert torch.equal(ema.state_dict(label)["weight"], net.weight.detach())


def test_running_statistics_are_averaged_where_asked():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mask = nn.BatchNorm1d(3), nn.Buffer(torch.tensor([0.0, -torch.inf]))

    net = Masked()
    ema = EMA(net, 0.5, warmup=False, buffers=True)
    mean = net.norm.running_mean.clone()
    for step in (1, 2, 3):
        net.norm(torch.randn(8, 3) + step)
        if step == 2:
            net.norm.running_mean = net.norm.running_mean.clone()  # another tensor in its place
        mean.lerp_(net.norm.running_mean, 0.5)
        ema.update(step)
    state, own = ema.state_dict(), copy.deepcopy(net.state_dict())
    assert torch.equal(state["norm.running_mean"], mean) and not torch.equal(mean, own["norm.running_mean"])
    assert state["norm.num_batches_tracked"] == 3, "a counter: the network's own"
    assert torch.equal(state["mask"], own["mask"]), "a constant, and inf - inf isn't a number"
    with ema.applied():
        assert torch.equal(net.norm.running_mean, mean)
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


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
