"""The UPS layout and PDEBench's planes, beside plain h5py."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import fields as fields_module
from data import pdebench, ups
from data.fields import arranged, arranged_shape
from fabric_trainer.errors import InputError


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(path: Path, attributes: dict[str, float] | None = None, **datasets: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("_", "-")] = values
        file.attrs.update(attributes or {})
    return path


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the UPS layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "shape", "axes"),
    [
        ("burgers1d", (5, 4, 6), "ntx"),
        ("cfd1d_shocktube", (5, 4, 6, 3), "ntxc"),
        ("shallow_water2d", (5, 4, 6, 7, 2), ""),
    ],
)
def test_layouts(tmp_path: Path, task: str, shape: tuple[int, ...], axes: str) -> None:
    stored = numbers(*shape)
    write(tmp_path / f"{task}_val.h5", {"Nu": 0.1}, data=stored)
    expected = {
        "ntx": lambda: stored[:, :, None, None],
        "ntxc": lambda: np.moveaxis(stored, 3, 2)[:, :, :, None],
        "": lambda: np.moveaxis(stored, 4, 2),
    }[axes]()
    got = ups.read(tmp_path, task, "val")
    assert got.shape == expected.shape and len(got) == 5 and got.name == f"{task}_val" and not got.steady
    np.testing.assert_array_equal(got.read(), expected)
    np.testing.assert_array_equal(got.read(1, 3), expected[1:3])
    np.testing.assert_array_equal(np.concatenate(list(got.chunks())), expected)
    assert got.read().dtype == np.float32 and got.read().flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(got.x, (np.arange(shape[3 if axes == "" else 2]) + 0.5) / got.shape[4], rtol=1e-6)
    assert got.t is None and got.attributes == {"Nu": 0.1}
    picked = got[np.array([4, 0, 4]), np.array([1, 3, 1])]
    assert torch.equal(picked, torch.from_numpy(expected[[4, 0, 4], [1, 3, 1]].copy()))
    assert got[np.array([[1], [2]]), np.array([0, 3])].shape == (2, 2, *expected.shape[2:])


def test_shards_come_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = numbers(9, 3, 4)
    for name, rows in (("002", slice(6, 9)), ("000", slice(0, 1)), ("001", slice(1, 6))):
        write(tmp_path / f"burgers1d_train_{name}.h5", data=whole[rows])
    got = ups.read(tmp_path, "burgers1d", "train")
    assert got.counts == (1, 5, 3) and got.shape == (9, 3, 1, 1, 4)
    for start in range(9):
        for stop in range(start + 1, 10):
            np.testing.assert_array_equal(got.read(start, stop)[:, :, 0, 0], whole[start:stop])
    trajectory, frame = np.array([8, 0, 3, 5, 6, 1]), np.array([0, 1, 2, 0, 1, 2])
    assert torch.equal(got[trajectory, frame][:, 0, 0], torch.from_numpy(whole[trajectory, frame]))
    monkeypatch.setattr(fields_module, "CHUNK", 2 * 4 * 12)  # two trajectories at a time
    pieces = list(got.chunks())
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(pieces)[:, :, 0, 0], whole)
    write(tmp_path / "burgers1d_train_003.h5", data=numbers(2, 3, 5))
    assert "_003.h5: trajectories of (3, 1, 1, 5), but (3, 1, 1, 4)" in refusal(
        ups.read, tmp_path, "burgers1d", "train"
    )


def test_a_missing_split_is_never_another_one(tmp_path: Path) -> None:
    write(tmp_path / "burgers1d_train.h5", data=numbers(4, 3, 8))
    assert len(ups.read(tmp_path, "burgers1d", "train")) == 4
    message = refusal(ups.read, tmp_path, "burgers1d", "val")
    assert f"burgers1d has no val split: expected {tmp_path}/burgers1d_val.h5 or shards" in message
    assert ups.missing(tmp_path, "burgers1d", "val") == [message] and not ups.missing(tmp_path, "burgers1d", "train")
    assert "'valid' is none of train, val, test" in refusal(ups.read, tmp_path, "burgers1d", "valid")


def test_whole_file_and_shards_together(tmp_path: Path) -> None:
    for name in ("burgers1d_train.h5", "burgers1d_train_000.h5"):
        write(tmp_path / name, data=numbers(4, 3, 8))
    assert "keep one of them" in refusal(ups.read, tmp_path, "burgers1d", "train")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("darcy2d_mesh", "on a mesh"),
        ("particles_advect", "on particles"),
        ("cfd3d", "three dimensions"),
        ("compressible_ns3d", "three dimensions"),
        ("burgers", "'burgers' is none of the tasks: burgers1d"),
    ],
)
def test_names_that_are_no_grid(tmp_path: Path, task: str, says: str) -> None:
    assert says in refusal(ups.read, tmp_path, task, "train")


def test_eighteen_names() -> None:
    assert len(set(ups.TASKS)) + len(ups._REFUSED) == 18


@pytest.mark.parametrize(
    ("task", "data", "says"),
    [
        ("burgers1d", numbers(4, 8), "as (N, T, X) or (N, T, X, C), C at most 8, found (4, 8)"),
        ("burgers1d", numbers(2, 3, 4, 9), "found (2, 3, 4, 9)"),
        ("burgers1d", numbers(2, 0, 4), "found (2, 0, 4)"),
        ("burgers1d", numbers(2, 3, 4).astype(np.float64), "as float32, found float64"),
        ("navier_stokes2d", numbers(2, 3, 4, 4), "as (N, T, H, W, C)"),
        ("darcy2d", numbers(2, 8, 8, 1), "as (N, T, H, W, C)"),  # what the original's converter wrote
        ("darcy2d", numbers(2, 5, 8, 8, 1), "expected 2 frames, the given field and the solution, found 5"),
    ],
)
def test_wrong_files(tmp_path: Path, task: str, data: np.ndarray, says: str) -> None:
    path = write(tmp_path / f"{task}_train.h5", data=data)
    message = refusal(ups.read, tmp_path, task, "train")
    assert message.startswith(f"{path}: expected ") and says in message


def test_no_dataset_and_no_hdf5(tmp_path: Path) -> None:
    write(tmp_path / "burgers1d_train.h5", tensor=numbers(4, 3, 8))
    assert "expected a dataset 'data', found 'tensor' (4, 3, 8)" in refusal(ups.read, tmp_path, "burgers1d", "train")
    (tmp_path / "burgers1d_val.h5").write_text("no HDF5")
    assert "not a readable HDF5 file" in refusal(ups.read, tmp_path, "burgers1d", "val")
    write(tmp_path / "burgers1d_test.h5", data=numbers(4, 3, 8), x_coordinate=np.zeros(7))
    assert "'x-coordinate' (7,) does not fit 8 points" in refusal(ups.read, tmp_path, "burgers1d", "test")


def test_coordinates_that_the_file_has(tmp_path: Path) -> None:
    axes = {"x_coordinate": np.arange(5.0), "y_coordinate": np.arange(4.0) / 2, "t_coordinate": np.arange(4.0) / 4}
    write(tmp_path / "cfd2d_rand_train.h5", data=numbers(2, 3, 4, 5, 4), **axes)
    got = ups.read(tmp_path, "cfd2d_rand", "train")
    np.testing.assert_array_equal(got.x, np.arange(5))
    np.testing.assert_array_equal(got.y, np.arange(4) / 2)
    np.testing.assert_array_equal(got.t, np.arange(3) / 4)  # one longer in the file


@settings(max_examples=30, deadline=None)
@given(layout=st.permutations("NTCHW"), lengths=st.tuples(*[st.integers(1, 4)] * 5), kept=st.integers(1, 5))
def test_arranged_is_a_transpose(layout: list[str], lengths: tuple[int, ...], kept: int) -> None:
    axes, shape = "".join(layout[:kept]), lengths[:kept]
    values = np.arange(np.prod(shape)).reshape(shape)
    got = arranged(values, axes)
    assert got.shape == arranged_shape(shape, axes)
    place = tuple(n - 1 for n in shape)
    there = tuple(place[axes.index(axis)] if axis in axes else 0 for axis in "NTCHW")
    assert got[there] == values[place]


# ---- PDEBench ---------------------------------------------------------------------------------------------------


def test_pdebench_planes(tmp_path: Path) -> None:
    axes = {"x_coordinate": np.arange(5.0), "y_coordinate": np.arange(4.0), "t_coordinate": np.arange(4.0)}
    density, pressure, both = numbers(2, 3, 4, 5), numbers(2, 3, 4, 5, seed=1), numbers(2, 3, 4, 5, 2)
    path = write(tmp_path / "a.hdf5", {"M": 0.1}, density=density, pressure=pressure, both=both, **axes)
    got = pdebench.fields(path, ("pressure", "density"))
    np.testing.assert_array_equal(got.read(), np.stack((pressure, density), 2))
    assert torch.equal(got[np.array([1]), np.array([2])][0, 0], torch.from_numpy(pressure[1, 2]))
    np.testing.assert_array_equal(pdebench.fields(path, "both").read(), np.moveaxis(both, 4, 2))
    assert got.t is not None and len(got.t) == 3 and got.attributes == {"M": 0.1}
    assert "expected a dataset 'tensor', found " in refusal(pdebench.fields, path)


def test_pdebench_lines(tmp_path: Path) -> None:
    tensor = numbers(4, 3, 8).astype(np.float64)
    path = write(tmp_path / "a.hdf5", tensor=tensor, x_coordinate=np.arange(8.0), t_coordinate=np.arange(4.0))
    got = pdebench.fields(path)
    np.testing.assert_array_equal(got.read()[:, :, 0, 0], tensor.astype(np.float32))
    np.testing.assert_array_equal(got.t, np.arange(3.0))
    assert got.read().dtype == np.float32


@pytest.mark.parametrize("shape", [(4, 5, 6, 2), (4, 6, 1)])
def test_pdebench_groups(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As its diffusion-reaction, shallow water and diffusion-sorption sets are."""
    data = numbers(3, *shape)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i in (2, 0, 1):
            file[f"{i:04d}/data"], file[f"{i:04d}/grid/t"] = data[i], np.arange(4.0) / 2
            file[f"{i:04d}/grid/x"] = np.arange(6.0)
    got = pdebench.fields(tmp_path / "a.h5", "*/data")
    expected = np.moveaxis(data, -1, 2) if len(shape) == 4 else np.moveaxis(data, -1, 2)[:, :, :, None]
    np.testing.assert_array_equal(got.read(), expected)
    np.testing.assert_array_equal(got.read(1, 2), expected[1:2])
    assert torch.equal(got[np.array([2]), np.array([3])][0], torch.from_numpy(expected[2, 3].copy()))
    np.testing.assert_array_equal(got.t, np.arange(4) / 2)
    np.testing.assert_array_equal(got.x, np.arange(6))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["0003/data"] = np.zeros((2, *shape[1:]), np.float32)
    assert "'0003/data' (2, " in refusal(pdebench.fields, tmp_path / "a.h5", "*/data")
    assert "expected a dataset '*/u', found '0000/data'" in refusal(pdebench.fields, tmp_path / "a.h5", "*/u")


