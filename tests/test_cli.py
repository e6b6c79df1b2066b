"""The command line: what it prints, where it writes, and one clear line for wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from toys import Regression

from fabric_trainer import Config, cli
from fabric_trainer.checkpoint import load
from fabric_trainer.errors import InputError

CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 30}},
    "batch": {"micro_batch_size": 4, "accumulate": 2},
    "ema": {"decay": 0.9},
    "run": {"max_epochs": 2},
    "checkpoint": {"monitor": "val/loss"},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with toy.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FABRIC_TRAINER_DATA", str(tmp_path / "data"))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def run(*argv: str) -> int:
    return cli.main(["--config", "toy.yaml", *argv])


def error(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The single line that wrong input gets; the code is 2 and nothing else is said."""
    capsys.readouterr()
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def test_a_run_and_all_that_it_leaves(home, capsys):
    assert run("--name", "first") == 0
    out = capsys.readouterr().out
    assert "4 micro x 2 accumulate x 1 rank = 8" in out and "4 in the first epoch, 8 in all" in out
    folder = home / "runs" / "first"
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "history.json",
        "checkpoints",
        "report.html",
        "run.json",
    }
    final = json.loads((folder / "history.json").read_text())["evaluations"][-1]
    assert f"val/loss {final['val/loss']:.4f}" in out.splitlines()
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch"]["accumulate"] == 2
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert load(folder / "checkpoints" / "best.pt")["counters"]["step"] in (4, 8)


def test_names_resume_and_overwrite(home, capsys):
    assert run("--name", "a", "--run.max_steps", "3") == 0
    assert "--resume auto" in (line := error(capsys, "--name", "a")) and "--overwrite" in line
    assert run("--name", "a", "--resume", "auto", "--run.max_steps", "5") == 0
    assert "resumed with another run.max_steps: 5 (was 3)" in capsys.readouterr().out
    assert load(home / "runs/a/checkpoints/last.pt")["counters"]["step"] == 5
    assert run("--name", "a", "--resume", "auto", "--run.max_steps", "5") == 0
    assert "run a is finished: 5 steps" in capsys.readouterr().out
    assert run("--name", "a", "--overwrite", "--run.max_steps", "2") == 0
    assert load(home / "runs/a/checkpoints/last.pt")["counters"]["step"] == 2
    (home / "runs" / "mine").mkdir()
    assert "not a run's folder" in error(capsys, "--name", "mine", "--overwrite")
    assert (home / "runs" / "mine").exists()


def test_resume_without_a_name_takes_the_newest_unfinished_run(home, capsys):
    assert run("--resume", "auto", "--run.max_steps", "2") == 0  # nothing there: a fresh one
    (first,) = (home / "runs").iterdir()
    assert first.name.startswith("toy-")
    status = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(status | {"status": "failed"}))
    assert run("--resume", "auto", "--run.max_steps", "4") == 0
    assert [path.name for path in (home / "runs").iterdir()] == [first.name]
    assert load(first / "checkpoints" / "last.pt")["counters"]["step"] == 4


