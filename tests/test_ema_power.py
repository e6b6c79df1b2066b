"""Power-function averages: their arithmetic, a real run's, and other widths made of its snapshots."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Regression, config

from fabric_trainer import cli
from fabric_trainer import fit as train
from fabric_trainer.checkpoint import load, read_index
from fabric_trainer.checks import check
from fabric_trainer.ema import EMA
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import evaluate
from fabric_trainer.power import decay_at, exponent, fit, inner, relative_width
from fabric_trainer.state import State
from tools import ema as tool

WIDTHS = st.floats(0.005, 0.288)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(300)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_papers_exponents():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(12**-0.5 - 1e-12) == pytest.approx(0, abs=1e-9)


@given(WIDTHS)
def test_a_width_gives_its_exponent_and_back(width):
    assert relative_width(exponent(width)) == pytest.approx(width, rel=1e-9)


@given(WIDTHS)
def test_a_width_is_the_profiles_standard_deviation(width):
    """E[s^k] = (gamma + 1) / (gamma + k + 1) of the profile (gamma + 1) s^gamma on 0 .. 1."""
    gamma = exponent(width)
    mean, square = ((gamma + 1) / (gamma + k + 1) for k in (1, 2))
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=WIDTHS, steps=st.integers(1, 60))
def test_the_average_is_its_closed_form(width, steps):
    """The k-th weights have what the profile has between k - 1 and k: (k^(g + 1) - (k - 1)^(g + 1)) / t^(g + 1)."""
    net = nn.Linear(4, 3).double()
    ema = EMA(net, power=[width])
    generator = torch.Generator().manual_seed(steps)
    history = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.weight.normal_(generator=generator)
        history.append(net.weight.detach().clone())
        ema.update(step)
    power = exponent(width) + 1
    shares = [(k / steps) ** power - ((k - 1) / steps) ** power for k in range(1, steps + 1)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    torch.testing.assert_close(ema.state_dict()["weight"], expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(a=WIDTHS, b=WIDTHS, t=st.integers(1, 1000), u=st.integers(1, 1000))
def test_inner_products_are_integrals(a, b, t, u):
    """Beside Gauss-Legendre quadrature of the two profiles where both are."""
    (a, b), end = (exponent(a), exponent(b)), min(t, u)
    s = (NODES + 1) / 2 * end
    product = (a + 1) / t * (s / t) ** a * (b + 1) / u * (s / u) ** b
    assert float(inner(a, t, b, u)) == pytest.approx(float(WEIGHTS @ product) * end / 2, rel=1e-6, abs=1e-300)
    assert float(inner(a, t, b, u)) == pytest.approx(float(inner(b, u, a, t)), rel=1e-12, abs=1e-300)


def test_narrow_profiles_of_long_runs_do_not_overflow():
    gamma = exponent(0.001)
    assert float(inner(gamma, 10**9, gamma, 10**9)) == pytest.approx((gamma + 1) ** 2 / (2 * gamma + 1) / 1e9)
    assert math.isfinite(float(inner(gamma, 10, gamma, 10**9)))
    assert 0 < decay_at(gamma, 10**9) < 1 and decay_at(gamma, 1) == 0


def profiles(count: int, *widths: float, steps: int = 10000) -> list[tuple[float, int]]:
    return [(exponent(width), round(steps * i / count)) for width in widths for i in range(1, count + 1)]


def test_a_profile_that_is_there_is_found():
    made = fit(profiles(8, 0.05, 0.1), (exponent(0.1), 10000))
    assert made.error < 1e-6
    np.testing.assert_allclose(made.coefficients, [0] * 15 + [1], atol=1e-9)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.12, 0.2])
def test_the_error_is_that_of_the_profile_and_falls_with_more_snapshots(width):
    errors = []
    for count in (4, 8, 16, 32):
        given = profiles(count, 0.05, 0.1)
        made = fit(given, (exponent(width), 10000))
        assert made.coefficients.sum() == pytest.approx(1, abs=1e-12)
        # the same from the profiles' own values
        s = np.arange(10000) + 0.5
        of = [(g + 1) / t * np.where(s < t, s / t, 0) ** g for g, t in [*given, (exponent(width), 10000)]]
        missed = np.linalg.norm(made.coefficients @ np.array(of[:-1]) - of[-1]) / np.linalg.norm(of[-1])
        assert made.error == pytest.approx(missed, rel=0.02)
        errors.append(made.error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 20


def test_twice_the_same_snapshot_changes_nothing():
    once, twice = profiles(8, 0.05, 0.1), profiles(8, 0.05, 0.1, 0.1)
    wanted = (exponent(0.07), 10000)
    assert fit(twice, wanted).error == pytest.approx(fit(once, wanted).error, rel=1e-6)


# ---- a run ----------------------------------------------------------------------------------------------------------

RUN = {
    "run.max_epochs": 10,
    "ema.power": [0.05, 0.1],
    "ema.snapshots": "13 steps",
    "evaluate.every": "100 epochs",
    "checkpoint.every": "100 epochs",
    "loggers.tensorboard": False,
}

TOY = {
    "task": {"path": "toys.Regression", "args": {"batch_norm": True}},
    "batch": {"micro_batch_size": 4},
    "run": {"max_steps": 1},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """130 updates: ``two`` widths with snapshots, and ``three`` widths, of which 0.07 is the one to make."""
    from lightning.fabric import Fabric

    fabric, folder = Fabric(accelerator="cpu", devices=1), tmp_path_factory.mktemp("runs")
    fabric.launch()
    for name, powers in (("two", [0.05, 0.1]), ("three", [0.05, 0.1, 0.07, 0.12])):
        changes = RUN | {"ema.power": powers, "ema.buffers": True}
        train(fabric, Regression(batch_norm=True), config(**changes), folder / name)
    return folder


def steps_of(folder: Path) -> list[int]:
    """Of the snapshots, which are the files and what the index says."""
    index = read_index(folder / "ema")
    assert sorted(index) == sorted(path.name for path in (folder / "ema").glob("step-*"))
    return sorted(entry["step"] for entry in index.values())


@pytest.mark.parametrize("width", [0.07, 0.12])
def test_a_synthesised_width_is_the_one_tracked(runs, width):
    """Relative to the weights, and to how far the average is from them: the figure that matters."""
    tracked = load(runs / "three/checkpoints/last.pt")
    assert all(torch.equal(v, tracked["model"][k]) for k, v in load(runs / "two/checkpoints/last.pt")["model"].items())
    made = tool.synthesise(runs / "two", width)
    assert list(made.saved["model"]) != [] and set(made.saved["model"]) == set(tracked["model"])
    learned = [name for name, value in tracked["model"].items() if value.is_floating_point()]
    assert "1.running_var" in learned, "averaged too"

    def flat(state: dict) -> torch.Tensor:
        return torch.cat([state[name].double().flatten() for name in learned])

    direct, found, raw = flat(tracked["averages"][f"power_{width}"]), flat(made.saved["model"]), flat(tracked["model"])
    error = ((found - direct).norm() / direct.norm()).item()
    apart = ((found - direct).norm() / (raw - direct).norm()).item()
    print(f"\nwidth {width}: relative error {error:.1e}, of the way to the raw weights {apart:.1e}; {made.lines}")
    assert error < 1e-2 and apart < 1e-2
    assert torch.equal(made.saved["model"]["1.num_batches_tracked"], tracked["model"]["1.num_batches_tracked"])


def test_the_file_is_a_checkpoint_of_weights(runs, fabric, tmp_path, monkeypatch, capsys):
    out = tmp_path / "made.pt"
    arguments = [str(runs / "two"), "--width", "0.12", "--out", str(out)]
    assert tool.main(arguments) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "10 snapshots, 20 averages of widths 0.05, 0.1" and "relative profile error" in told[1]
    assert told[2] == str(out)
    assert tool.main(arguments) == 2 and capsys.readouterr().err == f"error: --out {out}: it exists\n"
    network = Regression(batch_norm=True).network()
    network.load_state_dict(torch.load(out, weights_only=True)["model"])

    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--config", "toy.yaml", "--evaluate", str(out)]) == 0
    measured = dict(line.split(" ") for line in capsys.readouterr().out.splitlines()[-2:])
    split = State(fabric, Regression(batch_norm=True), config()).split("val")
    assert {name: float(value) for name, value in measured.items()} == pytest.approx(
        {f"val/{name}": value for name, value in evaluate(fabric, Regression(), network, split).items()}, rel=1e-6
    )
    assert cli.main(["--config", "toy.yaml", "--init_from", str(out), "--name", "tuned"]) == 0
    assert cli.main(["--config", "toy.yaml", "--resume", str(out)]) == 2
    assert "there are weights alone in it; --init_from starts with them" in capsys.readouterr().err


def test_averages_are_measured_as_the_run_kept_them(tmp_path, monkeypatch, capsys):
    """Running statistics and further averages too, whatever the command says."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    monkeypatch.chdir(tmp_path)
    keys = ["--ema.decay", "[0.9, 0.5]", "--ema.power", "[0.1]", "--ema.buffers", "true", "--run.max_steps", "12"]
    assert cli.main(["--config", "toy.yaml", "--name", "a", "--evaluate.weights", "all", *keys]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    (then,) = json.loads((run / "history.json").read_text())["evaluations"]
    capsys.readouterr()
    other = ["--evaluate", "last", "--name", "a", "--evaluate.weights", "all", "--ema.decay", "0.7"]
    assert cli.main(["--config", "toy.yaml", *other]) == 0
    now = dict(line.split(" ") for line in capsys.readouterr().out.splitlines() if line.startswith("val"))
    assert set(now) == {f"val{k}/{m}" for k in ("", "_ema", "_ema_0.5", "_ema_power_0.1") for m in ("loss", "abs")}
    assert {name: float(value) for name, value in now.items()} == {name: then[name] for name in now}


def test_an_earlier_step_is_what_was_tracked_then(runs):
    tracked = torch.load(runs / "three/ema/step-00000078.pt", weights_only=True)["averages"]["power_0.07"]
    found = tool.synthesise(runs / "two", 0.07, step=78).saved
    assert found["counters"]["step"] == 78
    for name, value in tracked.items():
        assert (found["model"][name] - value).norm() < 1e-2 * value.norm()
    exact = tool.synthesise(runs / "three", 0.07, step=78).saved["model"]
    for name, value in tracked.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-5, atol=1e-7)