def test_pdebench_darcy(tmp_path: Path) -> None:
    nu, tensor = numbers(3, 4, 5), numbers(3, 1, 4, 5, seed=1)
    axes = {"x_coordinate": np.arange(5.0), "y_coordinate": np.arange(4.0)}
    path = write(tmp_path / "a.hdf5", {"beta": 1.0}, nu=nu, tensor=tensor, **axes)
    got = pdebench.fields(path, "tensor", given="nu")
    assert got.steady and got.shape == (3, 2, 1, 4, 5) and got.t is None
    np.testing.assert_array_equal(got.read(), np.stack((nu, tensor[:, 0]), 1)[:, :, None])
    assert torch.equal(got[np.array([2, 0]), np.array([1, 0])][:, 0], torch.from_numpy(np.stack((tensor[2, 0], nu[0]))))
    assert "one solution beside what is given (nu)" in refusal(pdebench.fields, path, "nu", given="nu")
    write(path, nu=nu, tensor=numbers(3, 2, 4, 5))
    assert "(N, H, W) or (N, 1, H, W), found (3, 2, 4, 5)" in refusal(pdebench.fields, path, "tensor", given="nu")
    write(path, nu=nu[:2], tensor=tensor)
    assert "does not fit" in refusal(pdebench.fields, path, "tensor", given="nu")
    write(path, nu=nu.astype(np.int32), tensor=tensor)
    assert "'nu' as floating point, found int32" in refusal(pdebench.fields, path, "tensor", given="nu")


