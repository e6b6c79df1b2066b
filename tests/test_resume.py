"""Killed anywhere and resumed, a run ends bit-equal to one that was never stopped."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from toys import Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load
from fabric_trainer.errors import InputError
from fabric_trainer.state import State
from tools import chaos


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, kills):
    runs, bad, hits = chaos.rampage(tmp_path, kills=kills, seed=1)
    assert sum(hits.values()) == kills and bad == 0, f"{bad} of {runs} runs ended differently"
    assert hits.get("in a save", 0) >= kills // 6, f"too few kills fell into a save: {hits}"
    if kills < 20:
        return
    # the logs tell that one epoch was killed more than once
    resumed = re.findall(r"step-(\d+)\.pt", (tmp_path / "killed-0.log").read_text())
    epochs = [int(step) // 26 for step in resumed]
    assert max(epochs.count(epoch) for epoch in epochs) >= 2, epochs


@pytest.fixture
def slow_run(tmp_path: Path) -> Path:
    settings = chaos.CONFIG | {"run": {"max_epochs": 2, "log_every_n_steps": 5}}
    (tmp_path / "chaos.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda x: str(x)
)
def test_a_signal_saves_and_leaves_with_its_code(slow_run, number, code):
    whole = chaos.start(slow_run, "whole")
    stopped = chaos.start(slow_run, "stopped")
    wait_for(slow_run / "stopped" / "checkpoints" / "last.pt")
    os.kill(stopped.pid, number)
    stopped.join(30)
    assert stopped.exitcode == code
    assert "finishing this update" in (slow_run / "stopped.log").read_text()
    before = load(slow_run / "stopped" / "checkpoints" / "last.pt")["counters"]["step"]
    assert 0 < before < 52
    resumed = chaos.start(slow_run, "stopped")
    resumed.join(60)
    whole.join(60)
    assert resumed.exitcode == whole.exitcode == 0
    assert differences(slow_run / "whole", slow_run / "stopped") == []


def test_a_second_sigint_leaves_at_once(slow_run):
    process = chaos.start(slow_run, "twice")
    wait_for(slow_run / "twice" / "checkpoints" / "last.pt")
    os.kill(process.pid, signal.SIGSTOP)  # both are pending when it goes on, so no update can end between them
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130


@pytest.mark.parametrize("stop_at", range(1, 14))
def test_a_stop_after_every_update_of_an_epoch(fabric, tmp_path, stop_at):
    """Without processes: stopped at each update in turn, evaluations due at that very update included."""
    changes = {
        "batch.accumulate": 2,
        "ema.decay": 0.9,
        "ema.power": [0.1],
        "ema.buffers": True,
        "ema.snapshots": "4 steps",
        "optim.name": "sgd",
        "optim.args": {"momentum": 0.9},
        "schedule.name": "plateau",
        "schedule.patience": 0,
        "checkpoint.monitor": "val/loss",
        "evaluate.every": "3 steps",
        "checkpoint.every": "100 steps",
        "loggers.tensorboard": False,
    }

    class Noisy(chaos.Noisy):
        def __init__(self) -> None:
            super().__init__(samples=50, width=16, pause=0.0)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    fit(fabric, Noisy(), config(**changes), whole)

    class Stop:
        def on_update_end(self, state: State, metrics: dict) -> None:
            if state.counters.window == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    fabric._callbacks.append(Stop())
    state = fit(fabric, Noisy(), config(**changes), parts)
    fabric._callbacks.clear()
    # the request is seen at the next update, which is then the last
    assert state.stopped == (75 if stop_at < 13 else 0) and state.counters.window == min(stop_at + 1, 14)
    saved = load(parts / "checkpoints" / "last.pt")
    fit(fabric, Noisy(), config(**changes), parts, saved=saved)
    assert differences(whole, parts) == []


def test_resume_from_another_model_data_or_batch_is_refused(fabric, tmp_path):
    fit(fabric, Regression(), config(), tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(InputError, match=r"missing: 1\.bias, 1\.num_batches_tracked.*; unexpected: 3\.bias"):
        State(fabric, Regression(batch_norm=True), config(), saved)
    with pytest.raises(InputError, match=r"misshapen: 0\.weight \(16, 8\) for \(17, 8\)"):
        State(fabric, Regression(width=17), config(), saved)
    with pytest.raises(InputError, match="50 samples, this configuration's has 51"):
        State(fabric, Regression(51), config(), saved)
    with pytest.raises(InputError, match="effective batch of 4, this makes 8"):
        State(fabric, Regression(), config(**{"batch.accumulate": 2}), saved)
    # half the micro-batch keeps the effective batch: accumulation follows
    halves = {"batch.micro_batch_size": 2, "batch.global_batch_size": 4}
    assert State(fabric, Regression(), config(**halves), saved).accumulate == 2


def test_init_from_takes_weights_alone(fabric, tmp_path):
    state = fit(fabric, Regression(), config(), tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")
    fresh = State(fabric, Regression(), config(**{"ema.decay": 0.9}))
    fresh.load_weights({"model": saved["model"]})
    assert fresh.counters.step == 0 and not fresh.engine.bare_optimizer.state
    for name, value in state.module.state_dict().items():
        assert torch.equal(fresh.module.state_dict()[name], value)
        assert torch.equal(fresh.ema.state_dict()[name], value)


def differences(whole: Path, stopped: Path) -> list[str]:
    """But for the files kept: a stop saves one more."""
    a, b = chaos.outcome(whole), chaos.outcome(stopped)
    del a["kept"], b["kept"]
    return chaos.differences(a, b)


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)
