"""What several ranks save in shards continues on any number of them, and is what one plain file would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from launches import results, run_worker
from systems import Masked, document
from test_every_strategy import assert_same_state
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from fabric_trainer import cli
from fabric_trainer.checkpoint import Checkpoints, load, newest, read_index
from fabric_trainer.sharded import SHARDS, whole
from tools import consolidate

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
HERE = Path(__file__).resolve().parent
SHARDED = {"sharded": True}
FIFTH = "run/checkpoints/step-00000005"


def restored(path: Path) -> dict[str, Any]:
    saved = load(path)
    return whole(saved, saved)


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    """Key by key, in the same order, every bit."""
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of two ranks of fsdp, in shards, and of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    run_worker(folder, "fsdp", {"train": {}, "both_ways": {}}, checkpoint=SHARDED)
    run_worker(folder, "single", {"train": {}})
    return folder


def one(folder: Path) -> dict[str, Any]:
    """The last checkpoint of the single process."""
    return load(folder / "single/run/checkpoints/last.pt")


def test_each_rank_writes_its_own(folder):
    path = folder / "fsdp" / FIFTH
    assert {file.name for file in path.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp", "plain.pt"}
    assert read_index(path.parent)[path.name]["bytes"] == sum(file.stat().st_size for file in path.iterdir())
    assert os.readlink(path.parent / "last") == "step-00000010"
    assert_same_state(one(folder), restored(path.parent / "last"), 1e-10)


def test_consolidated_it_is_the_plain_file(folder):
    shards = folder / "fsdp/both/step-00000010"
    assert shards.is_dir()
    assert consolidate.main([str(shards), "-o", str(folder / "one.pt")]) == 0
    plain, made = (torch.load(path, weights_only=True) for path in (shards.with_suffix(".pt"), folder / "one.pt"))
    assert_equal(plain, made)
    assert len(plain["optimizer"]["state"]) > 10 and plain["ema"] and SHARDS not in made


def continues(folder: Path, source: str, target: str, reference: dict[str, Any], **sections: Any) -> None:
    """The fifth update of source's, read by target: the same state, and the end that reference has."""
    path = folder / source / FIFTH
    name = f"{target} from {source}"
    run_worker(folder, target, {"resume": {"sources": {source: str(path)}}}, name=name, **sections)
    saved = restored(path)
    for rank in results(folder, name, "resume"):
        taken = rank[source]["taken"]
        for tree in ("model", "ema", "averages", "counters", "states"):
            assert_equal(saved[tree], taken[tree], tree)
        assert_equal(saved["optimizer"]["state"], taken["optimizer"]["state"], "optimizer")
    checkpoints = folder / name / f"from {source}/checkpoints"
    last = restored(checkpoints / ("last" if sections else "last.pt"))
    assert_same_state(reference, last, 1e-10)


LATER = [pytest.param(target, marks=pytest.mark.slow) for target in ("fsdp on 3", "ddp", "tensor_parallel")]


@pytest.mark.parametrize("target", ["single", *LATER])
def test_continues_under(folder, target):
    continues(folder, "fsdp", target, one(folder), **({"checkpoint": SHARDED} if "3" in target else {}))


@pytest.mark.slow
def test_two_dimensions_and_back(folder):
    continues(folder, "fsdp", "fsdp x tp", one(folder))
    run_worker(folder, "fsdp x tp", {"train": {}, "both_ways": {}}, checkpoint=SHARDED)
    shards = folder / "fsdp x tp/both/step-00000010"
    assert_equal(torch.load(shards.with_suffix(".pt"), weights_only=True), restored_plain(shards))
    for target in ("fsdp x tp", "single", "fsdp on 3", "tensor_parallel"):
        continues(folder, "fsdp x tp", target, one(folder))


def restored_plain(path: Path) -> dict[str, Any]:
    made = restored(path)
    del made[SHARDS]
    return made


@pytest.mark.slow
def test_deepspeed_says_that_it_has_to_be_one_file(folder):
    pytest.importorskip("deepspeed")
    sources = {"fsdp": str(folder / "fsdp" / FIFTH)}
    with pytest.raises(AssertionError, match=r"InputError: .* is in shards, .*python -m tools\.consolidate"):
        run_worker(folder, "deepspeed2", {"resume": {"sources": sources}})


# ---- by the command line --------------------------------------------------------------------------------------------


class Pictured(Masked):
    def predict(self, network: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"y": network(batch["x"])}

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Any]:
        Path("pictured").write_text(repr(network.embed.weight.sum().item()))
        return {}


class Killed:
    """A callback that kills all ranks in the fourth save: with half of the shards written, or before the rename."""

    def __init__(self, where: str) -> None:
        self.where, self.saves = where, 0
        self.write, self.rename = dcp.FileSystemWriter.write_data, Checkpoints.enter
        dcp.FileSystemWriter.write_data = lambda writer, *rest: self.in_shards(writer, *rest)
        if where == "rename":
            Checkpoints.enter = lambda own, *rest: self.before_rename(own, *rest)

    def in_shards(self, writer: dcp.FileSystemWriter, *rest: Any) -> Any:
        self.saves += 1
        if self.saves == 4 and self.where == "shards":
            (writer.path / f"__{torch.distributed.get_rank()}_0.distcp").write_bytes(b"half")
            os.killpg(0, signal.SIGKILL)
        return self.write(writer, *rest)

    def before_rename(self, own: Checkpoints, path: Path, entry: dict[str, Any]) -> None:
        if self.saves == 4:
            own.index[path.name] = entry
            own._write_index()
            os.killpg(0, signal.SIGKILL)
        self.rename(own, path, entry)


