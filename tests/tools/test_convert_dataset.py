from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from data import pdebench, ups
from data.darcy import Darcy
from data.generated import ensure
from data.reaction_diffusion import ReactionDiffusion
from fabric_trainer.errors import InputError
from tools.convert_dataset import convert, main, shared_out


def write(path: Path, attributes: dict[str, object] | None = None, **datasets: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name.replace("_", "-")] = values
        file.attrs.update(attributes or {})
    return path


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def line(path: Path, n: int = 30, seed: int = 0, **attributes: object) -> np.ndarray:
    tensor = numbers(n, 5, 8, seed=seed)
    write(path, attributes, tensor=tensor, x_coordinate=np.arange(8.0), t_coordinate=np.arange(6.0))
    return tensor


def test_every_trajectory_is_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.fields.CHUNK", 7 * 5 * 8 * 4)  # seven trajectories at a time
    tensor = line(tmp_path / "a.hdf5", Nu=0.01, sha256="of the source")
    made = convert([tmp_path / "a.hdf5"], "burgers1d", tmp_path / "out", ["tensor"], seed=3)
    seen = []
    for split, count in (("train", 24), ("val", 3), ("test", 3)):
        got = ups.read(tmp_path / "out", "burgers1d", split)
        with h5py.File(made[split]) as file:
            rows = file["trajectory"][:]
            assert file["data"].shape == (count, 5, 8, 1) and file["data"].dtype == np.float32
        np.testing.assert_array_equal(got.read()[:, :, 0, 0], tensor[rows])
        np.testing.assert_array_equal(rows, np.flatnonzero(shared_out(30, 3) == split))
        assert (
            got.attributes["Nu"] == 0.01 and "sha256" not in got.attributes and got.attributes["from_files"] == "a.hdf5"
        )
        assert got.attributes["from_dataset"] == "tensor" and got.attributes["split_seed"] == 3
        np.testing.assert_array_equal(got.x, np.arange(8))
        np.testing.assert_array_equal(got.t, np.arange(5))
        seen += rows.tolist()
    assert sorted(seen) == list(range(30))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "burgers1d_test.h5",
        "burgers1d_train.h5",
        "burgers1d_val.h5",
    ]


@pytest.mark.parametrize(
    ("n", "counts"), [(10000, (8000, 1000, 1000)), (10, (8, 1, 1)), (3, (1, 1, 1)), (99, (81, 9, 9))]
)
def test_shares(n: int, counts: tuple[int, ...]) -> None:
    assert tuple((shared_out(n, 0) == split).sum() for split in ups.SPLITS) == counts
    assert (shared_out(n, 0) == shared_out(n, 0)).all()
    assert n < 10 or (shared_out(n, 0) != shared_out(n, 1)).any()


def test_files_of_other_viscosity_are_mixed(tmp_path: Path) -> None:
    tensors = [line(tmp_path / f"{i}.hdf5", seed=i, Nu=nu, made_by="x") for i, nu in enumerate((0.01, 0.1))]
    made = convert([tmp_path / "0.hdf5", tmp_path / "1.hdf5"], "burgers1d", tmp_path / "out")
    for split in ups.SPLITS:
        with h5py.File(made[split]) as file:
            rows = file["trajectory"][:]
            np.testing.assert_array_equal(file["Nu"][:], np.where(rows < 30, 0.01, 0.1))
            np.testing.assert_array_equal(file["data"][..., 0], np.concatenate(tensors)[rows])
            assert "Nu" not in file.attrs and file.attrs["made_by"] == "x"
    assert (np.array(shared_out(60, 0)).reshape(2, 30) == "train").sum(1).min() > 15  # of both files


def test_darcy_is_permeability_to_solution(tmp_path: Path) -> None:
    nu, tensor = numbers(20, 4, 6), numbers(20, 1, 4, 6, seed=1)
    path = write(tmp_path / "a.hdf5", {"beta": 1.0}, nu=nu, tensor=tensor)
    for given in ([], ["tensor"]):
        convert([path], "darcy2d", tmp_path / "out", given, overwrite=bool(given))
        got = ups.read(tmp_path / "out", "darcy2d", "train")
        rows = np.flatnonzero(shared_out(20, 0) == "train")
        assert got.shape == (16, 2, 1, 4, 6) and got.attributes["beta"] == 1
        np.testing.assert_array_equal(got.read()[:, 0, 0], nu[rows])
        np.testing.assert_array_equal(got.read()[:, 1], tensor[rows])
    with pytest.raises(InputError, match="one solution beside what is given"):
        convert([path], "darcy2d", tmp_path / "other", ["nu"])


