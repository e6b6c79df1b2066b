from __future__ import annotations

import numpy as np
import pytest

from data.darcy import Darcy, fault, generate, imbalance, random_field, solve
from data.waves import centres


def dense(a: np.ndarray, source: np.ndarray | float) -> np.ndarray:
    """The same volumes cell by cell: half a cell's resistance on either side of each face, in series."""
    n, step = len(a), 1 / len(a)
    matrix, right = np.zeros((n * n, n * n)), np.zeros(n * n)
    right += np.ravel(np.broadcast_to(source, a.shape)) * step**2
    for y in range(n):
        for x in range(n):
            for there in ((y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)):
                inside = all(0 <= place < n for place in there)
                resistance = 0.5 / a[y, x] + (0.5 / a[there] if inside else 0)
                matrix[y * n + x, y * n + x] += 1 / resistance
                if inside:
                    matrix[y * n + x, there[0] * n + there[1]] -= 1 / resistance
    return np.linalg.solve(matrix, right).reshape(n, n)


def series(n: int, modes: int = 199) -> np.ndarray:
    """-Laplacian u = 1 with u = 0 around, at the centres: 16/pi^4 sum over odd m, k of sin sin / (m k (m^2 + k^2))."""
    odd = np.arange(1, modes + 1, 2)
    sines = np.sin(np.pi * odd[:, None] * centres(n))
    weight = 16 / np.pi**4 / (odd[:, None] * odd * (odd[:, None] ** 2 + odd**2))
    return sines.T @ weight @ sines


def media(samples: int = 4, nx: int = 16, low: float = 0.1, high: float = 1.0) -> np.ndarray:
    return generate(Darcy(samples=samples, nx=nx, low=low, high=high))[0].astype(np.float64)


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (3.0, 12.0), (1e-3, 1e3)])
def test_against_a_dense_solver(low: float, high: float) -> None:
    for a in media(3, 9, low, high):
        np.testing.assert_allclose(solve(a, 1.0), dense(a, 1.0), rtol=1e-9)
    a = np.exp(np.random.default_rng(0).standard_normal((7, 7)))
    source = np.random.default_rng(1).standard_normal((7, 7))
    np.testing.assert_allclose(solve(a, source), dense(a, source), rtol=1e-9, atol=1e-12)


def test_constant_medium_against_the_series() -> None:
    errors = []
    for n in (16, 32, 64):
        u = solve(np.full((n, n), 0.7), 2.1)
        errors.append(np.abs(u - 3 * series(n)).max())
    assert errors[-1] < 1e-3 * 3 * series(64).max()
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.1)


def test_second_order_for_a_smooth_medium() -> None:
    """A made-up solution: u = sin(pi x) sin(2 pi y), a = 1 + x/2 + y^2, and the source that they need."""
    errors, pi = [], np.pi
    for n in (16, 32, 64):
        x, y = centres(n)[None], centres(n)[:, None]
        a = 1 + x / 2 + y**2
        u = np.sin(pi * x) * np.sin(2 * pi * y)
        in_x, in_y = pi * np.cos(pi * x) * np.sin(2 * pi * y), 2 * pi * np.sin(pi * x) * np.cos(2 * pi * y)
        source = 5 * pi**2 * a * u - 0.5 * in_x - 2 * y * in_y
        errors.append(np.abs(solve(a, source) - u).max())
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.1)


def test_balance_and_maximum_principle() -> None:
    for a in media(6, 32):
        u = solve(a, 1.0)
        assert np.abs(imbalance(a, u, 1.0)).max() < 1e-13
        assert u.min() > 0
        # all that the source gives leaves through the boundary
        out = 2 * sum((a * u)[edge].sum() for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]))
        np.testing.assert_allclose(out, 1.0, rtol=1e-10)
        # a source that is nowhere negative makes no minimum inside
        some = np.where(np.random.default_rng(2).uniform(size=a.shape) < 0.02, 1.0, 0.0)
        assert solve(a, some).min() >= 0
        assert imbalance(a, u * 1.01, 1.0).min() > 1e-7  # every cell gives too much


def test_scaling_and_symmetry() -> None:
    a = media(1, 24)[0]
    u = solve(a, 1.0)
    np.testing.assert_allclose(solve(5 * a, 3.0), 0.6 * u, rtol=1e-10)
    for turn in (np.transpose, np.flipud, np.fliplr, np.rot90):
        np.testing.assert_allclose(solve(turn(a).copy(), 1.0), turn(u), rtol=1e-10)
    symmetric = a * a[::-1] * a[:, ::-1] * a[::-1, ::-1]
    u = solve(symmetric, 1.0)
    np.testing.assert_allclose(u, u[::-1], rtol=1e-10)
    np.testing.assert_allclose(u, u[:, ::-1], rtol=1e-10)
    assert np.abs(u - u.T).max() > 1e-4


def test_field_has_the_covariance() -> None:
    """Its mean over the square is 0, and its variance at each point that of the sum over cosine modes."""
    fields = np.stack([random_field(np.random.default_rng(n), 16) for n in range(3000)])
    assert np.abs(fields.mean((1, 2))).max() < 1e-13
    mode, x = np.arange(16), centres(16)
    norm = np.where(mode > 0, 2, 1)[:, None] * np.cos(np.pi * mode[:, None] * x) ** 2
    weight = (np.pi**2 * (mode[:, None] ** 2 + mode**2) + 9.0) ** -2
    weight[0, 0] = 0
    np.testing.assert_allclose(fields.var(0), norm.T @ weight @ norm, rtol=0.15)


def test_media_have_two_phases() -> None:
    nu, u = generate(Darcy(samples=40, nx=16, low=3.0, high=12.0))
    assert set(np.unique(nu)) == {3.0, 12.0}
    assert 0.4 < (nu == 12).mean() < 0.6
    np.testing.assert_array_equal(u[7], solve(nu[7].astype(np.float64), 1.0).astype(np.float32))


def test_fault_sees_an_error() -> None:
    nu, u = generate(Darcy(samples=3, nx=32))
    assert fault(nu, u, 1.0) is None
    assert "balance" in fault(nu, u, 1.001)  # type: ignore[operator]
    undefined = u.copy()
    undefined[1, 2, 3] = np.nan
    assert fault(nu, undefined, 1.0)
    assert "positive" in fault(nu, -u, -1.0)  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0.0}, {"beta": np.inf}, {"low": 0.0}, {"low": 2.0}, {"high": np.nan}, {"nx": 1}, {"samples": 0}],
)
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Darcy(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        Darcy(seed=-1)
