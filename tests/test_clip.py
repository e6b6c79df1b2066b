"""Clipping against ``torch.nn.utils``, bit for bit."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Regression, config

from fabric_trainer import fit
from fabric_trainer.clip import clip_gradients, clip_units, total_norm
from fabric_trainer.errors import InputError
from fabric_trainer.state import State

SHAPES = [(1,), (7,), (3, 5), (2, 3, 4), ()]


def parameters(seed: int, scale: float = 1.0, shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
    return made


def same_gradients(ours, theirs) -> bool:
    return all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 30.0, 1e6]),
    norm=st.floats(1e-3, 1e3),
    p=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_norm_clipping_is_bit_equal_to_torch(seed, scale, norm, p, shapes, dtype):
    ours, theirs = (parameters(seed, scale, shapes, dtype) for _ in range(2))
    total = clip_gradients(ours, norm=norm, p=p)
    assert torch.equal(total, nn.utils.clip_grad_norm_(theirs, norm, norm_type=p))
    assert same_gradients(ours, theirs)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_returned_is_the_one_before_clipping(p):
    ours = parameters(0, scale=10.0)
    elements = [x for parameter in ours for x in parameter.grad.double().flatten().tolist()]
    expected = max(map(abs, elements)) if p == math.inf else sum(abs(x) ** p for x in elements) ** (1 / p)
    total = clip_gradients(ours, norm=0.5, p=p)
    assert type(total) is torch.Tensor and total.shape == () and not total.requires_grad
    assert total.item() == pytest.approx(expected, rel=1e-6) and expected > 0.5
    after = total_norm([parameter.grad for parameter in ours], p).item()
    assert after == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("value", [1e-3, 0.5, 100.0])
def test_value_clipping_is_bit_equal_to_torch(value):
    ours, theirs = parameters(1), parameters(1)
    before = total_norm([parameter.grad.clone() for parameter in ours])
    total = clip_gradients(ours, value=value)
    nn.utils.clip_grad_value_(theirs, value)
    assert same_gradients(ours, theirs)
    assert torch.equal(total, before)


def test_without_a_limit_gradients_are_measured_and_left_alone():
    ours, untouched = parameters(2, scale=1e4), parameters(2, scale=1e4)
    total = clip_gradients(ours)
    assert same_gradients(ours, untouched)
    assert torch.equal(total, nn.utils.clip_grad_norm_(untouched, math.inf))


def test_parameters_without_gradient_are_passed_over():
    ours, theirs = parameters(3), parameters(3)
    for made in (ours, theirs):
        made[1].grad = None
    assert torch.equal(clip_gradients(ours, norm=0.1), nn.utils.clip_grad_norm_(theirs, 0.1))
    assert ours[1].grad is None and torch.equal(ours[2].grad, theirs[2].grad)
    bare = [nn.Parameter(torch.ones(3))]
    total = clip_gradients(bare, norm=0.1)
    assert total.shape == () and total.item() == 0 and bare[0].grad is None
    assert clip_gradients(iter(parameters(3))).item() > 0, "a generator is as good as a list"


def test_zero_gradients_stay_zero():
    ours = parameters(4, scale=0.0)
    assert clip_gradients(ours, norm=1.0).item() == 0
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in ours)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("limit", [{}, {"norm": 1.0}, {"value": 1.0}])
def test_a_norm_that_is_not_finite_is_told(bad, p, limit):
    ours = parameters(5)
    ours[2].grad[1, 1] = bad
    assert not clip_gradients(ours, p=p, **limit).isfinite()


def test_gradients_of_several_dtypes():
    ours, theirs = (parameters(6, 5.0, [(4, 3)]) + parameters(7, 5.0, [(9,)], torch.float64) for _ in range(2))
    total = clip_gradients(ours, norm=1.0)
    assert total.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- adaptive -------------------------------------------------------------------------------------------------------


def plain_agc(weight: torch.Tensor, gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """Row by row, as the paper writes it."""
    if weight.ndim < 2:
        rows, wide = [gradient.clone()], [weight]
    else:
        rows, wide = [row.clone() for row in gradient], list(weight)
    for row, own in zip(rows, wide, strict=True):
        norm, limit = row.norm(), factor * max(own.norm().item(), 1e-3)
        if norm > limit:
            row *= limit / norm
    return rows[0] if weight.ndim < 2 else torch.stack(rows)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 1e3]),
    factor=st.floats(1e-3, 1.0),
    shapes=st.lists(st.lists(st.integers(1, 6), max_size=4).map(tuple), min_size=1, max_size=6),
)
def test_adaptive_clipping_is_the_papers_row_by_row(seed, scale, factor, shapes):
    ours = parameters(seed, scale, shapes, torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in ours:
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if len(ours) > 1:
        ours[0].data.zero_()
    expected = [plain_agc(parameter.data, parameter.grad, factor) for parameter in ours]
    clip_units(ours, factor)
    for parameter, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=0)


def test_adaptive_clipping_leaves_what_is_small_enough_and_what_has_no_gradient():
    ours, before = parameters(1, scale=1e-9), parameters(1, scale=1e-9)
    for parameter in ours:
        parameter.data.fill_(1.0)
    ours[2].grad = before[2].grad = None
    clip_units(ours, 0.01)
    assert all(a.grad is b.grad or torch.equal(a.grad, b.grad) for a, b in zip(ours, before, strict=True))
    clip_units([nn.Parameter(torch.ones(3))], 0.01)
    half = parameters(2, 100.0, [(4, 3)], torch.bfloat16)
    clip_units(half, 0.5)
    assert half[0].grad.dtype == torch.bfloat16 and half[0].grad.float().norm(dim=1).amax() <= 0.5e-3 * 1.01


def test_the_loop_logs_the_norm_before_adaptive_clipping_and_spares_the_exempt(fabric, tmp_path):
    def trained(folder: str, **changes) -> tuple[float, State]:
        (tmp_path / folder).mkdir()
        keys = {"run.max_epochs": None, "run.max_steps": 2, "optim.name": "sgd", "optim.lr": 1.0}
        state = fit(fabric, Regression(), config(**(keys | changes)), tmp_path / folder)
        with open(tmp_path / folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        return float(rows[0]["grad_norm"]), state

    plain, _ = trained("plain")
    clipped, state = trained("agc", **{"clip.agc": 1e-3, "clip.agc_exempt": ["3"]})
    assert clipped == plain
    start = State(fabric, Regression(), config()).module.state_dict()
    moved = {name: (value - start[name]).norm() for name, value in state.module.state_dict().items()}
    # two updates at rate 1, each of a thousandth of the norm; the head as far as before
    assert moved["0.weight"] < 2.1e-3 * start["0.weight"].norm()
    assert moved["3.weight"] > 0.1 and moved["3.bias"] > 0.1
    with pytest.raises(InputError, match=r"clip\.agc_exempt: 33 meets no parameter; did you mean 3"):
        State(fabric, Regression(), config(**{"clip.agc": 0.1, "clip.agc_exempt": ["33"]}))
