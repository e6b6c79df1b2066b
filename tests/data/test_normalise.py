from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data import pdebench, ups
from data.normalise import Normaliser, fit, moments
from fabric_trainer.errors import InputError


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    level=st.sampled_from([0.0, 1.0, -3e4, 1e5]),
    by_frame=st.booleans(),
    seed=st.integers(0, 99),
)
def test_streamed_moments_are_numpys(n: int, cuts: list[int], level: float, by_frame: bool, seed: int) -> None:
    """However the trajectories are cut, and far from zero too."""
    values = (np.random.default_rng(seed).normal(size=(n, 2, 3, 2, 3)) + level).astype(np.float32)
    ends = sorted({0, n, *(cut for cut in cuts if cut < n)})
    mean, std = moments((values[a:b] for a, b in pairwise(ends)), by_frame)
    axes = (0, 3, 4) if by_frame else (0, 1, 3, 4)
    np.testing.assert_allclose(mean, np.atleast_2d(values.mean(axes, dtype=np.float64)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(std, np.atleast_2d(values.std(axes, dtype=np.float64)), rtol=1e-9)
    assert mean.dtype == std.dtype == np.float64 and mean.shape == ((2, 3) if by_frame else (1, 3))


def write(path: Path, data: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = data.astype(np.float32)


def test_a_split_has_the_training_splits_scale(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write(tmp_path / "cfd1d_shocktube_train.h5", random.normal([5, -2, 0.1], [2, 30, 1e-3], (6, 4, 8, 3)))
    write(tmp_path / "cfd1d_shocktube_val.h5", random.normal([6, -2, 0.1], [4, 30, 1e-3], (2, 4, 8, 3)))
    train, val = (ups.read(tmp_path, "cfd1d_shocktube", split) for split in ("train", "val"))
    normaliser = fit(train)
    u = normaliser(train.tensor()).double()
    torch.testing.assert_close(u.mean((0, 1, 3, 4)), torch.zeros(3).double(), rtol=0, atol=2e-5)
    torch.testing.assert_close(u.std((0, 1, 3, 4), correction=0), torch.ones(3).double(), rtol=1e-4, atol=0)
    v = val.tensor()
    assert normaliser(v)[:, :, 0].std() > 1.5  # not by its own
    torch.testing.assert_close(normaliser.inverse(normaliser(v)), v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normaliser(v[:, 2]), normaliser(v)[:, 2])  # single states
    torch.testing.assert_close(normaliser(v[:, 2], frame=1), normaliser(v)[:, 2])


def test_frames_of_a_steady_task_have_each_their_own(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    data = np.stack((random.uniform(3, 12, (20, 4, 4)), random.normal(0, 1e-2, (20, 4, 4))), 1)[..., None]
    write(tmp_path / "darcy2d_train.h5", data)
    fields = ups.read(tmp_path, "darcy2d", "train")
    normaliser, u = fit(fields), fields.tensor()
    assert normaliser.mean.shape == (2, 1)
    both = normaliser(u)
    torch.testing.assert_close(both.std((0, 2, 3, 4), correction=0), torch.ones(2), rtol=1e-4, atol=0)
    for frame in (0, 1):
        torch.testing.assert_close(normaliser(u[:, frame], frame), both[:, frame])
        torch.testing.assert_close(normaliser.inverse(both[:, frame], frame), u[:, frame], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="need a frame"):
        normaliser(u[:, 0])


def test_it_is_part_of_a_network(tmp_path: Path) -> None:
    write(tmp_path / "burgers1d_train.h5", np.random.default_rng(0).normal(3, 2, (4, 3, 8)))
    network = nn.ModuleDict({"burgers1d": fit(ups.read(tmp_path, "burgers1d", "train"))})
    assert not list(network.parameters())
    other = nn.ModuleDict({"burgers1d": Normaliser(torch.zeros(1, 1), torch.ones(1, 1))})
    other.load_state_dict(network.state_dict())
    u = torch.randn(2, 1, 1, 8)
    assert torch.equal(network["burgers1d"](u), other["burgers1d"](u)) and set(network.state_dict()) == {
        "burgers1d.mean",
        "burgers1d.std",
    }


def test_a_constant_channel_and_one_that_is_not_finite(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(4, 3, 8, 2))
    data[..., 1] = 0.1
    write(tmp_path / "burgers1d_train.h5", data)
    assert fit(ups.read(tmp_path, "burgers1d", "train")).std[0, 1] == 1
    for value in (np.nan, np.inf):
        data[1, 1, 1, 0] = value
        write(tmp_path / "burgers1d_train.h5", data)
        with pytest.raises(InputError, match=r"burgers1d_train\.h5: burgers1d_train holds values that are not finite"):
            fit(ups.read(tmp_path, "burgers1d", "train"))


def test_real_files(test_data: Path) -> None:
    fields = ups.read(test_data / "data/pde/ups_layout", "burgers1d", "train")
    u, normaliser = fields.read().astype(np.float64), fit(fields)
    assert normaliser.mean.item() == pytest.approx(u.mean(), abs=1e-8)
    assert normaliser.std.item() == pytest.approx(u.std(), rel=1e-7)
    darcy = pdebench.fields(test_data / "data/pde/pdebench_layout/2D_DarcyFlow_n16_train.hdf5", given="nu")
    u = darcy.read().astype(np.float64)
    np.testing.assert_allclose(fit(darcy).std[:, 0], u.std((0, 2, 3, 4)), rtol=1e-6)
