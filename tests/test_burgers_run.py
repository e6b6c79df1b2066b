"""The main job: the default configuration and its miniature, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from conftest import REPOSITORY

from fabric_trainer import cli

METRICS = (
    "val/nrmse",
    "val/nrmse_persistence",
    "val/nrmse_physical",
    "val/nrmse_physical_persistence",
    "val/nrmse_physical_floor",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FABRIC_TRAINER_DATA", str(tmp_path / "data"))
    return tmp_path


def tiny(*argv: str) -> int:
    return cli.main(["--config", str(REPOSITORY / "configs" / "burgers_tiny.yaml"), *argv])


def test_the_miniature_learns_and_reports(home, capsys):
    assert tiny("--name", "tiny") == 0
    lines = capsys.readouterr().out.splitlines()
    final = json.loads((home / "runs/tiny/history.json").read_text())["evaluations"][-1]
    for name in METRICS:
        assert f"{name} {final[name]:.4f}" in lines
    assert final["val/nrmse"] < 0.85 * final["val/nrmse_persistence"]
    assert final["val/nrmse_physical_floor"] < final["val/nrmse_physical_persistence"]
    page = (home / "runs/tiny/report.html").read_text()
    assert page.count("<img") + page.count("<svg") >= 5 and list((home / "runs/tiny/pictures").glob("*.png"))
    assert list((home / "data" / "burgers1d").glob("*.hdf5")), "data goes below the data root"


def test_wrong_files_get_one_line(home, capsys):
    with h5py.File("odd.hdf5", "w") as file:
        file["nu"] = [[1.0]]
    for files, says in (
        ("{train: odd.hdf5, val: odd.hdf5}", "odd.hdf5: expected a dataset 'tensor', found 'nu' (1, 1)"),
        ("{train: none.hdf5, val: odd.hdf5}", "none.hdf5: no such file"),
        ("{train: odd.hdf5}", "task.args.files.burgers1d: needs a file for val"),
    ):
        assert tiny("--task.args.made=null", f"--task.args.files={{burgers1d: {files}}}") == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and says in line
    files = "{burgers1d: {train: none.hdf5, val: odd.hdf5}}"
    assert tiny("--dry_run", "--task.args.made=null", f"--task.args.files={files}") == 0
    out = capsys.readouterr().out
    assert "would stop a real run" in out and "burgers1d.train: there is no file none.hdf5" in out
    assert "odd.hdf5" not in out


def test_real_pdebench_data(home, capsys, test_data):
    path = test_data / "data" / "pde" / "pdebench_layout" / "1D_Burgers_Sols_Nu0.01_n16.hdf5"
    with h5py.File(path) as file:
        cells = file["tensor"].shape[2]
    arguments = [f"--task.args.files={{burgers1d: {{train: {path}, val: {path}}}}}", "--task.args.made=null"]
    arguments += [f"--task.args.encoder={{tokens: {cells // 2}, dim: 32, patch: 2, margin: 2}}"]
    assert tiny("--name", "real", *arguments, "--run.max_steps=10", "--schedule.warmup=0") == 0
    assert "val/nrmse_physical " in capsys.readouterr().out


@pytest.mark.slow
def test_the_default_run_meets_its_bound(home):
    """At most 0.60 x persistence in physical space, data included, in about two minutes on two cores."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    began = time.monotonic()
    command = [sys.executable, REPOSITORY / "train.py", "--config", REPOSITORY / "configs" / "burgers.yaml"]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith("val") and line.count(" ") == 1)
    print(f"{seconds:.0f} s", {name: found[name] for name in METRICS})
    assert float(found["val/nrmse_physical"]) <= 0.60 * float(found["val/nrmse_physical_persistence"])
    assert float(found["val/nrmse_physical_floor"]) < float(found["val/nrmse_physical"])
    assert seconds < 240
