"""The physics penalties beside plain numpy, and on fields whose value is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.physics.priors import (
    boundary_penalty,
    conservation_penalty,
    divergence_penalty,
    first_batch_conservation_penalty,
    latent_diversity_penalty,
    latent_norm_penalty,
    positivity_penalty,
)

PENALTIES: list[Callable[[Tensor], Tensor]] = [
    divergence_penalty,
    lambda fields: divergence_penalty(fields, (0.5, 0.25), periodic=False),
    lambda fields: conservation_penalty(fields, torch.ones_like(fields)),
    lambda fields: boundary_penalty(fields, 0.3),
    positivity_penalty,
    lambda fields: latent_norm_penalty(fields.flatten(2)),
    lambda fields: latent_diversity_penalty(fields.flatten(2).mT),
]


def fields_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value: Tensor, expected: Tensor | np.ndarray | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=value.dtype).expand_as(value)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def plane(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y of the cell centres of the unit square: (H, W) each."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
    return x.expand(height, width), y[:, None].expand(height, width)


# ---- divergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periodic", [False, True])
def test_divergence_is_that_of_a_loop(periodic: bool) -> None:
    (dy, dx), velocity = (0.5, 0.25), fields_of(2, 2, 4, 5)
    u, v = velocity[:, 0].numpy(), velocity[:, 1].numpy()
    inside = slice(None) if periodic else slice(1, -1)
    expected = []
    for b in range(2):
        rows = [
            abs((u[b, i, (j + 1) % 5] - u[b, i, j - 1]) / (2 * dx) + (v[b, (i + 1) % 4, j] - v[b, i - 1, j]) / (2 * dy))
            for i in range(4)[inside]
            for j in range(5)[inside]
        ]
        expected.append(np.mean(rows))
    close(divergence_penalty(velocity, (dy, dx), periodic), np.array(expected))


def test_divergence_of_known_flows() -> None:
    x, y = plane(6, 8)
    spacing = (1 / 6, 1 / 8)
    close(divergence_penalty(torch.stack((-y, x))[None], spacing, periodic=False), 0.0)
    close(divergence_penalty(torch.stack((x, y))[None], spacing, periodic=False), 2.0)
    # of a stream function: u_x = d psi/dy, u_y = -d psi/dx by the same differences, which commute
    psi = fields_of(6, 8)
    flow = torch.stack(((psi.roll(-1, 0) - psi.roll(1, 0)) * 3, -(psi.roll(-1, 1) - psi.roll(1, 1)) * 4))[None]
    close(divergence_penalty(flow, spacing), 0.0)
    assert divergence_penalty(flow * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), spacing) > 1


@pytest.mark.parametrize("channels", [1, 2])
def test_divergence_on_a_line_is_the_slope(channels: int) -> None:
    x = ((torch.arange(32, dtype=torch.float64) + 0.5) / 32).expand(3, channels, 1, 32)
    wave = torch.sin(2 * math.pi * x)
    discrete = math.sin(2 * math.pi / 32) * 32  # of the central difference: 2 pi in the limit
    close(divergence_penalty(wave, (1.0, 1 / 32)), (2 * math.pi * x[:, 0, 0]).cos().abs().mean(1) * discrete)
    close(divergence_penalty(2 * x, (1.0, 1 / 32), periodic=False), 2.0)


@pytest.mark.parametrize(
    "shape, periodic", [((1, 2, 2, 8), False), ((1, 2, 8, 2), False), ((1, 1, 4, 4), True), ((1, 3, 4, 4), True)]
)
def test_divergence_refuses_what_has_none(shape: tuple[int, ...], periodic: bool) -> None:
    with pytest.raises(ValueError, match=r"divergence is of|has none inside"):
        divergence_penalty(torch.zeros(shape), periodic=periodic)


# ---- conservation, boundary, positivity ---------------------------------------------------------------------------


def test_conservation_is_of_the_samples_own_first_state() -> None:
    first = fields_of(3, 2, 4, 5) + 1
    close(conservation_penalty(first.roll((1, 2), (2, 3)), first), 0.0)
    close(conservation_penalty(1.5 * first, first), 0.5, 1e-7)
    fields = fields_of(3, 2, 4, 5, seed=1)
    now, before = (x.numpy().sum((2, 3)) for x in (fields, first))
    close(conservation_penalty(fields, first), (np.abs(now - before) / (np.abs(before) + 1e-8)).mean(1))


def test_the_originals_conservation_depends_on_what_came_first() -> None:
    first, other = fields_of(4, 1, 3, 3) + 1, fields_of(4, 1, 3, 3, seed=1) + 1
    close(first_batch_conservation_penalty(first, first), 0.0)
    assert (first_batch_conservation_penalty(first, other) > 0.01).all()  # of fields that conserve perfectly
    with pytest.raises(ValueError, match="differ in shape"):
        first_batch_conservation_penalty(first, other[:3])


@pytest.mark.parametrize("edges", ["all", "left", "right", "top", "bottom"])
def test_boundary_counts_each_edge_point_once(edges: str) -> None:
    fields = fields_of(2, 3, 4, 5)
    places = {
        (i, j)
        for i in range(4)
        for j in range(5)
        for name, there in {"left": j == 0, "right": j == 4, "top": i == 0, "bottom": i == 3}.items()
        if there and edges in ("all", name)
    }
    values = np.stack([fields[:, :, i, j].numpy() for i, j in places])
    close(boundary_penalty(fields, 0.3, edges), ((values - 0.3) ** 2).mean((0, 2)))


def test_boundary_of_a_line_is_its_ends() -> None:
    fields = fields_of(2, 1, 1, 6)
    ends = fields[:, 0, 0].numpy()
    close(boundary_penalty(fields, 0.3), ((ends[:, [0, -1]] - 0.3) ** 2).mean(1))
    close(boundary_penalty(fields, 0.3, "left"), (ends[:, 0] - 0.3) ** 2)
    for edges in ("top", "sides"):
        with pytest.raises(ValueError, match="edges must be all"):
            boundary_penalty(fields, 0.3, edges)


def test_positivity() -> None:
    density = fields_of(3, 1, 4, 5)
    close(positivity_penalty(density), np.maximum(-density.numpy(), 0).mean((1, 2, 3)))
    close(positivity_penalty(density.abs()), 0.0)


# ---- latents ------------------------------------------------------------------------------------------------------


def test_latent_penalties_are_numpys() -> None:
    z = fields_of(3, 5, 4)
    norms = np.linalg.norm(z.numpy(), axis=2)
    close(latent_norm_penalty(z), np.abs(norms - 1).mean(1))
    for b in range(3):
        pairs = [(s, t) for s in range(5) for t in range(5) if s != t]
        cosines = [abs(z[b, s].numpy() @ z[b, t].numpy()) / (norms[b, s] * norms[b, t]) for s, t in pairs]
        close(latent_diversity_penalty(z)[b], np.mean(cosines), 1e-7)


def test_latent_penalties_of_known_tokens() -> None:
    orthogonal = torch.eye(4)[None]
    close(latent_norm_penalty(orthogonal), 0.0)
    close(latent_diversity_penalty(3 * orthogonal), 0.0)
    close(latent_diversity_penalty(torch.ones(1, 4, 3)), 1.0, 1e-6)
    close(latent_diversity_penalty(torch.zeros(1, 4, 3)), 0.0)


@pytest.mark.parametrize("penalty", [latent_norm_penalty, latent_diversity_penalty])
def test_tokens_of_zeros_have_a_finite_gradient(penalty: Callable[[Tensor], Tensor]) -> None:
    z = torch.zeros(2, 4, 3, requires_grad=True)
    penalty(z).sum().backward()
    assert z.grad.isfinite().all()


# ---- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients(penalty: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(penalty, fields_of(2, 2, 3, 4).requires_grad_())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_autocast_changes_nothing_after_the_rounding(penalty: Callable[[Tensor], Tensor]) -> None:
    fields = fields_of(2, 2, 3, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(fields)
    assert value.dtype == torch.float32 and torch.equal(value, penalty(fields.float()))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.data(), st.integers(0, 2**31))
def test_no_penalty_depends_on_the_split(batch: int, data: st.DataObject, seed: int) -> None:
    cut = data.draw(st.integers(1, batch - 1))
    fields = fields_of(batch, 2, 3, 4, seed=seed)
    for penalty in PENALTIES:
        close(torch.cat((penalty(fields[:cut]), penalty(fields[cut:]))), penalty(fields))
