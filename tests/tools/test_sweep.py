"""A sweep tries what it is told, survives being stopped, and says what became of each trial."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from fabric_trainer.errors import InputError
from fabric_trainer.history import read_history
from tools import sweep
from tools.children import locked
from tools.sweep_plot import draw
from tools.sweep_space import parse

CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 30}},
    "batch": {"micro_batch_size": 4},
    "run": {"max_epochs": 2},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}
LR, SIZE = "optim.lr=log(1e-4,1e-1)", "batch.micro_batch_size=[2, 4,8]"

# Keeps to what train.py promises about names, --resume auto, history.json and exit codes. What becomes of a run depends
# on the keys: the loss is (log10 lr + 2)^2, plus a little for weight_decay.
STAND_IN = """
import json, math, os, signal, sys, time
from pathlib import Path

keys = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if "=" in argument)
given = dict(zip(sys.argv[1:], sys.argv[2:]))
assert given["--resume"] == "auto"
folder = Path(given["--run.root"]) / given["--name"]
began = folder.is_dir()
folder.mkdir(exist_ok=True)
lr, number = float(keys.get("optim.lr", 0.1)), int(given["--name"][-4:])
loss = (math.log10(lr) + 2) ** 2 + float(keys.get("optim.weight_decay", 0)) / 100
def tell(*values):
    entries = [{"step": i, "val/loss": value} for i, value in enumerate(values)]
    text = json.dumps({"evaluations": entries, "epochs": [{"train_epoch/loss": 3.0}]})
    (folder / "h.tmp").write_text(text)
    os.replace(folder / "h.tmp", folder / "history.json")
