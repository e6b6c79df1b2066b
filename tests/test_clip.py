"""Clipping against ``torch.nn.utils``, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fabric_trainer.clip import clip_gradients, total_norm

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
