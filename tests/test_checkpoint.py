"""Checkpoint files: whatever happens to one, the one before it is still there, and nothing foreign is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import Regression, config

from fabric_trainer import checkpoint, fit
from fabric_trainer.checkpoint import Checkpoints, check_finite, load, newest, read_index
from fabric_trainer.config import CheckpointConfig
from fabric_trainer.errors import CheckpointError, InputError
from fabric_trainer.files import HashingFile


def tree(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(50, 20, generator=generator), "count": torch.tensor(step)},
        "ema": None,
        "optimizer": {"state": {"weight": {"step": torch.tensor(float(step))}}, "groups": [{"lr": 0.1}]},
        "config": {"batch": {"accumulate": {"window": {0: 8}}}, "name": None},
    }


def save(checkpoints: Checkpoints, step: int, keep: bool = False, **metrics: float) -> Path:
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return checkpoints.save(tree(step), {"window": step, "step": step}, named, keep)


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    return tmp_path


def test_what_is_saved_is_what_is_loaded(two):
    for step in (1, 2):
        assert equal(load(two / f"step-{step:08d}.pt"), tree(step))
    assert os.readlink(two / "last.pt") == "step-00000002.pt"
    assert newest(two, pytest.fail).name == "step-00000002.pt"


@pytest.mark.parametrize("seed", range(25))
def test_a_flipped_byte_anywhere_is_named_and_the_one_before_is_used(two, seed):
    path = two / "step-00000002.pt"
    data = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(data))
    data[place] ^= 1 << (seed % 8)
    path.write_bytes(data)
    told: list[str] = []
    assert newest(two, told.append).name == "step-00000001.pt"
    assert len(told) == 1 and "step-00000002.pt" in told[0] and "damaged" in told[0]
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.77, 0.999])
def test_a_cut_file_is_named_and_the_one_before_is_used(two, share):
    path = two / "step-00000002.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    told: list[str] = []
    assert newest(two, told.append).name == "step-00000001.pt"
    assert "step-00000002.pt" in told[0]
    (two / checkpoint.INDEX).unlink()  # without its hash the file itself must give it away
    with pytest.raises(CheckpointError, match=r"step-00000002\.pt is (damaged|refused)"):
        load(path)


def test_all_damaged_means_none(two):
    for path in two.glob("step-*.pt"):
        path.write_bytes(b"x")
    told: list[str] = []
    assert newest(two, told.append) is None and len(told) == 2


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, writer):
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    if writer == "torch":
        torch.save({"model": {}, "x": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {}, "x": Evil(trap)}))
    with pytest.raises(CheckpointError, match="refused" if writer == "torch" else "damaged|refused"):
        load(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap works, so the refusal was needed"


class FullDisk:
    """A file whose n-th write, flush or sync fails as on a full disk; counts them all."""

    def __init__(self, fail_at: int | None) -> None:
        self.fail_at, self.calls = fail_at, 0

    def open(self, *args: object, **kwargs: object) -> FullDisk:
        self.file = open(*args, **kwargs)  # noqa: SIM115
        return self

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def _tick(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise OSError(28, "No space left on device")

    def write(self, data: bytes) -> int:
        self._tick()
        return self.file.write(data)

    def flush(self) -> None:
        self._tick()
        self.file.flush()


def count_writes(tmp_path: Path) -> int:
    disk = FullDisk(None)
    with HashingFile(tmp_path / "counted", disk.open) as file:
        torch.save(tree(3), file)
    return disk.calls


def test_a_full_disk_at_each_write_leaves_the_previous_one(two, tmp_path_factory, monkeypatch):
    writes = count_writes(tmp_path_factory.mktemp("count"))
    assert writes > 10
    for fail_at in range(writes):
        disk = FullDisk(fail_at)
        monkeypatch.setattr(checkpoint, "HashingFile", lambda path, disk=disk: HashingFile(path, disk.open))
        checkpoints = Checkpoints(two, CheckpointConfig())
        save(checkpoints, 3)
        with pytest.raises(CheckpointError, match=r"could not write .*step-00000003.*No space left"):
            checkpoints.wait()
        assert sorted(path.name for path in two.glob("*.pt")) == ["last.pt", "step-00000001.pt", "step-00000002.pt"]
        assert not list(two.glob(".*.tmp")), "half a file was left"
        assert newest(two, pytest.fail).name == "step-00000002.pt"
        assert equal(load(two / "last.pt"), tree(2))


def test_a_full_disk_for_the_index_leaves_the_previous_one(two, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    checkpoints = Checkpoints(two, CheckpointConfig())
    save(checkpoints, 3)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.wait()
    assert newest(two, pytest.fail).name == "step-00000002.pt"


def test_a_real_limit_on_file_size_is_a_full_disk_too(tmp_path):
    """No injection: the kernel refuses to let the file grow, in the middle of a run."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from lightning.fabric import Fabric
from toys import Regression, config
from fabric_trainer import fit
from fabric_trainer.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Limit:
    def on_update_end(self, state, metrics):
        if state.counters.step >= 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
