from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.burgers import Burgers, Outflow, fault, generate, solve
from data.generated import check, ensure
from data.pdebench import fields
from data.waves import centres, initial_condition

SMALL = Burgers(nx=32, samples=3, frames=6)


def cole_hopf(nx: int, viscosity: float, t: float) -> np.ndarray:
    """Exact cell averages of u = -2 nu (ln phi)_x, with phi = 1 + 0.9 exp(-nu k^2 t) cos(k x) and k = 2 pi."""
    k, faces = 2 * np.pi, np.arange(nx + 1) / nx
    phi = 1 + 0.9 * np.exp(-viscosity * k**2 * t) * np.cos(k * faces)
    return -2 * viscosity * np.diff(np.log(phi)) * nx


def starts(samples: int = 8, nx: int = 128) -> np.ndarray:
    return np.stack([initial_condition(np.random.default_rng((7, n)), nx) for n in range(samples)])


def test_exact_solution_and_second_order() -> None:
    errors = []
    for nx in (32, 64, 128):
        u = solve(cole_hopf(nx, 0.05, 0)[None], 0.05, frames=21)[0]
        errors.append(np.abs(u[-1] - cole_hopf(nx, 0.05, 0.2)).mean())
    assert np.abs(cole_hopf(128, 0.05, 0.2) - cole_hopf(128, 0.05, 0)).mean() > 1000 * errors[-1]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_refinement_with_shocks() -> None:
    fine = solve(starts(4, 512), 0.01 / np.pi, frames=31)[:, -1]
    errors = []
    for factor in (8, 4, 2):
        coarse = starts(4, 512).reshape(4, -1, factor).mean(2)
        u = solve(coarse, 0.01 / np.pi, frames=31)[:, -1]
        errors.append(np.abs(u - fine.reshape(4, -1, factor).mean(2)).mean())
    assert errors[0] > 1.9 * errors[1] > 1.9**2 * errors[2]


def test_mean_is_conserved_and_energy_falls() -> None:
    u = solve(starts(), 0.01 / np.pi, frames=41)
    assert np.abs(u.mean(2) - u[:, :1].mean(2)).max() < 1e-13
    energy = (u**2).mean(2)
    assert (np.diff(energy, axis=1) <= 1e-14).all()
    assert (energy[:, -1] < 0.9 * energy[:, 0]).any()


def test_fault_sees_a_broken_law() -> None:
    u = solve(starts(), 0.01 / np.pi, frames=11).astype(np.float32)
    assert fault(u) is None
    drifting, undefined, backwards = u.copy(), u.copy(), u[:, ::-1]
    drifting[3, 5] += 1e-4
    undefined[0, 1, 2] = np.nan
    assert "mean" in fault(drifting) and "energy" in fault(backwards) and fault(undefined)  # type: ignore[operator]


def test_flux_is_pdebenchs() -> None:
    u = starts(3, 64).T
    around = np.concatenate((u[-2:], u, u[:2]))
    left, right = around[1:-1] - around[:-2], around[2:] - around[1:-1]
    central = 0.5 * (left + right)
    bound = np.minimum(np.minimum(2 * np.abs(left), 2 * np.abs(right)), np.abs(central))
    slope = np.sign(central) * (left * right > 0) * bound
    a, b = (around[1:-1] + slope / 2)[:-1], (around[1:-1] - slope / 2)[1:]
    face = 0.5 * (a**2 / 2 + b**2 / 2) - 0.25 * np.abs(a + b) * (b - a) - 0.003 * np.diff(around[1:-1], axis=0) * 64
    out = np.empty_like(u)
    Outflow(u.shape, 0.003)(u, out)
    np.testing.assert_allclose(out, np.diff(face, axis=0) * 64, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.integers(0, 63), nu=st.sampled_from([0.001, 0.01, 0.1]))
def test_symmetries(seed: int, shift: int, nu: float) -> None:
    u0 = initial_condition(np.random.default_rng(seed), 64)[None]
    u = solve(u0, nu / np.pi, frames=4)
    np.testing.assert_array_equal(solve(np.roll(u0, shift, 1), nu / np.pi, 4), np.roll(u, shift, 2))
    np.testing.assert_allclose(solve(-u0[:, ::-1], nu / np.pi, 4), -u[:, :, ::-1], atol=1e-12)
    assert u.max() <= u0.max() + 1e-9 and u.min() >= u0.min() - 1e-9  # the maximum principle


