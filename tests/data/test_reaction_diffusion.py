from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.sparse import diags, identity, kron

from data.reaction_diffusion import FRAME_TIME, ReactionDiffusion, decay_rates, diffused, fault, generate, solve, strang

RATES, K = (1e-3, 5e-3), 5e-3


def noise(nx: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, nx, nx))


def laplacian(nx: int):
    """Five points, no flow through the boundary of (-1, 1)^2: minus the graph's, over dx^2."""
    line = diags([-np.ones(nx - 1), np.r_[1, np.full(nx - 2, 2), 1], -np.ones(nx - 1)], [-1, 0, 1])
    return -(kron(line, identity(nx)) + kron(identity(nx), line)).tocsr() * (nx / 2) ** 2


def reference(start: np.ndarray, frames: int, rates=RATES, k: float = K) -> np.ndarray:
    """An adaptive Runge-Kutta method of order 8 on the whole system at once."""
    nx, spread = start.shape[1], laplacian(start.shape[1])

    def rate(_, state):
        u, v = state.reshape(2, -1)
        return np.concatenate((rates[0] * (spread @ u) + u - u**3 - k - v, rates[1] * (spread @ v) + u - v))

    times = np.arange(frames) * FRAME_TIME
    solved = solve_ivp(rate, (0, times[-1]), start.ravel(), "DOP853", times, rtol=1e-10, atol=1e-10)
    return solved.y.T.reshape(frames, 2, nx, nx)


def test_against_an_independent_solver() -> None:
    start = noise(16)
    np.testing.assert_allclose(solve(start, RATES, K, 41), reference(start, 41), atol=5e-6)
    np.testing.assert_allclose(solve(start, (0.02, 0.05), 0.3, 11), reference(start, 11, (0.02, 0.05), 0.3), atol=2e-5)


def test_converges_under_time_refinement() -> None:
    start, rates = noise(16), np.array(RATES)[:, None, None] * decay_rates(16, 16)
    truth = reference(start, 3)
    errors = [np.abs(solve(start, RATES, K, 3, steps)[-1] - truth[-1]).max() for steps in (2, 4, 8)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]  # fourth order: 16
    split = [np.abs(strang(start, rates, K, 2 * FRAME_TIME / n, n) - truth[-1]).max() for n in (32, 64, 128)]
    np.testing.assert_allclose([split[0] / split[1], split[1] / split[2]], 4, rtol=0.05)  # second


def test_a_constant_state_follows_the_ode() -> None:
    for u0, v0 in ((0.3, -0.2), (-2.0, 1.5)):
        start = np.array([u0, v0])[:, None, None] * np.ones((1, 6, 6))
        states = solve(start, RATES, K, 101)
        times = np.arange(101) * FRAME_TIME
        ode = solve_ivp(
            lambda _, w: (w[0] - w[0] ** 3 - K - w[1], w[0] - w[1]),
            (0, times[-1]),
            (u0, v0),
            "DOP853",
            times,
            rtol=1e-11,
            atol=1e-11,
        ).y.T
        np.testing.assert_allclose(states, ode[:, :, None, None] * np.ones((1, 1, 6, 6)), atol=1e-6)


def diffusion_alone(start: np.ndarray, time: float) -> np.ndarray:
    return diffused(start, np.exp(-time * np.array(RATES)[:, None, None] * decay_rates(*start.shape[1:])))


def test_diffusion_decays_cosine_modes_exactly() -> None:
    nx, x = 24, (np.arange(24) + 0.5) / 24
    for row, column in ((0, 0), (1, 0), (3, 5), (23, 23)):
        mode = np.cos(np.pi * row * x)[:, None] * np.cos(np.pi * column * x)
        rate = nx**2 * (np.sin(np.pi * row / 48) ** 2 + np.sin(np.pi * column / 48) ** 2)
        np.testing.assert_allclose(laplacian(nx) @ mode.ravel(), -rate * mode.ravel(), atol=1e-9)
        after = diffusion_alone(np.stack((mode, mode)), 2.0)
        for species, diffusivity in enumerate(RATES):
            np.testing.assert_allclose(after[species], mode * np.exp(-2 * diffusivity * rate), atol=1e-12)
    # the continuous equation's rates are (pi m / 2)^2
    errors = [np.abs(decay_rates(n, n)[2, 1] - 5 * (np.pi / 2) ** 2) for n in (16, 32, 64)]
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.05)


def test_no_flow_keeps_the_mean() -> None:
    start = noise(20)
    after = diffusion_alone(start, 30.0)
    np.testing.assert_allclose(after.mean((1, 2)), start.mean((1, 2)), atol=1e-14)
    assert after.std((1, 2))[1] < 0.1 * start.std((1, 2))[1]


def test_symmetries() -> None:
    """Mirrored and transposed starts give mirrored and transposed states; with k = 0, so do negative ones."""
    start = noise(12)
    states = solve(start, RATES, K, 6)
    for turn in (lambda w: w[..., ::-1], lambda w: w[..., ::-1, :], lambda w: np.swapaxes(w, -1, -2)):
        np.testing.assert_allclose(solve(turn(start).copy(), RATES, K, 6), turn(states), atol=1e-12)
    np.testing.assert_allclose(solve(-start, RATES, 0.0, 6), -solve(start, RATES, 0.0, 6), atol=1e-12)


def test_initial_noise_and_order_of_axes() -> None:
    made = generate(ReactionDiffusion(nx=32, samples=4, frames=2, seed=9))
    assert abs(made[:, 0].mean()) < 0.05 and abs(made[:, 0].std() - 1) < 0.05
    start = np.random.default_rng((9, 2)).standard_normal((2, 32, 32))
    np.testing.assert_allclose(made[2, 1, :, :, 1], reference(start, 2)[1, 1], atol=5e-6)


def test_fault_sees_what_leaves_the_square() -> None:
    made = generate(ReactionDiffusion(nx=8, samples=2, frames=5))
    assert fault(made, K) is None
    outside, undefined = made.copy(), made.copy()
    outside[1, 3, 2, 1, 0] = 1.01 * np.abs(made[1, 0]).max()
    undefined[0, 1, 2, 3, 1] = np.nan
    assert "square" in fault(outside, K) and fault(undefined, K)  # type: ignore[operator]
    # an unstable method would leave it
    assert fault(np.stack([made[:, 0] * factor for factor in (1, -2, 4)], 1), K)


@pytest.mark.parametrize(
    "wrong", [{"Du": -1.0}, {"Dv": np.nan}, {"k": 2.0}, {"nx": 1}, {"samples": 0}, {"frames": 0}, {"seed": -1}]
)
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReactionDiffusion(**wrong)  # type: ignore[arg-type]