def test_what_the_tool_refuses(runs, tmp_path, capsys):
    def error(run: Path, *arguments: str, code: int = 2) -> str:
        assert tool.main([str(run), "--out", str(tmp_path / "x.pt"), *arguments]) == code
        assert not (tmp_path / "x.pt").exists()
        return capsys.readouterr().err

    assert "x/ema has no snapshots: train with ema.power" in error(tmp_path / "x", "--width", "0.1")
    assert "--width 0.3: a relative width is above 0 and below 0.2887" in error(runs / "two", "--width", "0.3")
    assert "--width 0.0:" in error(runs / "two", "--width", "0")
    assert "--step 14: there are snapshots of 13, 26," in error(runs / "two", "--width", "0.1", "--step", "14")
    assert tool.main([str(runs / "two"), "--width", "0.01", "--out", str(tmp_path / "narrow.pt")]) == 0
    assert "warning: these snapshots come no nearer to width 0.01" in capsys.readouterr().out

    broken = tmp_path / "broken"
    os.symlink(runs / "two", broken)
    path = runs / "two/ema/step-00000013.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "step-00000013.pt is damaged: its sha256" in error(broken, "--width", "0.1", code=1)
    path.write_bytes(whole)


# ---- over a resume --------------------------------------------------------------------------------------------------