what = json.loads(os.environ.get("WHAT", "{}")).get(str(number), "")
if what == "interrupts" and not began:
    os.kill(os.getppid(), signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    time.sleep(30)
if what == "grows" and not (folder / "small").exists():
    (folder / "small").touch()
    sys.exit(76)
if what == "diverges":
    print("error: 11 updates had a gradient that was not finite, the last in window 9", file=sys.stderr)
    sys.exit(1)
if what == "is refused":
    print("error: schedule.warmup of 10 updates leaves none of the run's 10", file=sys.stderr)
    sys.exit(2)
if what == "fails":
    raise KeyError("a bug")
if what == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "nan":
    tell("NaN")
elif what.startswith("gets worse"):
    if what == "gets worse":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    tell(loss + 50, loss + 50)
    time.sleep(30)
    tell(loss + 50, loss + 50, loss + 50)
else:
    tell(loss + 1, loss, loss + 0.5)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with toy.yaml, and the stand-in for train.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", tmp_path / "stand_in.py")
    return tmp_path


def run(name: str, trials: int, *more: str, parameters: tuple[str, ...] = (LR,)) -> int:
    chosen = [word for parameter in parameters for word in ("--param", parameter)]
    own = ["--name", name, "--config", "toy.yaml", "--metric", "val/loss", "--trials", str(trials)]
    return sweep.main([*own, *chosen, *more])


def becomes(monkeypatch: pytest.MonkeyPatch, **what: str) -> None:
    """becomes(_3="fails"): of trial 3."""
    monkeypatch.setenv("WHAT", json.dumps({number[1:]: value for number, value in what.items()}))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


# ---- what is tried ------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 99))
def test_values_lie_in_their_range(low, width, log, whole, seed):
    import optuna

    ends = (low, low + width) if whole else (low / 7, (low + width) / 7)
    parameter = parse(f"optim.lr={'log' * log}({ends[0]}, {ends[1]})")
    assert (parameter.whole, parameter.log) == (whole, log)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    value = parameter.suggest(study.ask())
    assert ends[0] <= float(value) <= ends[1] and (value.isdigit() or not whole)
    assert [float(end) for end in parameter.extremes()] == list(ends)


def test_what_a_choice_may_be():
    parameter = parse("a.b=[8, cosine, null, true, 1e-3, {epoch: {0: 8}}, [0.9, 0.99]]")
    assert parameter.choices == ("8", "cosine", "null", "true", "1e-3", '{"epoch": {"0": 8}}', "[0.9, 0.99]")
    assert parse("optim.weight_decay=(0,0.3)").whole is False
    assert parse("optim.weight_decay=(-1,+3)").extremes() == ("-1", "3")


@pytest.mark.parametrize(
    "text, says",
    [
        ("optim.lr", "must be key=log(1e-4,1e-1), (0,0.3) or [8,16,32]"),
        ("optim.lr=3", "must be key="),
        ("optim.lr=[]", "must be key="),
        ("optim.lr=(1,2,3)", "must be key="),
        ("=(1,2)", "must be key="),
        ("optim.lr=(a,2)", "the ends of a range are numbers, not a and 2"),
        ("optim.lr=(2,1)", "the first end must be below the second"),
        ("optim.lr=(0,nan)", "the first end must be below the second"),
        ("optim.lr=log(0,1)", "must be above 0"),
        ("optim.lr=[1, 1]", "a choice comes twice"),
    ],
)
def test_what_is_no_parameter(text, says):
    with pytest.raises(InputError, match=r"^--param ") as error:
        parse(text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_wrong_input_gets_one_line_before_the_first_trial(home, capsys):
    def error(*more: str, parameters: tuple[str, ...] = (LR,)) -> str:
        capsys.readouterr()
        assert run("a", 2, *more, parameters=parameters) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and captured.out == ""
        return captured.err

    assert "optim.rate" in error(parameters=("optim.rate=(0,1.0)",))
    assert "batch.micro_batch_size" in error(parameters=("batch.micro_batch_size=(0,8)",))
    assert "clip.norm" in error(parameters=("clip.norm=[1.0, all]",))
    assert "breadth" in error(parameters=("task.args.breadth=(1,8)",))
    assert "the command sets optim.lr twice" in error("--optim.lr", "0.1")
    assert "the command sets optim.lr twice" in error(parameters=(LR, LR))
    assert "run.root: the sweep itself sets it" in error(parameters=("run.root=[a, b]",))
    assert "no --resume" in error("--resume", "auto")
    assert "--optim.rate" in error("--optim.rate", "0.1")
    assert not (home / "runs").exists()


# ---- what becomes of trials -----------------------------------------------------------------------------------------


def test_a_sweep_and_all_that_it_leaves(home, capsys):
    both = {"parameters": (LR, SIZE)}
    assert run("a", 4, "--optim.weight_decay=0.5", **both) == 0
    out = capsys.readouterr().out.splitlines()
    folder = home / "runs/sweeps/a"
    rows = table(folder)
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3"]
    assert {row["batch.micro_batch_size"] for row in rows} <= {"2", "4", "8"}
    for row in rows:
        losses = [entry["val/loss"] for entry in read_history(folder / f"trial-000{row['trial']}").evaluations]
        assert row["state"] == "finished" and float(row["val/loss"]) == min(losses) == losses[1]
    best = min(rows, key=lambda row: float(row["val/loss"]))
    assert out[-2].startswith(f"best: trial {best['trial']}, val/loss {float(best['val/loss']):.6g}")
    size = f"--batch.micro_batch_size={best['batch.micro_batch_size']}"
    assert out[-1] == (
        f"python train.py --config toy.yaml --optim.weight_decay=0.5 --optim.lr={best['optim.lr']} {size}"
    )
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert run("a", 4, **both) == 2  # without the weight decay it is another sweep
    assert "is of another sweep: optim.weight_decay was 0.5 and is 0.0" in capsys.readouterr().err
    assert run("a", 3, "--optim.weight_decay=0.5", **both) == 0 and len(table(folder)) == 4
    assert "4 of 3 trials" in capsys.readouterr().out


def test_failed_ones_do_not_count_and_diverged_ones_do(home, capsys, monkeypatch):
    becomes(monkeypatch, _0="diverges", _1="fails", _2="nan", _3="grows", _4="is killed", _5="is refused")
    assert run("a", 5) == 0
    rows = table(home / "runs/sweeps/a")
    states = ["diverged", "failed", "diverged", "finished", "failed", "refused", "finished"]
    assert [row["state"] for row in rows] == states
    assert [bool(row["val/loss"]) for row in rows] == [state == "finished" for state in states]
    out = capsys.readouterr().out
    assert "KeyError: 'a bug'" in out and "SIGKILL" in out and "leaves none" in out and "5 of 5 trials" in out


def test_five_failures_in_a_row_end_it(home, capsys, monkeypatch):
    becomes(monkeypatch, _1="fails", _2="is refused", _3="fails", _4="fails", _5="fails")
    assert run("a", 9) == 1
    assert (
        "error: 5 trials in a row failed or were refused: see runs/sweeps/a/trial-0005.log" in capsys.readouterr().err
    )
    assert "a bug" in (home / "runs/sweeps/a/trial-0005.log").read_text()


def test_a_metric_that_no_run_has(home, capsys):
    assert run("a", 2, "--metric", "val/accuracy") == 2
    assert "--metric val/accuracy: a run has val/loss, train_epoch/loss" in capsys.readouterr().err


def test_a_bad_trial_is_pruned(home, capsys, monkeypatch):
    becomes(monkeypatch, _6="gets worse", _7="gets worse, and is past its last update")
    began = time.monotonic()
    assert run("a", 8, "--pruner", "median") == 0
    assert time.monotonic() - began < 25, "either would have taken 30 seconds"
    rows = table(home / "runs/sweeps/a")
    assert [row["state"] for row in rows] == ["finished"] * 6 + ["pruned"] * 2
    assert [bool(row["val/loss"]) for row in rows] == [True] * 6 + [False] * 2


def test_interrupted_and_continued_is_not_interrupted(home, capsys, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    assert run("whole", 4) == 0
    becomes(monkeypatch, _2="interrupts")
    assert run("again", 4) == 130
    assert "2 of 4 trials; the same command continues" in capsys.readouterr().out
    assert [row["state"] for row in table(home / "runs/sweeps/again")] == ["finished"] * 2 + ["stopped"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert run("again", 4) == 0
    assert table(home / "runs/sweeps/again") == table(home / "runs/sweeps/whole")


def test_one_at_a_time_and_the_other_end(home, capsys):
    folder = home / "runs/sweeps/a"
    folder.mkdir(parents=True)
    with locked(folder, sweep.TAKEN):
        assert run("a", 1) == 2
    assert "runs/sweeps/a is in use" in capsys.readouterr().err
    assert run("a", 1, "--mode", "max") == 0
    (row,), history = table(folder), read_history(folder / "trial-0000")
    assert float(row["val/loss"]) == max(entry["val/loss"] for entry in history.evaluations)


def test_no_labels_overlap():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["constant", "cosine", "one_cycle", "exponential", "a_name_without_end"]
    parameters = [parse(f"schedule.name=[{', '.join(names)}]"), parse("optim.lr=log(1e-6,1e-1)")]
    parameters += [parse("schedule.warmup=(0,20000)"), parse("clip.norm=(0.5,0.50001)")]
    values = {"optim.lr": [1e-6, 3e-4, 0.1], "schedule.warmup": [0, 7, 20000], "clip.norm": [0.5, 0.500004, 0.50001]}
    trials = [
        SimpleNamespace(
            number=i,
            value=[0.5, None, 123.0][i],
            user_attrs={"state": ["finished", "diverged", "finished"][i]},
            params={"schedule.name": names[i]} | {key: values[key][i] for key in values},
        )
        for i in range(3)
    ]
    figure = draw(SimpleNamespace(trials=trials, direction=SimpleNamespace(name="MINIMIZE")), parameters, "val/loss")
    with matplotlib.rc_context():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    assert sum(axes.axison for axes in figure.axes) == 5
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text() and label.get_visible()]
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels if label.get_rotation() == 0]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), axes.get_xlabel()
        if axes.axison:
            assert axes.lines[0].get_ydata().shape == (3,) and len(axes.lines[1].get_xdata()) == 1


# ---- train.py itself ------------------------------------------------------------------------------------------------


def command(home: Path, name: str, trials: int) -> list[str]:
    own = ["--name", name, "--config", str(home / "toy.yaml"), "--run.root", str(home / "runs"), "--metric", "val/loss"]
    return [sys.executable, "-m", "tools.sweep", *own, "--param", LR, "--param", SIZE, "--trials", str(trials)]


def test_one_trial_is_the_run_that_it_prints(home, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "TRAIN", REPOSITORY / "train.py")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests"))
    assert run("a", 1) == 0
    (row,) = table(home / "runs/sweeps/a")
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["python", "train.py"]
    from fabric_trainer import cli

    assert cli.main([*last[2:], "--name", "b"]) == 0
    losses = [entry["val/loss"] for entry in read_history(home / "runs/b").evaluations]
    assert float(row["val/loss"]) == min(losses)


@pytest.mark.slow
def test_killed_in_the_middle_and_continued(home):
    """SIGKILL of the sweep, and of the trial that it leaves behind; what is there at the end is as without."""
    (home / "toy.yaml").write_text(
        yaml.safe_dump(CONFIG | {"run": {"max_epochs": 150}, "checkpoint": {"every": "5 epochs"}})
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "tests")}

    def go(name: str) -> subprocess.CompletedProcess:
        arguments = command(home, name, 3)
        return subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    done = go("whole")
    assert done.returncode == 0, done.stderr
    folder = home / "runs/sweeps/again"
    process = subprocess.Popen(command(home, "again", 3), cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    checkpoints = folder / "trial-0001" / "checkpoints"
    while not list(checkpoints.glob("step-*.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    (pid,) = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_trial(pid, folder))
    os.kill(pid, signal.SIGSTOP)  # so that it is there for as long as we like
    process.kill()
    process.wait()
    refused = go("again")
    assert refused.returncode == 2 and "a trial that a killed one has left running" in refused.stderr
    os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    done = go("again")
    assert done.returncode == 0, done.stderr
    assert table(folder) == table(home / "runs/sweeps/whole")
    for name in ("trial-0000", "trial-0001", "trial-0002"):
        a, b = ((home / "runs/sweeps" / which / name / "metrics.csv").read_text() for which in ("whole", "again"))
        assert a.splitlines()[-1].split(",")[:6] == b.splitlines()[-1].split(",")[:6]


def _is_trial(pid: str, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return str(folder) in words and any(word.endswith("train.py") for word in words)