# ---- real files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "split", "shape"),
    [
        ("burgers1d", "train", (700, 17, 1, 1, 16)),
        ("burgers1d", "test", (200, 17, 1, 1, 16)),
        ("advection1d", "val", (100, 2, 1, 1, 100)),
    ],
)
def test_real_ups_files(test_data: Path, task: str, split: str, shape: tuple[int, ...]) -> None:
    got = ups.read(test_data / "data/pde/ups_layout", task, split)
    assert got.shape == shape
    with h5py.File(test_data / f"data/pde/ups_layout/{task}_{split}.h5") as file:
        np.testing.assert_array_equal(got.read()[:, :, 0, 0], file["data"][..., 0])


def test_real_burgers_persistence(test_data: Path) -> None:
    u = ups.read(test_data / "data/pde/ups_layout", "burgers1d", "test").tensor().double()
    assert ((u[:, 1:] - u[:, :-1]).square().mean() / u[:, 1:].square().mean()).sqrt().item() == pytest.approx(
        0.059, abs=1e-3
    )


def test_real_darcy(test_data: Path) -> None:
    got = pdebench.fields(test_data / "data/pde/pdebench_layout/2D_DarcyFlow_n16_test.hdf5", "tensor", given="nu")
    fields = got.read()
    assert fields.shape == (50, 2, 1, 16, 16)
    assert set(np.unique(fields[:, 0])) == {0, 1}  # the permeability's two values; the solution is smooth
    assert len(np.unique(fields[:, 1])) > 1000