def killed_in_shards() -> Killed:
    return Killed("shards")


def killed_before_the_rename() -> Killed:
    return Killed("rename")


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE.parents[1] / "train.py"), "--config", "toy.yaml", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    return warm.run(command, cwd=folder, env=environment, timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with toy.yaml and its run a, of two ranks in shards."""
    folder = tmp_path_factory.mktemp("runs")
    task = {"path": "test_sharded_saves.Pictured"}
    (folder / "toy.yaml").write_text(yaml.safe_dump(document("fsdp", task=task, checkpoint=SHARDED)))
    done = start(folder, "--name", "a")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def one_process(runs, monkeypatch, capsys):
    """Calls the command line in this process, without a process group; returns what it printed."""
    monkeypatch.chdir(runs)

    def call(*arguments: str) -> str:
        single = ("--fabric.devices", "1", "--fabric.strategy", "single", "--checkpoint.sharded", "false")
        assert cli.main(["--config", "toy.yaml", *arguments, *single]) == 0
        return capsys.readouterr().out

    return call


def measured(said: str) -> dict[str, float]:
    lines = [line.split() for line in said.splitlines() if line.startswith("val")]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2}


@pytest.mark.slow
def test_the_pictures_are_of_the_best_weights(runs):
    best = restored(runs / "runs/a/checkpoints/best")["model"]["embed.weight"]
    assert float((runs / "pictured").read_text()) == pytest.approx(float(best.sum()), abs=1e-6)


@pytest.mark.parametrize("which", ["best", "last", "runs/a/checkpoints/step-00000004"])
def test_evaluate_and_predict(runs, one_process, which):
    checkpoints = runs / "runs/a/checkpoints"
    path = checkpoints / which if "/" not in which else runs / which
    step = load(path)["counters"]["step"]
    said = one_process("--name", "a", "--evaluate", which)
    metrics = read_index(checkpoints)[f"step-{step:08d}"]["metrics"]
    assert f"step {step}, split val" in said
    if metrics:
        assert measured(said) == pytest.approx(metrics, abs=1e-10)
    assert "23 predictions" in one_process("--name", "a", "--predict", which, "--out", f"{step}.npz")


@pytest.mark.slow
def test_evaluate_on_two_ranks(runs, one_process):
    done = start(runs, "--name", "a", "--evaluate", "last")
    assert done.returncode == 0, done.stderr
    assert measured(done.stdout) == pytest.approx(measured(one_process("--name", "a", "--evaluate", "last")), abs=1e-10)


@pytest.mark.slow
def test_init_from_takes_the_weights_alone(runs, one_process):
    source = "runs/a/checkpoints/last"
    said = one_process("--name", "b", "--init_from", source, "--optim.lr", "1e-30", "--optim.weight_decay", "0")
    assert f"weights from {source}" in said
    given, made = restored(runs / source)["model"], load(runs / "runs/b/checkpoints/last.pt")["model"]
    assert all(torch.allclose(given[name], made[name], rtol=0, atol=1e-12) for name in given)


@pytest.mark.parametrize(
    "where", ["killed_in_shards", pytest.param("killed_before_the_rename", marks=pytest.mark.slow)]
)
def test_all_ranks_killed_in_a_save(runs, one_process, where):
    """The one before is whole; from there another number of processes ends where nobody was killed."""
    done = start(runs, "--name", where, "--callbacks", f"[test_sharded_saves.{where}]")
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = runs / "runs" / where / "checkpoints"
    assert list(checkpoints.glob(".step-00000004.tmp/*.distcp")) and not (checkpoints / "step-00000004").exists()
    assert newest(checkpoints, lambda line: None).name == "step-00000003"
    said = one_process("--name", where, "--resume", "auto")
    assert "step-00000003" in said and not list(checkpoints.glob(".*"))
    assert_same_state(restored(runs / "runs/a/checkpoints/last"), load(checkpoints / "last.pt"), 1e-10)


@pytest.mark.slow
def test_resume_by_a_path(runs, one_process):
    one_process("--name", "c", "--resume", "runs/a/checkpoints/step-00000006")
    assert_same_state(restored(runs / "runs/a/checkpoints/last"), load(runs / "runs/c/checkpoints/last.pt"), 1e-10)


def test_another_network_is_told_in_one_line(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    single = ("--fabric.devices", "1", "--fabric.strategy", "single", "--checkpoint.sharded", "false")
    wrong = ("--name", "a", "--evaluate", "last", "--task.args", "{width: 8}")
    assert cli.main(["--config", "toy.yaml", *wrong, *single]) == 2
    said = capsys.readouterr().err
    assert "misshapen: " in said and "embed.weight (16, 8) for (8, 8)" in said and said.count("\n") == 1
