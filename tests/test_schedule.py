"""Every schedule against torch's own, or its closed form."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from fabric_trainer.config import ScheduleConfig
from fabric_trainer.schedule import Plateau, corners, share

NAMES = ["constant", "linear", "cosine", "one_cycle", "step", "exponential", "plateau"]
TOTALS = [2, 7, 100]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def torchs(make, steps: int) -> list[float]:
    """The rates that a scheduler of torch gives to updates 0, 1, …, steps - 1, for a peak of 1."""
    opt = optimizer()
    scheduler, rates = make(opt), []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


def ours(steps: int, **keys) -> list[float]:
    function = share(ScheduleConfig(**keys), steps)
    return [function(step) for step in range(steps)]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_and_linear_are_torchs(total, final):
    cosine = torchs(lambda opt: lr_scheduler.CosineAnnealingLR(opt, total, eta_min=final), total)
    assert ours(total, name="cosine", final=final) == pytest.approx(cosine, abs=1e-9)
    linear = torchs(lambda opt: lr_scheduler.LinearLR(opt, 1.0, final, total), total)
    assert ours(total, name="linear", final=final) == pytest.approx(linear, abs=1e-9)


@pytest.mark.parametrize("total", TOTALS)
def test_step_exponential_and_constant_are_torchs(total):
    steps = torchs(lambda opt: lr_scheduler.StepLR(opt, 3, 0.5), total)
    assert ours(total, name="step", every=3, factor=0.5) == pytest.approx(steps)
    decay = torchs(lambda opt: lr_scheduler.ExponentialLR(opt, 0.01 ** (1 / total)), total)
    assert ours(total, name="exponential", factor=0.01) == pytest.approx(decay)
    assert ours(total, name="constant") == ours(total, name="plateau") == [1.0] * total


@pytest.mark.parametrize("total, peak", [(10, 0.3), (100, 0.25), (1000, 0.5)])
@pytest.mark.parametrize("start, final", [(0.04, 0.0), (0.1, 0.01)])
def test_one_cycle_is_torchs(total, peak, start, final):
    # torch's legs end at pct x steps - 1 and at steps - 1, ours at peak x total and at total
    steps = total + 1
    expected = torchs(
        lambda opt: lr_scheduler.OneCycleLR(
            opt,
            1.0,
            total_steps=steps,
            pct_start=(peak * total + 1) / steps,
            div_factor=1 / start,
            final_div_factor=start / max(final, 1e-12),
            cycle_momentum=False,
        ),
        total,
    )
    assert ours(total, name="one_cycle", peak=peak, start=start, final=final) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_linearly_and_the_form_follows(name):
    keys = {"name": name, "every": 4, "factor": 0.5, "final": 0.1}
    warm = ours(25, warmup=5, **keys)
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warm[5:] == ours(20, **keys)
    if name == "cosine":
        expected = torchs(
            lambda opt: lr_scheduler.LambdaLR(
                opt, lambda k: (k + 1) / 5 if k < 5 else 0.55 + 0.45 * math.cos(math.pi * (k - 5) / 20)
            ),
            25,
        )
        assert warm == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [10, 11, 1000])
def test_a_warm_up_that_leaves_nothing_is_an_error(warmup):
    with pytest.raises(ValueError, match=f"warmup of {warmup} updates leaves none of the run's 10"):
        share(ScheduleConfig(name="cosine", warmup=warmup), 10)
    assert share(ScheduleConfig(name="cosine", warmup=9), 10)(9) == 1.0


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 400),
    data=st.data(),
    final=st.floats(0, 1),
    factor=st.floats(0.01, 1),
    peak=st.floats(0, 1),
    every=st.integers(1, 100),
)
def test_a_share_lies_in_0_1_and_depends_on_the_step_alone(name, total, data, final, factor, peak, every):
    warmup = data.draw(st.integers(0, total - 1))
    config = ScheduleConfig(name=name, warmup=warmup, final=final, factor=factor, peak=peak, every=every)
    function = share(config, total)
    steps = list(range(total + 1))  # total itself: nothing asks for it in a run, everything may
    in_order = {step: function(step) for step in steps}
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in in_order.values())
    random.Random(total).shuffle(steps)
    fresh = share(config, total)
    assert {step: fresh(step) for step in steps} == in_order


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [1, 2, 50, 2345])
def test_corners_are_points_of_the_schedule(name, total):
    warmup = min(total - 1, 20)
    function = share(ScheduleConfig(name=name, warmup=warmup), total)
    points = corners(function, warmup, total)
    assert {0, warmup, total // 2, total - 1} <= set(points) <= set(range(total))
    assert list(points) == sorted(points)
    assert all(points[step] == function(step) for step in points)
    stride = max(1, total // 1000)
    assert max(points.values()) == max(function(step) for step in {warmup, *range(0, total, stride)})


# ---- plateau --------------------------------------------------------------------------------------------------------

metrics = st.lists(st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1.0, 1.0005, 0.9995, math.nan])), max_size=40)


@settings(max_examples=200, deadline=None)
@given(
    values=metrics,
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 4),
    factor=st.floats(0.1, 0.9),
    threshold=st.sampled_from([0.0, 1e-3, 0.1]),
    final=st.sampled_from([0.0, 0.03, 0.5]),
    cut=st.integers(0, 40),
)
def test_plateau_is_torchs_and_survives_a_resume(values, mode, patience, factor, threshold, final, cut):
    config = ScheduleConfig(name="plateau", patience=patience, factor=factor, threshold=threshold, final=final)
    opt = optimizer()
    theirs = lr_scheduler.ReduceLROnPlateau(
        opt, mode, factor, patience, threshold=threshold, threshold_mode="rel", cooldown=0, min_lr=final, eps=0.0
    )
    plateau = Plateau(config, mode)
    for number, value in enumerate(values):
        if number == cut:
            saved, plateau = plateau.state_dict(), Plateau(config, mode)
            plateau.load_state_dict(saved)
        theirs.step(value)
        plateau.observe(value)
        assert plateau.share == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)


def test_a_nan_is_no_improvement():
    plateau = Plateau(ScheduleConfig(patience=1, factor=0.5), "min")
    for value, expected in [(math.nan, 1.0), (1.0, 1.0), (math.nan, 1.0), (math.nan, 0.5), (0.5, 0.5)]:
        plateau.observe(value)
        assert plateau.share == expected
    assert plateau.best == 0.5


def test_a_negative_metric_improves_downwards():
    # torch's best x (1 - threshold) lies above a negative best and counts a worse value as better; ours does not
    plateau = Plateau(ScheduleConfig(patience=0, factor=0.5, threshold=0.1), "min")
    for value, expected in [(-1.0, 1.0), (-0.95, 0.5), (-1.05, 0.25), (-1.2, 0.25)]:
        plateau.observe(value)
        assert plateau.share == expected