fabric = Fabric(accelerator="cpu", devices=1, callbacks=[Limit()])
fabric.launch()
made = config(**{{"checkpoint.every": "13 steps", "loggers.csv": False, "loggers.tensorboard": False}})
made.evaluate.every = "100 epochs"
try:
    fit(fabric, Regression(), made, Path({str(tmp_path)!r}))
except (CheckpointError, OSError) as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert newest(tmp_path / "checkpoints", lambda line: None).name == "step-00000013.pt"


def test_rotation_keeps_the_newest_the_best_and_the_marked(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, top_k=2, monitor="val/loss"))
    for step, loss in enumerate([5.0, 1.0, 4.0, 2.0, 9.0, 8.0, float("nan")], start=1):
        save(checkpoints, step, keep=step == 3, val_loss=loss)
    checkpoints.wait()
    files = {path.name for path in tmp_path.glob("step-*.pt")}
    assert files == {f"step-{step:08d}.pt" for step in (2, 3, 4, 6, 7)}
    assert set(read_index(tmp_path)) == files
    assert os.readlink(tmp_path / "best.pt") == "step-00000002.pt"
    assert os.readlink(tmp_path / "last.pt") == "step-00000007.pt"


def test_mode_max(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=1, top_k=1, monitor="val/acc", mode="max"))
    for step, accuracy in enumerate([0.5, 0.9, 0.7], start=1):
        assert checkpoints.is_best(accuracy) == (accuracy in (0.5, 0.9))
        save(checkpoints, step, val_acc=accuracy)
    checkpoints.wait()
    assert os.readlink(tmp_path / "best.pt") == "step-00000002.pt"


def test_names_take_counters_and_metrics():
    counters, metrics = {"step": 7, "epoch": 1.0}, {"val/nrmse": 0.12345}
    name = checkpoint.file_name("operator-epoch={epoch:02.0f}-val_nrmse={val/nrmse:.4f}", counters, metrics)
    assert name == "operator-epoch=01-val_nrmse=0.1235.pt" or name == "operator-epoch=01-val_nrmse=0.1234.pt"
    assert checkpoint.file_name("{step}-{val/other}", counters, {}) == "7-nan.pt"
    assert "/" not in checkpoint.file_name("val/{step}", counters, {})
    with pytest.raises(InputError, match=r"checkpoint\.name"):
        checkpoint.file_name("{step:q}", counters, {})


def test_a_snapshot_does_not_follow_later_updates(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    live = torch.zeros(1_000_000)
    checkpoints.save({"model": {"weight": live}}, {"window": 1, "step": 1}, {}, False)
    live.fill_(1)
    checkpoints.save({"model": {"weight": live}}, {"window": 2, "step": 2}, {}, False)
    live.fill_(2)
    checkpoints.wait()
    assert load(tmp_path / "step-00000001.pt")["model"]["weight"].unique().tolist() == [0]
    assert load(tmp_path / "step-00000002.pt")["model"]["weight"].unique().tolist() == [1]


def test_what_is_not_finite_is_not_saved():
    good = {"model": {"a": torch.ones(3), "n": torch.tensor(3)}, "ema": None}
    check_finite(good)
    for bad in (float("nan"), float("inf"), -float("inf")):
        tree = {**good, "optimizer": {"state": {"a": {"exp_avg": torch.tensor([0.0, bad])}}}}
        with pytest.raises(CheckpointError, match=r"optimizer\.state\.a\.exp_avg isn't finite"):
            check_finite(tree)


def test_a_run_saves_only_plain_values(fabric, tmp_path):
    fit(fabric, Regression(), config(**{"ema.decay": 0.9, "clip.norm": 1.0}), tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)

    def check(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, (str, int)), path
                check(item, f"{path}.{key}")
        elif isinstance(value, list):
            for item in value:
                check(item, path)
        else:
            assert value is None or isinstance(value, (torch.Tensor, str, int, float, bool)), f"{path}: {type(value)}"

    check(saved, "")
    assert json.loads((tmp_path / "history.json").read_text())["evaluations"][-1]["step"] == saved["counters"]["step"]


def test_a_checkpoint_loads_where_this_library_cannot_be_imported(fabric, tmp_path):
    state = fit(fabric, Regression(batch_norm=True), config(**{"ema.decay": 0.9}), tmp_path)
    x = torch.randn(5, 8)
    state.module.eval()
    torch.save({"x": x, "y": state.module(x)}, tmp_path / "pair.pt")
    program = """
import sys
sys.modules["fabric_trainer"] = None  # an import of it would raise
import torch
from torch import nn
net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 2))
saved = torch.load(sys.argv[1], weights_only=True)
net.load_state_dict(saved["ema"], strict=True)
net.load_state_dict(saved["model"], strict=True)
pair = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(net.eval()(pair["x"]), pair["y"])
print("same")
"""
    last, pair = tmp_path / "checkpoints" / "last.pt", tmp_path / "pair.pt"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, last, pair], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "same\n", done.stderr
