"""environment.json against git itself and a faked cluster."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from fabric_trainer.environment import describe, git_state


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "train.py").write_text("lr = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_describe_is_json_and_complete(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    monkeypatch.setattr("sys.argv", [str(checkout / "train.py"), "--name", "a b"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JWT", "secret")
    found = describe(4, torch.device("cpu"), "ddp")
    assert json.loads(json.dumps(found)) == found
    assert found["command"].endswith("train.py --name 'a b'")
    assert (found["world_size"], found["device"], found["strategy"]) == (4, "cpu", "ddp")
    assert found["slurm"] == {"JOB_ID": "17", "PROCID": "0"}
    assert "secret" not in json.dumps(found)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["hardware"]["memory"] > 1e8
    assert found["git"]["commit"] == git(checkout, "rev-parse", "HEAD").strip()  # the script's checkout, not ours
    age = datetime.now(UTC) - datetime.fromisoformat(found["started"])
    assert 0 <= age.total_seconds() < 60
    assert found["started"].endswith("+00:00")


def test_git_state_has_what_is_not_committed(checkout: Path) -> None:
    clean = git_state(checkout)
    assert clean == {"commit": git(checkout, "rev-parse", "HEAD").strip(), "branch": "trunk", "changed": [], "diff": ""}
    (checkout / "train.py").write_text("lr = 2\n")
    (checkout / "new.py").write_text("")
    dirty = git_state(checkout)
    assert dirty is not None
    assert dirty["changed"] == [" M train.py", "?? new.py"]
    assert "-lr = 1\n+lr = 2\n" in dirty["diff"]


def test_long_diff_is_cut_and_says_so(checkout: Path) -> None:
    (checkout / "train.py").write_text("x" * 10_000)
    whole = git(checkout, "diff", "HEAD")
    state = git_state(checkout, limit=1000)
    assert state is not None
    assert state["diff"] == f"{whole[:1000]}\n[cut: {len(whole) - 1000} more bytes]\n"


def test_no_commit_no_checkout_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    fresh = git_state(tmp_path)
    assert fresh is not None
    assert (fresh["commit"], fresh["diff"]) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
    assert describe(1, torch.device("cpu"), "single")["git"] is None
