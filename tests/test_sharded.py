"""Sharded checkpoints on one process: listed, verified, rotated, made one file; and nothing foreign is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from test_checkpoint import equal, tree

from fabric_trainer import sharded
from fabric_trainer.checkpoint import Checkpoints, is_checkpoint, linked, load, newest, read_index
from fabric_trainer.config import CheckpointConfig
from fabric_trainer.errors import FAILED, FINISHED, INPUT, CheckpointError, InputError
from fabric_trainer.portable import Fragment, fill
from fabric_trainer.sharded import SHARDS, Shards, whole
from fabric_trainer.sharded_save import save_shards
from tools import consolidate


def save(checkpoints: Checkpoints, step: int, keep: bool = False, **metrics: float) -> Path:
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return save_shards(checkpoints, tree(step), {"window": step, "step": step}, named, keep)


def restored(path: Path) -> dict:
    saved = load(path)
    made = whole(saved, saved)
    del made[SHARDS]
    return made


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the sharded checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (1, 2):
        save(checkpoints, step)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def test_what_is_saved_is_what_is_loaded(two):
    for step in (1, 2):
        assert equal(restored(two / f"step-{step:08d}"), tree(step))
    assert os.readlink(two / "last") == "step-00000002" and linked(two, "last") == two / "last"
    assert equal(restored(two / "last"), tree(2))
    assert newest(two, pytest.fail).name == "step-00000002"
    assert not list(two.glob(".*"))


def test_the_tensors_are_not_read_before_they_have_a_place(two):
    saved = load(two / "last")
    assert saved["model"]["weight"].is_meta and saved["model"]["weight"].shape == (50, 20)
    assert saved["config"] == tree(2)["config"] and saved["optimizer"]["groups"] == [{"lr": 0.1}]
    place = torch.zeros(50, 20, dtype=torch.float64)
    fill([(place, saved["model"]["weight"])], Shards(saved))
    assert torch.equal(place, tree(2)["model"]["weight"].double())


def test_the_index_has_the_hash_and_size_of_all_files(two):
    folder = two / "step-00000002"
    assert {path.name for path in files(folder)} == {".metadata", "__0_0.distcp", "plain.pt"}
    lines = sorted(f"{path.name} {sha256(path.read_bytes()).hexdigest()}" for path in files(folder))
    entry = read_index(two)["step-00000002"]
    assert entry["sha256"] == sha256("\n".join(lines).encode()).hexdigest()
    assert entry["bytes"] == sum(path.stat().st_size for path in files(folder))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "plain.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_to_any_file_is_named_and_the_one_before_is_used(two, name, damage, capsys):
    path = two / "step-00000002" / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[random.Random(name).randrange(len(data))] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    told: list[str] = []
    assert newest(two, told.append).name == "step-00000001"
    assert len(told) == 1 and "step-00000002" in told[0] and "damaged" in told[0]
    gone = damage == "delete" and name == "plain.pt"
    with pytest.raises(InputError if gone else CheckpointError, match="no checkpoint" if gone else "damaged"):
        load(path.parent)
    assert consolidate.main([str(path.parent)]) == (INPUT if gone else FAILED)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not (two / "step-00000002.pt").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "plain.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_damage_where_no_index_knows_the_folder_is_one_line(two, tmp_path_factory, name, share):
    folder = shutil.copytree(two / "step-00000002", tmp_path_factory.mktemp("elsewhere") / "a")
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError) as caught:
        restored(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "plain.pt"])
def test_a_pickle_that_would_run_code_is_refused(two, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder, trap = shutil.copytree(two / "step-00000002", elsewhere / "a"), elsewhere / "trap"
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    else:
        torch.save({"model": Trap(trap)}, folder / name)
    with pytest.raises(CheckpointError, match="refused"):
        restored(folder)
    assert not trap.exists()


def test_rotation_keeps_the_newest_the_best_and_the_marked(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, top_k=2, monitor="val/loss"))
    for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, 9.0, 8.0, float("nan")], start=1):
        save(checkpoints, step, keep=step == 3, val_loss=loss)
    found = {path.name for path in tmp_path.glob("step-*")}
    assert found == {f"step-{step:08d}" for step in (2, 3, 4, 6, 7)} == set(read_index(tmp_path))
    assert os.readlink(tmp_path / "best") == "step-00000002"
    assert os.readlink(tmp_path / "last") == "step-00000007"
    assert not list(tmp_path.glob(".*"))


def test_files_and_folders_live_in_one_run(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    checkpoints.save(tree(1), {"window": 1, "step": 1}, {}, False)
    checkpoints.wait()
    save(checkpoints, 2)
    assert linked(tmp_path, "last") == tmp_path / "last" and not (tmp_path / "last.pt").exists()
    checkpoints.save(tree(3), {"window": 3, "step": 3}, {}, False)
    checkpoints.wait()
    assert set(read_index(tmp_path)) == {"step-00000002", "step-00000003.pt"}
    assert linked(tmp_path, "last") == tmp_path / "last.pt" and not (tmp_path / "last").exists()
    assert equal(whole(saved := load(tmp_path / "last.pt"), saved), tree(3))


def test_a_step_that_is_saved_again_replaces_its_folder(two):
    checkpoints = Checkpoints(two, CheckpointConfig())
    checkpoints.forget_after(1)
    save_shards(checkpoints, tree(9), {"window": 2, "step": 2}, {}, False)
    assert equal(restored(two / "step-00000002"), tree(9))


def test_half_a_folder_of_a_killed_save_is_cleared_away(two):
    shutil.copytree(two / "step-00000002", two / ".step-00000003.tmp")
    assert newest(two, pytest.fail).name == "step-00000002"
    Checkpoints(two, CheckpointConfig())
    assert {path.name for path in two.iterdir()} == {"index.json", "last", "step-00000001", "step-00000002"}


@pytest.mark.parametrize("where", ["tensors", "plain", "index"])
def test_a_full_disk_leaves_the_previous_one(two, monkeypatch, where):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    else:
        module = "sharded" if where == "plain" else "checkpoint"
        monkeypatch.setattr(f"fabric_trainer.{module}.write_atomically", full)
    checkpoints = Checkpoints(two, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000003: No space left") as caught:
        save(checkpoints, 3)
    assert "\n" not in str(caught.value)
    assert {path.name for path in two.iterdir()} == {"index.json", "last", "step-00000001", "step-00000002"}
    assert newest(two, pytest.fail).name == "step-00000002"
    assert equal(restored(two / "last"), tree(2))


def test_what_lies_in_slices_has_to_be_made_one_file_first(two):
    saved = load(two / "last")
    slice_ = Fragment(torch.Size((50, 20)), torch.zeros(10), 0)
    with pytest.raises(InputError, match=r"is in shards, .*python -m tools\.consolidate .*step-00000002"):
        fill([(slice_, saved["model"]["weight"])], Shards(saved))
    with pytest.raises(InputError, match=r"tools\.consolidate"):
        Shards(saved)(saved["model"]["weight"])


# ---- consolidate ----------------------------------------------------------------------------------------------------


def test_consolidate_writes_the_plain_file(two, tmp_path_factory, capsys):
    assert consolidate.main([str(two / "last")]) == FINISHED
    assert capsys.readouterr().out == f"{two / 'step-00000002.pt'}\n"
    out = tmp_path_factory.mktemp("elsewhere") / "one.pt"
    assert consolidate.main([str(two / "step-00000001"), "-o", str(out)]) == FINISHED
    for path, step in ((two / "step-00000002.pt", 2), (out, 1)):
        assert equal(torch.load(path, weights_only=True), tree(step))
        assert list(torch.load(path, weights_only=True)) == list(tree(step))
    assert newest(two, pytest.fail).name == "step-00000002", "the copy is not the run's"


def test_consolidate_says_what_is_wrong(two, capsys):
    torch.save(tree(1), two / "plain.pt")
    (two / "taken.pt").touch()
    cases = {
        (str(two / "nothing"),): "there is no checkpoint",
        (str(two / "plain.pt"),): "is one plain file already",
        (str(two / "last"), "-o", str(two / "taken.pt")): "taken.pt exists",
        (str(two / "last"), "-o", str(two / "nowhere/a.pt")): "No such file or directory",
    }
    for arguments, message in cases.items():
        assert consolidate.main(arguments) in (INPUT, FAILED)
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert (two / "taken.pt").stat().st_size == 0


def test_plain_values_stay_plain(two):
    plain = torch.load(two / "step-00000002" / "plain.pt", weights_only=True)
    assert not list(sharded.named_tensors(plain))
    assert plain["model"]["weight"] == {sharded.SHAPE: [50, 20], sharded.DTYPE: "float32"}
    assert json.dumps(plain["config"]) and is_checkpoint(two / "step-00000002") and not is_checkpoint(two)
