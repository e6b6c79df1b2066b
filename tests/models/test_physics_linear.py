"""The linear baseline: it finds the stencils that are there, and is a least-squares fit where there is none."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data import advection, burgers
from data.generated import ensure
from data.pdebench import fields as fields_of
from models.physics.linear import fit, fit_fields


def waves(samples: int, cells: int, seed: int = 0) -> torch.Tensor:
    """Periodic fields of eight sines, float32 (samples, 1, 1, cells)."""
    random = np.random.default_rng(seed)
    x = (np.arange(cells) + 0.5) / cells
    k = 2 * np.pi * np.arange(1, 9)[:, None]
    phases, sizes = random.uniform(0, 2 * np.pi, (samples, 8, 1)), random.normal(size=(samples, 8, 1))
    return torch.from_numpy((sizes * np.sin(k * x + phases)).sum(1)).float()[:, None, None]


def relative(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    return ((predicted - truth).double().pow(2).mean() / truth.double().pow(2).mean()).sqrt().item()


def test_it_finds_a_shift_by_whole_cells_and_keeps_to_it():
    start, other = waves(64, 64), waves(4, 64, seed=1)
    step = fit([(start, start.roll(5, -1))], (16, 16))
    assert step.weight.shape == (1, 1, 1, 33) and step.weight.dtype == torch.float64
    assert relative(step(other), other.roll(5, -1)) < 1e-6
    fields = other
    for _ in range(50):
        fields = step(fields)
    assert relative(fields, other.roll(250, -1)) < 1e-4


def test_it_finds_the_heat_equations_stencil_on_a_plane_with_walls():
    random = torch.Generator().manual_seed(0)
    start = torch.randn(8, 2, 12, 10, generator=random, dtype=torch.float64)
    kernel = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for channel, rate in enumerate((0.1, 0.2)):
        kernel[channel, channel] = rate * torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    kernel[0, 1, 1, 1] = -0.3  # and a reaction between the channels
    after = (
        start + F.conv2d(F.pad(start, (1, 1, 1, 1), mode="replicate"), kernel) + torch.tensor([0.5, 0.0])[:, None, None]
    )
    step = fit([(start[:5], after[:5]), (start[5:], after[5:])], (2, 2), periodic=False)
    torch.testing.assert_close(step.weight, F.pad(kernel, (1, 1, 1, 1)), rtol=0, atol=1e-10)
    torch.testing.assert_close(step.bias, torch.tensor([0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(step(start), after)


def test_where_no_stencil_is_right_it_is_the_least_squares_one():
    random = np.random.default_rng(0)
    before, after = random.normal(2, 3, (6, 1, 1, 9)), random.normal(size=(6, 1, 1, 9))
    columns = [np.roll(before, shift, -1).ravel() for shift in (1, 0, -1)] + [np.ones(54)]
    expected, *_ = np.linalg.lstsq(np.stack(columns, 1), (after - before).ravel(), rcond=None)
    step = fit([(torch.from_numpy(before), torch.from_numpy(after))], (1, 1))
    np.testing.assert_allclose(step.weight.ravel(), expected[:3], rtol=1e-9)
    np.testing.assert_allclose(step.bias, expected[3:], rtol=1e-9)


def test_channels_of_far_apart_sizes_are_told_apart():
    """A density around 1 and a pressure of 1e5 that varies by 0.1: both are moved by one cell."""
    density, pressure = 1 + 0.1 * waves(32, 64), 1e5 + waves(32, 64, seed=1).double()
    before = torch.cat((density.double(), pressure), 1)
    step = fit([(before, before.roll(1, -1))], (2, 2))
    error = step(before) - before.roll(1, -1)
    assert error.pow(2).mean((0, 2, 3)).sqrt().div(before.std((0, 2, 3))).max() < 1e-5


def test_a_stencil_is_no_wider_than_its_grid():
    fields = waves(16, 8)
    assert fit([(fields, fields.roll(2, -1))], (16, 16)).weight.shape == (1, 1, 1, 7)
    assert fit([(fields, fields)], (16, 16), periodic=False).weight.shape == (1, 1, 1, 15)
    with pytest.raises(ValueError, match="none"):
        fit([], (1, 1))


def test_sets_of_files(tmp_path):
    """Advection by 2 cells a step is exact; what is nonlinear isn't, and is still better than standing still. A fit
    to fewer states is no better on all of them."""
    made = advection.Advection(beta=1.0, nx=100, samples=12, frames=21)
    fields = fields_of(ensure(tmp_path, made))
    u = fields.tensor()
    assert relative(fit_fields(fields, 2)(u[:, 4]), u[:, 6]) < 1e-5
    fields = fields_of(ensure(tmp_path, burgers.Burgers(nx=64, samples=12, frames=21)))
    before, after = (some.flatten(0, 1) for some in (fields.tensor()[:, :-2], fields.tensor()[:, 2:]))
    best, few = (relative(fit_fields(fields, 2, points=64 * n)(before), after) for n in (10**6, 40))
    assert best < few and best < 0.95 * relative(before, after)