class Stop:
    def __init__(self, window: int) -> None:
        self.window = window

    def on_update_end(self, state: State, metrics: dict) -> None:
        if state.counters.window == self.window:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(fabric, folder: Path, window: int, changes: dict, later: dict | None = None) -> State:
    """A run that is stopped after ``window`` and its resume, where changes may be others."""
    fabric._callbacks.append(Stop(window - 1))  # the request is seen at the next update, which is then the last
    stopped = train(fabric, Regression(batch_norm=True), config(**changes), folder)
    fabric._callbacks.clear()
    assert stopped.stopped and stopped.counters.window == window
    saved = load(folder / "checkpoints/last.pt")
    return train(fabric, Regression(batch_norm=True), config(**(later or changes)), folder, saved=saved)


MANY = RUN | {
    "run.max_epochs": 3,
    "ema.decay": [0.9, 0.99],
    "ema.start": 7,
    "ema.buffers": True,
    "ema.snapshots": "6 steps",
}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("window", [5, 12, 15])
def test_a_resume_has_the_same_averages_and_the_same_snapshots(fabric, tmp_path, window):
    """Stopped before the averages begin, at a snapshot, and between two, where the running statistics of the last
    update are averaged, not those after another forward."""
    train(fabric, Regression(batch_norm=True), config(**MANY), tmp_path / "whole")
    interrupted(fabric, tmp_path / "parts", window, MANY)
    whole, parts = (load(tmp_path / name / "checkpoints/last.pt") for name in ("whole", "parts"))
    assert equal(whole["ema"], parts["ema"])
    assert list(whole["averages"]) == list(parts["averages"]) == ["0.99", "power_0.05", "power_0.1"]
    for label, average in whole["averages"].items():
        assert equal(average, parts["averages"][label]), label
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "parts") == [12, 18, 24, 30, 36, 39]
    for path in (tmp_path / "whole/ema").glob("step-*.pt"):
        a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "parts/ema" / path.name))
        assert a["power"] == b["power"] == {f"power_{w}": {"width": w, "start": 7} for w in (0.05, 0.1)}
        assert all(equal(average, b["averages"][label]) for label, average in a["averages"].items())
        assert equal(a["rest"], b["rest"]) and list(a["rest"]) == ["1.num_batches_tracked"]


