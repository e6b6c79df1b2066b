from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.advection import FRAME_TIME, Advection, fault, generate
from data.burgers import Burgers
from data.burgers import generate as burgers
from data.waves import centres, draw, initial_condition


def test_starts_as_burgers_does() -> None:
    same = {"nx": 64, "samples": 20, "frames": 1, "seed": 3}
    np.testing.assert_array_equal(generate(Advection(**same)), burgers(Burgers(**same)))  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), cells=st.integers(-70, 70))
def test_whole_cells_are_a_periodic_shift(seed: int, cells: int) -> None:
    nx = 32
    u = generate(Advection(beta=cells / nx / FRAME_TIME, nx=nx, samples=2, frames=4, seed=seed))
    for n in range(2):
        start = initial_condition(np.random.default_rng((seed, n)), nx)
        for frame in range(4):
            np.testing.assert_allclose(u[n, frame], np.roll(start, frame * cells), atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.7, -2.0, 7.0])
def test_is_the_first_state_at_x_minus_beta_t(beta: float) -> None:
    """Against positions in exact fractions."""
    advection = Advection(beta=beta, nx=20, samples=6, frames=8)
    u, speed = generate(advection), Fraction(str(beta))
    for n in range(6):
        wave = draw(np.random.default_rng((0, n)), 20)
        for frame in range(8):
            x = [(Fraction(2 * i + 1, 40) - speed * Fraction(frame, 100)) % 1 for i in range(20)]
            inside = np.array([position != 0 for position in x])  # at 0 is the jump: either side will do
            expected = wave(np.array([float(position) for position in x]))
            np.testing.assert_allclose(u[n, frame, inside], expected[inside], atol=1e-6)


def test_satisfies_the_equation() -> None:
    """Away from the period's end, by central differences of the float64 waves in time and space."""
    wave, x, step, beta = draw(np.random.default_rng(5), 128), centres(128)[10:-10], 1e-4, 0.4
    in_time = (wave(x - beta * step) - wave(x + beta * step)) / (2 * step)
    in_space = (wave(x + step) - wave(x - step)) / (2 * step)
    assert np.abs(in_space).max() > 1
    np.testing.assert_allclose(in_time, -beta * in_space, atol=1e-3)


def test_norms_are_conserved() -> None:
    """Exactly after whole cells, and up to the sums' error, which falls with the grid, in between."""
    errors = []
    for nx in (64, 256):
        u = generate(Advection(beta=0.25, nx=nx, samples=8, frames=26)).astype(np.float64)
        for power in (1, 2):
            norm = (np.abs(u) ** power).mean(2)
            np.testing.assert_allclose(norm[:, 25], norm[:, 0], rtol=1e-6)  # 0.0625 is 4 and 16 cells
            error = np.abs(norm - norm[:, :1]).max()
        errors.append(error)
    assert errors[1] < 0.5 * errors[0] < 0.05


def test_fault_sees_an_error() -> None:
    u = generate(Advection(beta=0.4, nx=250, samples=3, frames=12))
    assert fault(u, 0.4) is None
    assert "shifted" in fault(u, 0.8)  # type: ignore[operator]
    u[1, 4, 7] = np.nan
    assert fault(u, 0.4)


@pytest.mark.parametrize(
    "wrong", [{"beta": np.nan}, {"beta": np.inf}, {"nx": 3}, {"samples": 0}, {"frames": 0}, {"seed": -1}]
)
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Advection(**wrong)  # type: ignore[arg-type]