def test_resume_from_a_path(home, capsys):
    run("--name", "a", "--checkpoint.every", "2 steps", "--checkpoint.keep_last", "9", "--run.max_steps", "6")
    assert run("--resume", "runs/a/checkpoints/step-00000002.pt", "--run.max_steps", "8") == 0
    assert load(home / "runs/a/checkpoints/last.pt")["counters"]["step"] == 8
    rows = (home / "runs/a/metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 9))
    assert "no such checkpoint" in error(capsys, "--resume", "nowhere.pt")


def test_init_from(home, capsys):
    run("--name", "a")
    assert run("--name", "b", "--init_from", "runs/a/checkpoints/last.pt", "--run.max_steps", "1") == 0
    assert "weights from runs/a" in capsys.readouterr().out
    assert load(home / "runs/b/checkpoints/last.pt")["counters"]["step"] == 1


def test_evaluate_gives_the_figures_of_training_bit_for_bit(home, capsys):
    run("--name", "a")
    final = json.loads((home / "runs/a/history.json").read_text())["evaluations"][-1]
    capsys.readouterr()
    for which in ("last", "runs/a/checkpoints/last.pt"):
        assert run("--name", "a", "--evaluate", which) == 0
        lines = capsys.readouterr().out.splitlines()
        found = dict(line.split() for line in lines if line.startswith("val"))
        assert {"val/loss", "val/abs", "val_ema/loss", "val_ema/abs"} == set(found)
        for name, value in found.items():
            assert float(value) == final[name], name
    assert run("--evaluate", "best") == 0  # the newest run that has one
    assert run("--name", "a", "--evaluate", "last", "--evaluate.micro_batch_size", "5") == 0
    found = dict(line.split() for line in capsys.readouterr().out.splitlines()[-4:])
    assert float(found["val/loss"]) == pytest.approx(final["val/loss"], rel=1e-6)
    assert "no test split" in error(capsys, "--name", "a", "--evaluate", "last", "--split", "test")
    assert "has no best.pt" in error(capsys, "--name", "nobody", "--evaluate", "best")


def test_fast_dev_run_leaves_no_folder(home, capsys):
    assert run("--fast_dev_run", "--schedule.name", "cosine", "--schedule.warmup", "100") == 0
    assert "val/loss" in capsys.readouterr().out
    assert not (home / "runs").exists()


def test_dry_run_writes_nothing(home, capsys):
    before = sorted(home.rglob("*"))
    assert run("--dry_run") == 0
    assert run("--dry_run", "--optim.name=muon_hybrid") == 0
    assert capsys.readouterr().out == "the configuration is valid\n" * 2
    assert "there is no adanw" in error(capsys, "--dry_run", "--optim.others=[{match: [bias], name: adanw}]")
    assert "does not divide the 3 processes" in error(
        capsys, "--dry_run", "--fabric.devices=3", "--fabric.strategy=fsdp", "--fabric.tensor_parallel_size=2"
    )
    assert run("--dry_run", "--fabric.accelerator", "cuda", "--fabric.precision", "16-mixed") == 0
    out = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "would stop a real run" in out and "this machine has none" in out
    assert sorted(home.rglob("*")) == before


WRONG = {
    "unknown key": (["--optim.learning_rate", "1"], "--optim.learning_rate"),
    "wrong type": (["--optim.lr", "fast"], "optim.lr"),
    "not a task": (["--task.path", "toys.Points"], "task.path: toys.Points is not a fabric_trainer.Task"),
    "no module": (["--task.path", "nowhere.Task"], "task.path: no module nowhere"),
    "no class": (["--task.path", "toys.Nothing"], "toys has no Nothing"),
    "task argument": (["--task.args.sampels", "3"], "sampels"),
    "task argument type": (["--task.args.samples", "many"], "samples"),
    "does not divide": (["--batch.accumulate", "1", "--batch.global_batch_size", "10"], "8 or 12"),
    "both": (["--batch.global_batch_size", "8"], "batch.accumulate and batch.global_batch_size"),
    "optimizer": (["--optim.name", "adamv"], "did you mean adam"),
    "optimizer argument": (["--optim.args.beta", "1"], "AdamW takes no beta; it takes"),
    "closure": (["--optim.name", "lbfgs"], "needs a closure"),
    "warm-up": (["--schedule.warmup", "100"], "schedule.warmup of 100 updates leaves none of the run's 8"),
    "monitor": (["--checkpoint.monitor", "val/nothing"], "no val/nothing among the metrics val/loss"),
    "init_from": (["--init_from", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    "strategy": (["--fabric.strategy", "tpu"], "fabric.strategy must be one of"),
    "devices": (["--fabric.devices", "zwei"], "fabric.devices must be"),
    "a section's key": (["--fabric.ddp.statik", "true"], "--fabric.ddp.statik"),
    "predict": (["--predict", "last"], "--predict last needs --out FILE"),
    "a GPU's strategy": (["--fabric.strategy", "fsdp1"], "fsdp1 needs a GPU"),
    "sharded": (["--checkpoint.sharded", "true"], "fsdp and tensor_parallel can save shards"),
    "precision": (["--fabric.precision", "8"], "fabric.precision must be one of"),
}


@pytest.mark.parametrize("argv, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_gets_one_line_and_code_2(home, capsys, argv, says):
    assert says in error(capsys, *argv)


def test_a_missing_or_broken_config(home, capsys):
    assert cli.main(["--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: there is no such file" in capsys.readouterr().err
    (home / "toy.yaml").write_text("optim: {lr: 0.1\n")
    error(capsys)
    (home / "toy.yaml").write_text("optimizer: {lr: 0.1}\n")
    assert "optimizer" in error(capsys)


def test_a_resume_from_another_model_is_refused(home, capsys):
    run("--name", "a", "--run.max_steps", "2")
    line = error(capsys, "--name", "a", "--resume", "auto", "--run.max_steps", "4", "--task.args.width", "9")
    assert "is not of this network: misshapen: 0.weight (16, 8) for (9, 8)" in line
    assert "batch.*" in error(capsys, "--name", "a", "--resume", "auto", "--batch.accumulate", "4")
    assert "seed is 1" in error(capsys, "--name", "a", "--resume", "auto", "--seed", "1")
    assert load(home / "runs/a/checkpoints/last.pt")["counters"]["step"] == 2


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_continues(home, capsys):
    run("--name", "whole", "--checkpoint.every", "2 steps")
    run("--name", "a", "--checkpoint.every", "2 steps", "--run.max_steps", "6")
    path = home / "runs/a/checkpoints/step-00000006.pt"
    path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert run("--name", "a", "--checkpoint.every", "2 steps", "--resume", "auto") == 0
    out = capsys.readouterr().out
    assert "skipped runs/a/checkpoints/step-00000006.pt: damaged" in out
    whole, again = (load(home / f"runs/{name}/checkpoints/last.pt") for name in ("whole", "a"))
    assert all(torch.equal(whole["model"][key], again["model"][key]) for key in whole["model"])


def test_help_comes_in_two_seconds_and_names_every_section(tmp_path):
    seconds = []
    for _ in range(3):  # the best of three: other tests may be running
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, REPOSITORY / "train.py", "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        seconds.append(time.monotonic() - began)
        assert done.returncode == 0
    assert min(seconds) < 2.0
    for word in ("--optim.lr", "--batch.accumulate", "--resume auto|PATH|none", "--fast_dev_run", "--print_config"):
        assert word in done.stdout


def test_print_config_is_a_config(home):
    command = [sys.executable, REPOSITORY / "train.py", "--config", "toy.yaml", "--optim.lr", "3e-4", "--print_config"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    printed = yaml.safe_load(done.stdout)
    assert printed["optim"]["lr"] == 3e-4 and printed["task"]["args"] == {"samples": 30}
    (home / "toy.yaml").write_text(done.stdout)
    assert run("--dry_run") == 0


@pytest.mark.slow  # with two ranks each: test_launching.py
@pytest.mark.distributed
def test_fabric_run_and_plain_python_behave_alike(home):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests"), "OMP_NUM_THREADS": "1"}
    launcher = [Path(sys.executable).parent / "fabric", "run"]
    for name, command in (("plain", [sys.executable]), ("launched", launcher)):
        arguments = ["train.py", "--config", home / "toy.yaml", "--run.root", home / "runs", "--name", name]
        done = subprocess.run([*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "val/loss" in done.stdout
    a, b = (load(home / f"runs/{name}/checkpoints/last.pt") for name in ("plain", "launched"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


class Bare(Regression):
    """A task without arguments."""

    def __init__(self) -> None:
        super().__init__()


def test_a_task_may_take_no_arguments():
    made = Config()
    made.task.path = "test_cli.Bare"
    assert isinstance(cli.make_task(made), Bare)
    made.task.args = {"samples": 3}
    with pytest.raises(InputError, match="samples"):
        cli.make_task(made)