def test_a_dataset_per_channel(tmp_path: Path) -> None:
    fields = {name: numbers(10, 3, 4, 6, seed=i) for i, name in enumerate(("density", "pressure"))}
    axes = {"x_coordinate": np.arange(6.0), "y_coordinate": np.arange(4.0), "t_coordinate": np.arange(4.0)}
    path = write(tmp_path / "a.hdf5", **fields, **axes)
    with pytest.raises(InputError, match=r"--dataset: density \(10, 3, 4, 6\), pressure \(10, 3, 4, 6\)"):
        convert([path], "cfd2d_rand", tmp_path / "out")
    convert([path], "cfd2d_rand", tmp_path / "out", ["pressure", "density"])
    got = ups.read(tmp_path / "out", "cfd2d_rand", "val")
    row = np.flatnonzero(shared_out(10, 0) == "val")
    np.testing.assert_array_equal(got.read(), np.stack((fields["pressure"][row], fields["density"][row]), 2))
    np.testing.assert_array_equal(got.y, np.arange(4))


def test_a_group_per_trajectory(tmp_path: Path) -> None:
    data = numbers(10, 3, 4, 6, 1)
    write(tmp_path / "a.h5", **{f"{i:04d}/data": data[i] for i in range(10)})
    convert([tmp_path / "a.h5"], "shallow_water2d", tmp_path / "out")
    rows = np.flatnonzero(shared_out(10, 0) == "train")
    got = ups.read(tmp_path / "out", "shallow_water2d", "train")
    np.testing.assert_array_equal(got.read(), np.moveaxis(data[rows], -1, 2))


def test_what_is_made_converts(tmp_path: Path) -> None:
    made = ensure(tmp_path, Darcy(nx=8, samples=10))
    convert([made], "darcy2d", tmp_path / "out", ["tensor"])
    got = ups.read(tmp_path / "out", "darcy2d", "train")
    rows = np.flatnonzero(shared_out(10, 0) == "train")
    np.testing.assert_array_equal(got.read(), pdebench.fields(made, given="nu").read()[rows])
    assert got.attributes["beta"] == 1 and "sha256" not in got.attributes
    made = ensure(tmp_path, ReactionDiffusion(nx=8, samples=10, frames=4))
    convert([made], "reaction_diffusion2d", tmp_path / "out", ["tensor"])
    got = ups.read(tmp_path / "out", "reaction_diffusion2d", "train")
    assert got.shape == (8, 4, 2, 8, 8) and got.t is not None and len(got.t) == 4


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line(tmp_path / "a.hdf5")
    several = write(tmp_path / "b.hdf5", tensor=numbers(9, 4, 4, 4), nu=numbers(9, 4, 4), flag=np.zeros((9, 3, 4), int))
    out = tmp_path / "out"

    def refused(*argv: object) -> str:
        assert main([*map(str, argv), "-o", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert not out.exists() or not list(out.glob(".*"))
        return error

    assert "--dataset: nu (9, 4, 4), tensor (9, 4, 4, 4)" in refused(several, "--task", "burgers1d")
    assert "--task: cfd3d is on a grid of three dimensions" in refused(several, "--task", "cfd3d")
    assert "expected a dataset 'u', found" in refused(several, "--task", "burgers1d", "--dataset", "u")
    assert "shallow_water2d is on a plane, not on (1, 8)" in refused(tmp_path / "a.hdf5", "--task", "shallow_water2d")
    assert "no such file" in refused(tmp_path / "c.hdf5", "--task", "burgers1d")
    line(tmp_path / "d.hdf5", n=2)
    assert "2 trajectories are too few" in refused(tmp_path / "d.hdf5", "--task", "burgers1d")
    assert main([str(tmp_path / "a.hdf5"), "--task", "burgers1d", "-o", str(out)]) == 0
    assert "burgers1d_train.h5: 24 trajectories" in capsys.readouterr().out
    before = (out / "burgers1d_train.h5").read_bytes()
    assert "exists: give --overwrite" in refused(tmp_path / "a.hdf5", "--task", "burgers1d")
    assert (out / "burgers1d_train.h5").read_bytes() == before


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line(tmp_path / "a.hdf5")
    made = convert([tmp_path / "a.hdf5"], "burgers1d", tmp_path / "out")
    before = {path: path.read_bytes() for path in made.values()}

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tools.convert_dataset.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        convert([tmp_path / "a.hdf5"], "burgers1d", tmp_path / "out", seed=1, overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_real_files(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "data/pde/pdebench_layout"
    darcy = folder / "2D_DarcyFlow_n16_train.hdf5"
    convert([darcy], "darcy2d", tmp_path, ["tensor"])
    rows = np.flatnonzero(shared_out(1000, 0) == "test")
    got, source = ups.read(tmp_path, "darcy2d", "test"), pdebench.fields(darcy, given="nu")
    np.testing.assert_array_equal(got.read(), source.read()[rows])
    assert set(np.unique(got.read()[:, 0])) == {0, 1}
    convert([folder / "1D_Burgers_Sols_Nu0.01_n16.hdf5"], "burgers1d", tmp_path, ["tensor"])
    assert ups.read(tmp_path, "burgers1d", "train").shape == (640, 17, 1, 1, 16)
    assert ups.read(tmp_path, "burgers1d", "val").attributes["Nu"] == 0.01
