"""What holds for every generated set; the file's own faults are in test_burgers.py."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY

from data.advection import Advection
from data.burgers import Burgers
from data.darcy import Darcy
from data.generated import check, ensure
from data.pdebench import fields
from data.reaction_diffusion import ReactionDiffusion

SMALL = {
    "burgers": Burgers(nx=16, samples=3, frames=4),
    "advection": Advection(nx=16, samples=3, frames=4),
    "reaction_diffusion": ReactionDiffusion(nx=8, samples=3, frames=4),
    "darcy": Darcy(nx=8, samples=3),
}
every_set = pytest.mark.parametrize("generated", SMALL.values(), ids=SMALL)


def test_coordinates() -> None:
    """Centres of cells; in one dimension PDEBench's times are one longer than the frames."""
    line, square = (np.arange(16) + 0.5) / 16, (np.arange(8) + 0.5) / 8
    expected = {
        "burgers": {"x-coordinate": line, "t-coordinate": np.arange(5) * 0.01},
        "advection": {"x-coordinate": line, "t-coordinate": np.arange(5) * 0.01},
        "reaction_diffusion": {
            "x-coordinate": 2 * square - 1,
            "y-coordinate": 2 * square - 1,
            "t-coordinate": np.arange(4) * 0.05,
        },
        "darcy": {"x-coordinate": square, "y-coordinate": square},
    }
    for name, generated in SMALL.items():
        assert generated.coordinates.keys() == expected[name].keys()
        for coordinate, values in expected[name].items():
            np.testing.assert_allclose(generated.coordinates[coordinate], values, atol=1e-15)


@every_set
def test_file_holds_what_it_says(tmp_path: Path, generated) -> None:
    with h5py.File(ensure(tmp_path, generated)) as file:
        assert {n: file[n].shape for n in generated.shapes} == dict(generated.shapes)
        assert set(file) == {*generated.shapes, *generated.coordinates}
        assert all(file[name].dtype == np.float32 for name in file)
        assert set(file.attrs) == {*generated.attributes, "sha256"}
        for name, values in generated.coordinates.items():
            np.testing.assert_array_equal(file[name], values.astype(np.float32))
    assert [p.name for p in tmp_path.iterdir()] == [generated.file_name]


@every_set
def test_same_parameters_same_bytes_in_another_process(tmp_path: Path, generated) -> None:
    ours = ensure(tmp_path / "ours", generated)
    code = f"from pathlib import Path\nfrom data.generated import ensure\nfrom {type(generated).__module__} import *\n"
    code += f"print(ensure(Path({str(tmp_path / 'theirs')!r}), {generated!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == ours.read_bytes()


@every_set
def test_samples_do_not_depend_on_company_but_on_seed(generated) -> None:
    datasets = generated.datasets()
    more = dataclasses.replace(generated, samples=5).datasets()
    other = dataclasses.replace(generated, seed=1).datasets()
    for name, values in datasets.items():
        np.testing.assert_array_equal(more[name][:3], values)
        assert np.abs(other[name][:, None] - values[None]).reshape(9, -1).max(1).min() > 0.01
        assert np.abs(values[0] - values[1]).max() > 0.01


@every_set
def test_every_parameter_is_in_the_name(generated) -> None:
    for field in dataclasses.fields(generated):
        value = getattr(generated, field.name)
        if field.name == "low":
            changed = 2 * value
        else:
            changed = value + 1 if isinstance(value, int) else 1.5 * value
        other = dataclasses.replace(generated, **{field.name: changed})
        assert other.file_name != generated.file_name
        assert field.name not in generated.attributes or other.attributes != generated.attributes


@every_set
def test_damage_is_named_and_mended(tmp_path: Path, generated) -> None:
    path = ensure(tmp_path, generated)
    good = path.read_bytes()
    for name in (*generated.shapes, *generated.coordinates):
        with h5py.File(path, "a") as file:
            values = file[name][:]
            values.flat[-1] += 1e-3
            file[name][:] = values
        word = "checksum" if name in generated.shapes else name
        assert word in (check(path, generated) or "")
        said: list[str] = []
        assert ensure(tmp_path, generated, said.append).read_bytes() == good
        assert len(said) == 1 and word in said[0]


@every_set
def test_the_reader_of_pdebench_takes_it(tmp_path: Path, generated) -> None:
    made, given = generated.datasets(), "nu" if "nu" in generated.shapes else None
    read = fields(ensure(tmp_path, generated), given=given)
    if given:
        expected = np.stack((made["nu"], made["tensor"][:, 0]), 1)[:, :, None]
    elif made["tensor"].ndim == 3:
        expected = made["tensor"][:, :, None, None]
    else:
        expected = np.moveaxis(made["tensor"], -1, 2)
    np.testing.assert_array_equal(read.read(), expected)
    np.testing.assert_array_equal(read.x, generated.coordinates["x-coordinate"].astype(np.float32))


def test_a_set_that_breaks_its_physics_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated, broken = SMALL["darcy"], SMALL["darcy"].datasets()
    broken["tensor"][1, 0, 2, 3] *= 1.001
    monkeypatch.setattr(Darcy, "datasets", lambda self: broken)
    with pytest.raises(RuntimeError, match=r"Darcy\(.*balance"):
        ensure(tmp_path, generated)
    assert not list(tmp_path.iterdir())


def test_tool_makes_each(tmp_path: Path) -> None:
    from tools.make_data import SETS

    assert {name: type(generated) for name, generated in SMALL.items()} == SETS
    command = [sys.executable, "-m", "tools.make_data", "darcy", str(tmp_path), "--nx", "8", "--samples", "3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and check(Path(done.stdout.strip()), SMALL["darcy"]) is None
    wrong = subprocess.run([*command, "--low", "-1"], cwd=REPOSITORY, capture_output=True, text=True)
    assert wrong.returncode == 2 and "0 < low <= high" in wrong.stderr
