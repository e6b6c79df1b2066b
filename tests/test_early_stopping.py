"""Early stopping: when, beside the plain definition; and what a run that stops early leaves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Regression, config

from fabric_trainer import Loss, fit
from fabric_trainer.checkpoint import load
from fabric_trainer.config import EarlyStoppingConfig
from fabric_trainer.early_stopping import EarlyStopping
from fabric_trainer.errors import InputError
from fabric_trainer.faults import StopSignals
from fabric_trainer.state import State

METRICS = st.lists(st.one_of(st.integers(-5, 5).map(float), st.just(math.nan)), max_size=30)


def stops_after(metrics: list[float], patience: int, min_delta: float = 0.0, mode: str = "min") -> int | None:
    """The evaluations that a run has had when it stops."""
    stopping = EarlyStopping(EarlyStoppingConfig(patience, min_delta), mode)
    for count, metric in enumerate(metrics, 1):
        stopping.observe(metric)
        if stopping.over:
            return count
    return None


@settings(max_examples=300, deadline=None)
@given(METRICS, st.integers(1, 6), st.sampled_from(["min", "max"]))
def test_without_a_margin_it_stops_patience_evaluations_after_the_first_of_the_best(metrics, patience, mode):
    values = [math.inf if math.isnan(m) else m if mode == "min" else -m for m in metrics]
    firsts = [values.index(min(values[: i + 1])) if min(values[: i + 1]) < math.inf else -1 for i in range(len(values))]
    expected = next((i + 1 for i, best in enumerate(firsts) if i - best >= patience), None)
    assert stops_after(metrics, patience, 0.0, mode) == expected


@settings(max_examples=300, deadline=None)
@given(METRICS, st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0, 2.5]))
def test_with_a_margin_every_improvement_must_come_within_the_patience_of_the_one_before(metrics, patience, min_delta):
    """From each improvement, look for the next one among the evaluations that follow it."""
    place, best = -1, math.inf
    while True:
        later = range(place + 1, len(metrics))
        following = next((i for i in later if metrics[i] < best - min_delta), None)
        if following is None or following - place > patience:
            break
        place, best = following, metrics[following]
    expected = place + patience + 1 if place + patience < len(metrics) else None
    assert stops_after(metrics, patience, min_delta) == expected


@settings(deadline=None)
@given(METRICS, st.data())
def test_a_state_that_was_saved_goes_on_as_if_nothing_had_been(metrics, data):
    at = data.draw(st.integers(0, len(metrics)))
    made = [EarlyStopping(EarlyStoppingConfig(3, 0.5), "max") for _ in range(3)]
    for metric in metrics:
        made[0].observe(metric)
    for metric in metrics[:at]:
        made[1].observe(metric)
    made[2].load_state_dict(made[1].state_dict())
    for metric in metrics[at:]:
        made[2].observe(metric)
    assert made[2].state_dict() == made[0].state_dict() and made[2].over == made[0].over


# ---- in a run -------------------------------------------------------------------------------------------------------

CHANGES = {
    "run.max_epochs": None,
    "run.max_steps": 100,
    "evaluate.every": "2 steps",
    "checkpoint.every": "100 steps",
    "checkpoint.monitor": "val/score",
    "ema.decay": 0.5,
    "loggers.tensorboard": False,
}


class Scripted(Regression):
    """Its val/score follows a script: one entry for each evaluation of the raw weights, by their place in the run."""

    script = (5.0, 3.0, 2.0, 2.5, 1.95, 2.2, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def figures(self, sums):
        self.evaluations += 1
        raw = (self.evaluations - 1) // 2  # the average is measured after the raw weights
        return {"score": self.script[raw]}


def stopping(**keys) -> dict:
    return CHANGES | {f"early_stopping.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    "keys, evaluations",
    [
        ({"patience": 1}, 4),
        ({"patience": 2}, 7),  # the script's end: 1.95 is an improvement
        ({"patience": 2, "min_delta": 0.1}, 5),  # and here it is none
        ({"patience": 1, "mode": "max"}, 2),
        ({"patience": 3, "mode": "max"}, 4),
        ({"patience": 2, "monitor": "val_ema/score", "min_delta": 10.0}, 3),
    ],
)
def test_a_run_ends_after_the_evaluation_that_is_one_too_many(fabric, capsys, keys, evaluations):
    changes = stopping(**keys) | {"run.max_steps": 14}
    state = fit(fabric, Scripted(), config(**changes))
    assert len(state.history.evaluations) == evaluations and state.counters.step == 2 * evaluations
    assert state.finished and state.complete and state.stopped == 0
    early = evaluations < 7
    assert ("early stopping: nothing better than" in capsys.readouterr().out) == early


def test_the_best_weights_are_put_back_and_last_pt_keeps_the_last(fabric, tmp_path, capsys):
    class Watch:
        weights: dict = {}

        def on_evaluation_end(self, state, metrics):
            averages = {k: v.clone() for k, v in state.ema.state_dict().items()}
            raw = {k: v.clone() for k, v in state.module.state_dict().items()}
            self.weights[state.counters.step] = raw, averages

    fabric._callbacks.append(Watch())
    state = fit(fabric, Scripted(), config(**stopping(patience=1, restore_best=True)), tmp_path)
    fabric._callbacks.clear()
    assert state.counters.step == 8, "the fourth evaluation is no improvement on the third"
    raw, averages = Watch.weights[6]
    assert all(torch.equal(value, state.module.state_dict()[name]) for name, value in raw.items())
    assert all(torch.equal(value, state.ema.state_dict()[name]) for name, value in averages.items())
    last, best = (load(tmp_path / "checkpoints" / f"{which}.pt") for which in ("last", "best"))
    assert (last["counters"]["step"], best["counters"]["step"]) == (8, 6)
    assert all(torch.equal(value, last["model"][name]) for name, value in Watch.weights[8][0].items())
    assert any(not torch.equal(value, last["model"][name]) for name, value in raw.items())
    assert state.restored["val/score"] == 2.0
    out = capsys.readouterr().out
    assert "early stopping: nothing better than 2 in 1 evaluations" in out
    assert "restored the weights of step 6" in out and "last.pt has the last update's" in out


def test_what_stopped_early_is_finished_until_its_patience_is_longer(fabric, tmp_path):
    """Continued with more patience it is the run that had it from the start."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    task = Scripted()
    fit(fabric, task, config(**stopping(patience=1)), parts)
    saved = load(parts / "checkpoints" / "last.pt")
    assert State(fabric, Scripted(), config(**stopping(patience=1)), saved).finished
    longer = config(**stopping(patience=2, min_delta=0.1))
    state = fit(fabric, task, longer, parts, saved=saved)  # the script goes on where it was
    straight = fit(fabric, Scripted(), longer, whole)
    assert state.counters.step == straight.counters.step == 10
    assert state.early_stopping.state_dict() == straight.early_stopping.state_dict() == {"least": 2.0, "bad": 2}
    a, b = (load(folder / "checkpoints" / "last.pt") for folder in (parts, whole))
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


