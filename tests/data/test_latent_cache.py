from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from data import latent_cache, ups
from data import normalise as normalise_module
from data.fields import Fields
from data.latent_cache import Latents, ensure
from data.normalise import Normaliser
from data.pairs import Pairs
from fabric_trainer.errors import InputError
from models.physics.encoder import GridEncoder


def source(folder: Path, task: str = "burgers1d", shape: tuple[int, ...] = (5, 6, 16, 1)) -> Fields:
    with h5py.File(folder / f"{task}_train.h5", "w") as file:
        file["data"] = np.random.default_rng(0).normal(2, 3, shape).astype(np.float32)
    return ups.read(folder, task, "train")


SIZES = {"tokens": 4, "dim": 3, "seed": 1}


class Made:
    """One call's arguments, and what was said."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.said: list[str] = []
        self.sizes = SIZES | {k: v for k, v in changes.items() if k in SIZES}
        self.fields = changes.get("fields") or source(folder)
        self.normaliser = normalise_module.fit(self.fields)
        self.encoder = GridEncoder(**self.sizes)
        self.arguments = [folder / "cache", self.fields, self.normaliser, self.encoder, self.sizes]

    def __call__(self, **keywords: object) -> Latents:
        return ensure(*self.arguments, say=self.said.append, **keywords)

    def direct(self) -> torch.Tensor:
        u = self.normaliser(self.fields.tensor())
        return self.encoder(u.flatten(0, 1)).unflatten(0, u.shape[:2])


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").iterdir())


def test_latents_are_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.fields.CHUNK", 2 * 6 * 16 * 4)  # two trajectories at a time
    made = Made(tmp_path)
    latents = made()
    assert latents.shape == (5, 6, 4, 3) and made.said == []
    torch.testing.assert_close(latents[:], made.direct(), rtol=0, atol=1e-6)
    with h5py.File(latents.path) as file:  # any reader's
        np.testing.assert_array_equal(file["latents"][:], latents[:].numpy())
        assert '"dim": 3' in file.attrs["configuration"]
    assert [path.name for path in files(tmp_path)] == [latents.path.name]  # nothing is left beside


def test_a_second_call_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other ranks' do."""
    made = Made(tmp_path)
    first = made()[:]
    monkeypatch.setattr(latent_cache, "_write", lambda *_: pytest.fail("written again"))
    assert torch.equal(made()[:], first)


def test_every_part_of_the_key(tmp_path: Path) -> None:
    made = Made(tmp_path)
    names = [made().path.name]
    names.append(made(dtype="float16").path.name)
    for change in ({"seed": 2}, {"dim": 5}, {"tokens": 8}):
        names.append(Made(tmp_path, fields=made.fields, **change)().path.name)
    made.arguments[4] = {**SIZES, "patch": 1}  # configuration alone
    names.append(made().path.name)
    made.arguments[2] = Normaliser(torch.zeros(1, 1), torch.ones(1, 1))
    names.append(made().path.name)
    os.utime(made.fields.paths[0], ns=(1, 1))  # the source was touched
    names.append(made().path.name)
    assert len(set(names)) == len(names) == 8
    assert "is of another encoder, configuration or source; making burgers1d_train-" in made.said[-1]


@pytest.mark.parametrize("where", ["content", "cut", "stale"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, where: str) -> None:
    made = Made(tmp_path)
    path, right = made().path, made()[:]
    if where == "content":
        with h5py.File(path, "r+") as file:
            file["latents"][2, 3, 1, 1] += 1
    elif where == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        os.replace(Made(tmp_path, fields=made.fields, seed=2)().path, path)
    says = {"content": "does not match its checksum", "cut": "can't be read", "stale": "stale: made by another encoder"}
    again = made()
    assert torch.equal(again[:], right) and len(made.said) == 1
    assert made.said[0].startswith(f"{path}: ") and says[where] in made.said[0] and "making it anew" in made.said[0]


def test_half_precision(tmp_path: Path) -> None:
    made = Made(tmp_path)
    latents = made(dtype="float16")
    assert latents.mapped.dtype == np.float16 and latents[0, 0].dtype == torch.float32
    torch.testing.assert_close(latents[:], made.direct(), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="'bfloat16' is none of float32, float16"):
        made(dtype="bfloat16")
    made.encoder.project.weight.mul_(1e6)
    with pytest.raises(InputError, match="burgers1d_train: its latents are not finite as float16"):
        made(dtype="float16")
    assert len(files(tmp_path)) == 1  # nothing half written


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"latent_cache_dir: can't write to .*cache .*exists"):
        made()
    (tmp_path / "cache").unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"latent_cache_dir: can't write to .*cache; data may be read-only"):
        made()


def test_pairs_of_latents_and_fields_in_another_process(tmp_path: Path) -> None:
    made = Made(tmp_path)
    latents = made()
    latents[0]  # mapped
    sent = pickle.dumps(latents)
    assert len(sent) < 1000
    states = {"z": pickle.loads(sent), "u": made.fields}
    batch = Pairs(states, time_stride=2).__getitems__([5, 0])
    assert torch.equal(batch["z1"], latents[:][[2, 0], [4, 2]])
    torch.testing.assert_close(batch["z1"], made.encoder(made.normaliser(batch["u1"])), rtol=0, atol=1e-6)


def test_a_steady_task(tmp_path: Path) -> None:
    made = Made(tmp_path, fields=source(tmp_path, "darcy2d", (3, 2, 4, 4, 1)))
    latents = made()
    batch = Pairs({"z": latents, "u": made.fields}, steady=True).__getitems__([2, 1])
    for name, frame in (("0", 0), ("1", 1)):
        expected = made.encoder(made.normaliser(batch["u" + name], frame))
        torch.testing.assert_close(batch["z" + name], expected, rtol=0, atol=1e-6)