def test_an_older_checkpoint_takes_later_snapshots_away(fabric, tmp_path):
    changes = MANY | {"checkpoint.every": "10 steps", "checkpoint.keep_last": 9}
    train(fabric, Regression(batch_norm=True), config(**changes), tmp_path)
    before = torch.load(tmp_path / "ema/step-00000018.pt", weights_only=True)
    saved = load(tmp_path / "checkpoints/step-00000020.pt")
    state = State(fabric, Regression(batch_norm=True), config(**changes | {"ema.snapshots": None}), saved)
    train(fabric, state.task, state.config, tmp_path, state=state)  # makes none, and leaves none of another future
    assert steps_of(tmp_path) == [12, 18]
    assert equal(
        before["averages"]["power_0.1"], tool.read_snapshots(tmp_path / "ema", 18)[-1]["averages"]["power_0.1"]
    )


def test_another_list_of_averages_keeps_those_that_are_in_both(fabric, tmp_path, capsys):
    changes = RUN | {"run.max_epochs": 3, "ema.decay": [0.9, 0.99], "ema.power": [0.1]}
    train(fabric, Regression(batch_norm=True), config(**changes), tmp_path / "whole")
    later = changes | {"ema.decay": [0.99, 0.5], "ema.power": [0.05, 0.1]}
    state = interrupted(fabric, tmp_path / "parts", 20, changes, later)
    assert "ema: 0.5, power_0.05 starts at the weights of step 20" in capsys.readouterr().out
    whole = load(tmp_path / "whole/checkpoints/last.pt")
    assert equal(whole["averages"]["0.99"], state.ema.state_dict()), "now the main one"
    assert equal(whole["averages"]["power_0.1"], state.ema.state_dict("power_0.1"))
    assert state.ema.starts == {"0.99": 0, "0.5": 20, "power_0.05": 20, "power_0.1": 0}
    made = tool.synthesise(tmp_path / "parts", 0.1)
    assert "left out: 2 averages that began after step 0" in made.lines[-1]
    assert torch.equal(made.saved["model"]["0.weight"], whole["averages"]["power_0.1"]["0.weight"])


def test_a_checkpoint_of_before_there_were_several_loads(fabric, tmp_path):
    changes = {"ema.decay": 0.9, "run.max_epochs": 3}
    train(fabric, Regression(), config(**changes), tmp_path / "run")
    saved = load(tmp_path / "run/checkpoints/last.pt")
    del saved["averages"], saved["states"]["ema"]
    for key in ("power", "start", "buffers", "snapshots"):
        del saved["config"]["ema"][key]
    state = State(fabric, Regression(), config(**changes), saved)
    assert equal(saved["ema"], state.ema.state_dict()) and state.ema.starts == {"0.9": 0}
    without = State(fabric, Regression(), config(), saved)
    assert without.ema is None


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ema.decay": [0.9, 1.0]}, "ema.decay must be at least 0 and below 1, not 1.0"),
        ({"ema.decay": [0.9, 0.9]}, r"ema.decay: \[0.9, 0.9\] has a value twice"),
        ({"ema.power": [0.3]}, "ema.power: a relative width is above 0 and below 0.2887, not 0.3"),
        ({"ema.power": [0.1, 0.0]}, "not 0.0"),
        ({"ema.start": -1}, "ema.start must be at least 0, not -1"),
        ({"ema.snapshots": "100 steps"}, "ema.snapshots: '100 steps' are of power averages; set ema.power"),
        ({"ema.snapshots": "now and then", "ema.power": [0.1]}, "ema.snapshots must read like '100 steps'"),
    ],
)
def test_impossible_averages_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        check(config(**changes))


def test_further_averages_are_measured_where_asked(fabric):
    changes = {"ema.decay": 0.9, "ema.power": [0.1], "run.max_epochs": 1}
    both = train(fabric, Regression(), config(**changes)).history.evaluations[-1]
    every = train(fabric, Regression(), config(**changes, **{"evaluate.weights": "all"})).history.evaluations[-1]
    assert {name.partition("/")[0] for name in both if "/" in name} == {"val", "val_ema"}
    assert {name.partition("/")[0] for name in every if "/" in name} == {"val", "val_ema", "val_ema_power_0.1"}
    assert every["val_ema/loss"] == both["val_ema/loss"] != every["val_ema_power_0.1/loss"]