def test_an_evaluation_that_a_stop_left_undone_can_end_the_run(fabric, tmp_path):
    """Its turn comes when the run is continued, before any update."""
    made = config(**stopping(patience=1, mode="max", restore_best=True) | {"checkpoint.mode": "max"})

    class Stop:
        def on_update_end(self, state, metrics):
            if state.counters.window == 3:  # seen at the fourth, after which the second evaluation is due
                signals.stop = 75

    task, signals = Scripted(), StopSignals()
    fabric._callbacks.append(Stop())
    state = fit(fabric, task, made, tmp_path, signals=signals)
    fabric._callbacks.clear()
    assert state.stopped == 75 and state.owes_evaluation and state.counters.step == 4
    state = fit(fabric, task, made, tmp_path, saved=load(tmp_path / "checkpoints" / "last.pt"))
    assert state.counters.step == 4 and state.finished and state.restored["val/score"] == 5.0


def test_what_it_needs_is_asked_for_before_training(fabric, tmp_path):
    class Blind(Regression):
        def dataset(self, split):
            return super().dataset(split) if split == "train" else None

        def loss(self, network, batch) -> Loss:
            raise AssertionError("trains")

    with pytest.raises(InputError, match=r"early_stopping\.patience needs evaluations: Blind has no val split"):
        fit(fabric, Blind(), config(**stopping(patience=1)))
    with pytest.raises(InputError, match="restore_best needs a folder"):
        fit(fabric, Regression(), config(**stopping(restore_best=True)))
    with pytest.raises(InputError, match=r"early_stopping\.monitor: no val/f1 among the metrics val/loss"):
        fit(fabric, Regression(), config(**stopping(patience=1, monitor="val/f1")))