def test_trajectory_does_not_depend_on_company() -> None:
    u0 = starts(5, 64)
    together = solve(u0, 0.01 / np.pi, 6)
    for n in range(5):
        np.testing.assert_array_equal(solve(u0[n : n + 1], 0.01 / np.pi, 6)[0], together[n])
    few, many = Burgers(nx=32, samples=2, frames=4), Burgers(nx=32, samples=4, frames=4)
    np.testing.assert_array_equal(generate(few), generate(many)[:2])


def test_initial_conditions_have_pdebenchs_kinds() -> None:
    u = np.stack([initial_condition(np.random.default_rng((0, n)), 256) for n in range(400)])
    assert np.abs(u).max() <= 4  # four amplitudes below 1
    windowed = np.abs(u[:, 0]) + np.abs(u[:, -1]) < 1e-6
    assert 0.05 < windowed.mean() < 0.16
    assert 0.4 < (u.mean(1) > 0).mean() < 0.6
    one_sign = (u >= 0).all(1) | (u <= 0).all(1)
    assert 0.1 < one_sign.mean() < 0.9


def test_file_layout(tmp_path: Path) -> None:
    path = ensure(tmp_path, SMALL)
    with h5py.File(path) as file:
        assert file["tensor"].shape == (3, 6, 32) and file["tensor"].dtype == np.float32
        np.testing.assert_allclose(file["x-coordinate"][:], centres(32), rtol=1e-6)
        np.testing.assert_allclose(file["t-coordinate"][:], np.arange(7) * 0.01, atol=1e-7)
        assert file.attrs["Nu"] == 0.01
    assert [p.name for p in tmp_path.iterdir()] == [SMALL.file_name]


def test_same_seed_same_bytes_other_seed_other_trajectories(tmp_path: Path) -> None:
    one, two = ensure(tmp_path / "one", SMALL), ensure(tmp_path / "two", SMALL)
    assert one.read_bytes() == two.read_bytes()
    other = fields(ensure(tmp_path, Burgers(nx=32, samples=3, frames=6, seed=1))).read()[:, 0, 0, 0]
    distances = np.abs(fields(one).read()[:, None, 0, 0, 0] - other[None]).max(-1)
    assert distances.min() > 0.01


def test_a_good_file_is_kept(tmp_path: Path) -> None:
    path = ensure(tmp_path, SMALL)
    before = path.stat()
    said: list[str] = []
    assert ensure(tmp_path, SMALL, said.append) == path and not said
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def _edit(path: Path, change: str) -> None:
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
        return
    with h5py.File(path, "a") as file:
        if change == "value":
            file["tensor"][1, 2, 3] += 1e-3
        elif change == "attribute":
            file.attrs["Nu"] = 0.1
        elif change == "shape":
            del file["tensor"]
            file["tensor"] = np.zeros((2, 6, 32), np.float32)
        else:
            del file["tensor"]


@pytest.mark.parametrize(
    ("change", "word"),
    [("value", "checksum"), ("attribute", "Nu"), ("shape", "holds"), ("dataset", "read"), ("truncated", "read")],
)
def test_a_bad_file_is_named_and_made_anew(tmp_path: Path, change: str, word: str) -> None:
    path = ensure(tmp_path, SMALL)
    good = path.read_bytes()
    _edit(path, change)
    assert word in (check(path, SMALL) or "")
    said: list[str] = []
    ensure(tmp_path, SMALL, said.append)
    assert len(said) == 1 and str(path) in said[0] and word in said[0]
    assert path.read_bytes() == good


@pytest.mark.parametrize("wrong", [{"nu": -1.0}, {"nx": 3}, {"samples": 0}, {"frames": 0}, {"seed": -1}])
def test_wrong_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Burgers(**wrong)  # type: ignore[arg-type]


def test_bytes_of_the_first_version(tmp_path: Path) -> None:
    """A file that was made once stays valid. Its digest is of float32, so other machines' rounding seldom shows."""
    with h5py.File(ensure(tmp_path, SMALL)) as file:
        assert file.attrs["sha256"] == "af6ea3d07060cd5369fe69487835180122f33b1d49670eeaafb30b72ef814d59"
