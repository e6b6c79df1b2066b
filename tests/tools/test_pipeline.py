"""A pipeline hands over what it says, skips what is done, and continues what was cut off."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from warm import run as run_warm

from fabric_trainer.checkpoint import load
from fabric_trainer.command import load as load_config
from tools import children, pipeline

FILE = {
    "name": "toys",
    "common": {
        "task": {"path": "staged.Staged"},
        "batch": {"micro_batch_size": 4},
        "run": {"max_epochs": 3},
        "optim": {"lr": "1e-2", "args": {"betas": [0.9, 0.99]}},
        "ema": {"decay": 0.9},
        "checkpoint": {"monitor": "val_ema/loss"},
        "fabric": {"accelerator": "cpu"},
        "loggers": {"csv": False, "tensorboard": False},
    },
    "stages": {
        "operator": {"optim": {"args": {"eps": 1e-7}}, "run": {"max_epochs": 2}},
        "diff_residual": {},
    },
}
MEASURED = FILE | {"stages": FILE["stages"] | {"evaluation": {}}}

# Keeps to what train.py promises about its files, --resume auto, --evaluate and exit codes, and knows no torch.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
stage = Path(given["--config"]).stem
with open("starts.txt", "a") as file:
    print(stage, file=file)
what = json.loads(os.environ.get("WHAT", "{}")).get(stage, "")
if "--evaluate" in given:
    metrics = {"test_ema/loss": 0.25, "test_ema/curve": [1.0, "NaN"]}
    Path(given["--out"]).write_text(json.dumps({"checkpoint": given["--evaluate"], "metrics": metrics}))
    sys.exit(0)
assert given["--resume"] == "auto" and given["--name"] == stage
folder = Path(given["--run.root"]) / stage
seen = (folder / "seen").exists()
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "seen").touch()
if what.startswith("SIG") and not seen:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda n, _: sys.exit({2: 130, 15: 75, 10: 75}[n]))
    if what == "SIGHUP":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), getattr(signal, what))
    time.sleep(30)
if what == "before its handlers" and not seen:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)
if what == "grows" and not seen:
    sys.exit(76)
if what == "is refused":
    print("error: schedule.warmup of 10 updates leaves none of the run's 10\\n", file=sys.stderr)
    sys.exit(2)
if what == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "checkpoints/step-7.pt").write_text(f"weights of {stage} {time.monotonic()}")
name = "last.pt" if what == "nan" else "best.pt"
(folder / "checkpoints" / name).symlink_to("step-7.pt")
(folder / "checkpoints/index.json").write_text(json.dumps({"step-7.pt": {"sha256": stage + str(os.getpid())}}))
if what == "fails":
    raise KeyError("a bug")
values = ["NaN"] if what == "nan" else [0.75, 0.5, 0.625]
tree = {"evaluations": [{"step": i, "val_ema/loss": v} for i, v in enumerate(values)], "epochs": [{"epoch": 0}] * 3}
(folder / "history.json").write_text(json.dumps(tree))
(folder / "run.json").write_text(json.dumps({"status": "finished"}))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with toy.yaml, and the stand-in for train.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(children, "TRAIN", tmp_path / "stand_in.py")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*more: str, file: dict[str, Any] = FILE) -> int:
    Path("toy.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    Path("starts.txt").write_text("")
    return pipeline.main(["--config", "toy.yaml", *more])


def started() -> list[str]:
    """The stages that the last ``run`` started."""
    return Path("starts.txt").read_text().split()


def becomes(monkeypatch: pytest.MonkeyPatch, **what: str) -> None:
    monkeypatch.setenv("WHAT", json.dumps(what))


def status() -> dict[str, dict[str, Any]]:
    tree = json.loads(Path("runs/toys/stage_status.json").read_text())
    assert tree["schema_version"] == 1
    return tree["stages"]


def states() -> list[str]:
    return [status()[stage]["status"] for stage in FILE["stages"]]


def with_keys(stage: str, **sections: Any) -> dict[str, Any]:
    """FILE with other keys of a stage."""
    return FILE | {"stages": FILE["stages"] | {stage: FILE["stages"][stage] | sections}}


def error(capsys: pytest.CaptureFixture, *more: str, file: dict[str, Any] = FILE) -> str:
    """The one line that wrong input gets, with code 2; nothing was started."""
    capsys.readouterr()
    assert run(*more, file=file) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert started() == []
    return captured.err


# ---- what is run --------------------------------------------------------------------------------------------------


def test_a_pipeline_and_all_that_it_leaves(home, capsys):
    assert run("--seed", "7", file=MEASURED) == 0
    out, entries = capsys.readouterr().out, status()
    assert started() == [*FILE["stages"], "evaluation"]

    operator, residual = (load_config(f"runs/toys/{stage}.yaml") for stage in ("operator", "diff_residual"))
    assert (operator.optim.lr, operator.optim.args) == (0.01, {"betas": [0.9, 0.99], "eps": 1e-7})
    assert (residual.optim.lr, residual.optim.args) == (0.01, {"betas": [0.9, 0.99]})
    assert (operator.run.max_epochs, residual.run.max_epochs, operator.seed, residual.seed) == (2, 3, 7, 7)
    assert "start" not in operator.task.args
    assert residual.task.args["start"] == "runs/toys/operator/checkpoints/best.pt"
    assert "diff_residual: starts from runs/toys/operator/checkpoints/best.pt" in out
    found = json.loads(Path("runs/toys/evaluation/metrics.json").read_text())
    assert found["checkpoint"] == "runs/toys/diff_residual/checkpoints/best.pt"

    unused = ("consistency_distill", "steady_prior")
    assert [stage for stage in entries if entries[stage]["status"] == "completed"] == list(MEASURED["stages"])
    assert all(entries[stage]["status"] == "not_started" for stage in unused)
    entry = entries["diff_residual"]
    assert (entry["epoch"], entry["total_epochs"], entry["error_message"]) == (3, 3, None)
    assert entry["started_at"] <= entry["completed_at"] and entry["checkpoint"] == found["checkpoint"]
    assert entry["start"] == entries["operator"]["checkpoint"] == residual.task.args["start"]
    (noted,) = json.loads(Path("runs/toys/operator/checkpoints/index.json").read_text()).values()
    assert entry["start_sha256"] == noted["sha256"] and len(entry["config_sha256"]) == 64
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert [(row[0], row[1], row[3:]) for row in rows] == [
        ("operator", "completed", ["val_ema/loss", "0.5"]),
        ("diff_residual", "completed", ["val_ema/loss", "0.5"]),
        ("evaluation", "completed", ["test_ema/loss", "0.25"]),
    ]

    assert run("--seed", "7", file=MEASURED) == 0 and started() == []
    assert capsys.readouterr().out.count(", skipped\n") == 3 and status() == entries
    assert run("--name", "other", "--stage", "operator", "--run.root", "elsewhere") == 0 and started() == ["operator"]
    assert Path("elsewhere/other/operator/run.json").is_file()


def test_what_is_not_monitored_hands_over_its_last_weights(home, monkeypatch):
    becomes(monkeypatch, operator="nan")
    assert run() == 0
    assert status()["diff_residual"]["start"] == "runs/toys/operator/checkpoints/last.pt"


def test_redo_is_of_a_stage_and_of_those_after_it(home):
    assert run() == 0
    before = status()
    assert run("--redo", "diff_residual") == 0 and started() == ["diff_residual"]
    assert status()["operator"] == before["operator"]
    assert status()["diff_residual"]["seconds"] != before["diff_residual"]["seconds"]
    assert run("--stage", "operator", "--redo", "operator") == 0 and started() == ["operator"]
    assert states() == ["completed", "not_started"]
    assert not Path("runs/toys/diff_residual").exists()


def test_a_key_that_differs_since(home, capsys):
    assert run() == 0
    line = error(capsys, file=with_keys("diff_residual", optim={"lr": 0.5}))
    assert "stage diff_residual began with other keys: optim.lr: 0.5 and not 0.01; --redo diff_residual" in line
    assert "stage operator began with other keys: seed: 1 and not 42" in error(capsys, "--seed", "1")
    assert run("--redo", "diff_residual", file=with_keys("diff_residual", optim={"lr": 0.5})) == 0
    assert load_config("runs/toys/diff_residual.yaml").optim.lr == 0.5


# ---- what it starts from ------------------------------------------------------------------------------------------


def test_a_stage_alone_needs_a_finished_operator(home, capsys):
    line = error(capsys, "--stage", "diff_residual")
    assert "starts from a finished operator, which is not_started: --stage operator runs it, or --operator-ckpt" in line
    assert "there is no such file" in error(capsys, "--stage", "diff_residual", "--operator-ckpt", "nowhere.pt")
    Path("operator.ckpt").write_text("weights")
    assert "run another" in error(capsys, "--stage", "operator", "--operator-ckpt", "operator.ckpt")
    assert run("--stage", "diff_residual", "--operator-ckpt", "operator.ckpt") == 0 and started() == ["diff_residual"]
    assert load_config("runs/toys/diff_residual.yaml").task.args["start"] == "operator.ckpt"
    assert run() == 0 and started() == []  # it is remembered
    assert "operator: operator.ckpt is in its place" in capsys.readouterr().out
    Path("other.pt").write_text("other weights")
    line = error(capsys, "--operator-ckpt", "other.pt")
    assert "stage diff_residual began from other weights, operator.ckpt, not other.pt; --redo diff_residual" in line
    assert run("--operator-ckpt", "other.pt", "--redo", "diff_residual") == 0
    assert status()["diff_residual"]["start"] == "other.pt"


def test_a_stage_that_was_run_by_hand(home, capsys, monkeypatch):
    assert run("--commands", file=MEASURED) == 0 and started() == []
    commands = capsys.readouterr().out.splitlines()
    assert commands[1] == (
        "python stand_in.py --config runs/toys/diff_residual.yaml --name diff_residual --run.root runs/toys"
        " --resume auto"
    )
    for line in commands[:2]:
        subprocess.run([sys.executable, *line.split()[1:]], check=True)
    Path("starts.txt").write_text("")
    assert "seed: 1 and not 42" in error(capsys, "--seed", "1")
    assert run(file=MEASURED) == 0 and started() == ["evaluation"]
    assert [*states(), status()["diff_residual"]["epoch"]] == ["completed"] * 2 + [3]


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_failure_ends_it_and_the_same_command_continues(home, capfd, monkeypatch):
    becomes(monkeypatch, diff_residual="is refused")
    assert run() == 2 and started() == ["operator", "diff_residual"]
    said = "schedule.warmup of 10 updates leaves none of the run's 10"
    assert status()["diff_residual"]["error_message"] == said
    captured = capfd.readouterr()
    assert captured.err.count(said) == 2 and f"stage diff_residual failed: {said} (runs/toys/diff_" in captured.err
    assert "diff_residual  failed" in captured.out
    changed = with_keys("diff_residual", schedule={"warmup": 0}, seed=3)  # nothing was trained: another is no matter
    becomes(monkeypatch, diff_residual="is killed")
    assert run(file=changed) == 137 and status()["diff_residual"]["error_message"] == "SIGKILL"
    becomes(monkeypatch, diff_residual="fails")
    assert run(file=changed) == 1 and status()["diff_residual"]["error_message"] == "KeyError: 'a bug'"
    capfd.readouterr()
    assert run() == 2 and "began with other keys: seed: 42 and not 3" in capfd.readouterr().err
    Path("runs/toys/diff_residual/checkpoints/best.pt").unlink()
    becomes(monkeypatch)
    assert run(file=changed) == 0 and started() == ["diff_residual"]
    assert states() == ["completed"] * 2 and status()["diff_residual"]["error_message"] is None


def test_out_of_memory_is_started_again(home, monkeypatch):
    becomes(monkeypatch, operator="grows")
    assert run() == 0 and started() == ["operator", "operator", "diff_residual"]


@pytest.mark.parametrize(
    "what, code",
    [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130), ("SIGHUP", 75), ("before its handlers", 75)],
)
def test_signals_are_passed_on(home, monkeypatch, what, code):
    handlers = {number: signal.getsignal(number) for number in children.Stop.SIGNALS}
    becomes(monkeypatch, operator=what)
    began = time.monotonic()
    assert run() == code and started() == ["operator"]
    assert time.monotonic() - began < 25, "the stage would have slept for 30 seconds"
    assert states() == ["in_progress", "not_started"]
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_one_pipeline_at_a_time(home, capsys, monkeypatch):
    Path("runs/toys").mkdir(parents=True)
    lock = open("runs/toys/.lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(pipeline, "PATIENCE", 0.2)
    assert "runs/toys is in use: by another pipeline" in error(capsys)
    monkeypatch.setattr(pipeline, "PATIENCE", 60)
    threading.Timer(0.3, lock.close).start()  # a stage that saves and leaves
    assert run("--stage", "operator") == 0


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}]
)
def test_it_runs_under_no_launcher(home, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = error(capsys)
    assert f"({next(iter(variables))}=" in line and "--config runs/toys/operator.yaml --name operator" in line
    assert run("--commands") == 0
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # in salloc's shell
    assert (pipeline.started_by() is None) == ("SLURM_NTASKS" in variables)


# ---- the file -----------------------------------------------------------------------------------------------------

STAGES = FILE["stages"]
WRONG = {
    "a key": (FILE | {"stage": {}}, "toy.yaml: unknown key stage; a pipeline has name, common, stages"),
    "a stage": (FILE | {"stages": STAGES | {"operators": {}}}, "stages: unknown stage operators; there are operator"),
    "their order": (FILE | {"stages": dict(reversed(STAGES.items()))}, "stages: in this order: operator, diff_"),
    "no stage": (FILE | {"stages": {}}, "in this order"),
    "no path": (FILE | {"common": FILE["common"] | {"task": {}}}, "stages.operator: task.path is missing"),
    "no mapping": (FILE | {"common": [1]}, "common: is a mapping of keys, not [1]"),
    "no section": (with_keys("diff_residual", optim=3), "stages.diff_residual: optim"),
    "a typo at the end": (with_keys("diff_residual", evaluate={"size": 3}), "stages.diff_residual: "),
    "an argument": (with_keys("diff_residual", task={"args": {"sampels": 3}}), "sampels"),
    "a value": (with_keys("diff_residual", optim={"lr": "fast"}), "stages.diff_residual: optim.lr"),
    "two that disagree": (with_keys("diff_residual", batch={"global_batch_size": 7}), "stages.diff_residual: "),
    "no device": (with_keys("diff_residual", fabric={"precision": "16-mixed"}), "stages.diff_residual: fabric.prec"),
    "a name": (with_keys("diff_residual", name="mine"), "stages.diff_residual: name: the pipeline itself sets it"),
    "a start": (with_keys("diff_residual", task={"args": {"start": "x.pt"}}), "task.args.start: the pipeline itself"),
    "a root": (with_keys("diff_residual", run={"root": "x"}), "run.root: one for all stages, under common"),
    "no start": (with_keys("diff_residual", task={"path": "toys.Regression"}), "start"),
}


@pytest.mark.parametrize("file, says", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_gets_one_line_before_the_first_stage(home, capsys, file, says):
    assert says in error(capsys, file=file)
    assert not Path("runs").exists()


def test_wrong_options_and_files(home, capsys):
    assert "--stage steady_prior: toy.yaml has no such stage, only" in error(capsys, "--stage", "steady_prior")
    assert "--redo steady_prior" in error(capsys, "--redo", "steady_prior")
    assert "--resume" in error(capsys, "--resume", "auto")
    assert "--optim.rate" in error(capsys, "--optim.rate", "1")
    assert pipeline.main(["--config", "nowhere.yaml"]) == 2
    Path("toy.yaml").write_text("stages: {")
    assert pipeline.main(["--config", "toy.yaml"]) == 2
    captured = capsys.readouterr().err
    assert "nowhere.yaml: there is no such file\n" in captured and "toy.yaml is no YAML" in captured
    assert captured.count("\n") == 2
    Path("runs/toys").mkdir(parents=True)
    Path("runs/toys/stage_status.json").write_text('{"schema_version": 2}')
    assert "schema_version 2, not 1" in error(capsys)


# ---- train.py itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """warm(name, *arguments, **environment): the pipeline, in processes that are forked; and the folder of its runs."""
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "toy.yaml").write_text(yaml.safe_dump(MEASURED, sort_keys=False))
    here = Path(__file__).resolve().parent
    paths = ":".join(map(str, (REPOSITORY, here.parent, here, here.parent / "distributed")))

    def run(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(here / "warm_pipeline.py")]
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
        return run_warm([*script, "--config", "toy.yaml", "--name", name, *arguments], folder, environment)

    done = run("whole")
    assert done.returncode == 0, done.stderr
    return run, folder / "runs"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"KILL": "20"}, id="its group"),
        pytest.param({"KILL": "20", "KILL_ALL": "1"}, id="its group and its stage", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_second_stage_and_continued(warm, how):
    """The first stage is skipped, the second resumed, and the last weights are those of a pipeline left alone."""
    run, runs = warm
    name = f"killed{len(how)}"
    done = run(name, **how)
    assert done.returncode == -signal.SIGKILL
    status = json.loads((runs / name / "stage_status.json").read_text())["stages"]
    assert [status[stage]["status"] for stage in MEASURED["stages"]] == ["completed", "in_progress", "not_started"]
    saved = json.loads((runs / name / "diff_residual/checkpoints/index.json").read_text())
    step = max(entry["step"] for entry in saved.values())
    assert step in ((8, 16) if "KILL_ALL" in how else (20, 21)), "on SIGTERM a stage saves, after the update under way"

    done = run(name)
    assert done.returncode == 0, done.stderr
    assert "operator: completed" in done.stdout and "diff_residual: goes on; it started from" in done.stdout
    assert f"step-{step:08d}.pt" in done.stdout
    for stage in ("operator", "diff_residual"):
        a, b = (load(runs / which / stage / "checkpoints/last.pt") for which in ("whole", name))
        assert a["counters"]["step"] == b["counters"]["step"] == (16, 24)[stage == "diff_residual"]
        for part in ("model", "ema"):
            assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    a, b = (json.loads((runs / which / "evaluation/metrics.json").read_text()) for which in ("whole", name))
    assert a["metrics"] == b["metrics"] and a["metrics"]["test_ema/loss"] > 0


@pytest.mark.distributed
def test_a_corrupt_operator_is_named(warm, tmp_path):
    run, runs = warm
    (tmp_path / "operator.pt").write_bytes(
        next((runs / "whole/operator/checkpoints").glob("step-*.pt")).read_bytes()[:-99]
    )
    done = run("corrupt", "--operator-ckpt", str(tmp_path / "operator.pt"))
    assert done.returncode == 1
    assert f"error: {tmp_path}/operator.pt is damaged" in done.stderr and "stage diff_residual failed" in done.stderr
