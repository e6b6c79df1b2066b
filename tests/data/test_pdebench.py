from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from data.pdebench import fields
from fabric_trainer.errors import InputError


def write(path: Path, **datasets: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("_", "-")] = values
        file.attrs["Nu"] = 0.01
    return path


def axes(x: int = 8, t: int = 6) -> dict[str, np.ndarray]:
    return {"x_coordinate": np.arange(x, dtype=np.float64), "t_coordinate": np.arange(t, dtype=np.float64)}


@pytest.mark.parametrize("times", [6, 5])
def test_reads_both_lengths_of_time(tmp_path: Path, times: int) -> None:
    tensor = np.random.default_rng(0).normal(size=(4, times, 8))
    got = fields(write(tmp_path / "a.hdf5", tensor=tensor, **axes()))
    u = got.read()
    np.testing.assert_array_equal(u[:, :, 0, 0], tensor.astype(np.float32))
    assert got.t is not None and u.dtype == got.x.dtype == got.t.dtype == np.float32
    np.testing.assert_array_equal(got.t, np.arange(times))
    assert got.attributes["Nu"] == 0.01


def test_some_samples_and_another_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", tensor=np.zeros((4, 5, 8)), nu=np.ones((3, 5, 8)), **axes())
    assert fields(path).read(1, 3).shape == (2, 5, 1, 1, 8)
    assert (fields(path, "nu").read() == 1).all() and len(fields(path, "nu")) == 3


def test_missing_dataset_names_file_wish_and_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5", data=np.zeros((4, 5, 8)), **axes())
    with pytest.raises(InputError, match=r"a\.hdf5: expected a dataset 'tensor', found .*'data' \(4, 5, 8\)") as caught:
        fields(path)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.hdf5: no such file"):
        fields(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with pytest.raises(InputError, match=r"text\.hdf5: not a readable HDF5 file"):
        fields(tmp_path / "text.hdf5")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((4, 5), r"expected 'tensor' as \(N, T, X\[, C\]\), found \(4, 5\)"),
        ((4, 4, 8), r"'t-coordinate' \(6,\) does not fit 4 points"),
        ((4, 5, 7), r"'x-coordinate' \(8,\) does not fit 7 points"),
        ((4, 5, 8, 9), r"expected 'tensor' as \(N, T, X\[, C\]\), found \(4, 5, 8, 9\)"),
    ],
)
def test_wrong_shape(tmp_path: Path, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fields(write(tmp_path / "a.hdf5", tensor=np.zeros(shape), **axes()))


def test_real_burgers(test_data: Path) -> None:
    got = fields(test_data / "data/pde/pdebench_layout/1D_Burgers_Sols_Nu0.01_n16.hdf5")
    assert got.shape == (800, 17, 1, 1, 16) and got.t is not None and got.t.shape == (17,) and got.t[-1] == 1
    assert got.attributes["Nu"] == 0.01
    energy = (got.read()[:, :, 0, 0].astype(np.float64) ** 2).mean(2)
    assert (energy[:, -1] < energy[:, 0]).mean() > 0.99
