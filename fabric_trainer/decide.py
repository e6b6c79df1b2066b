"""What an evaluation decides: the plateau schedule's drops, early stopping, and which units are frozen."""

from __future__ import annotations

from fabric_trainer.errors import InputError
from fabric_trainer.order import Span
from fabric_trainer.probe import probe
from fabric_trainer.record import Record
from fabric_trainer.state import State

Metrics = dict[str, float]


def watch(state: State, record: Record, metrics: Metrics) -> None:
    """Let the plateau schedule and early stopping see the metric that they follow."""
    config, stopping = state.config, state.early_stopping
    monitor = str(config.checkpoint.monitor)
    if config.schedule.name == "plateau":
        state.plateau.observe(named(metrics, "checkpoint.monitor", monitor))
    if stopping.config.patience is None:
        return
    key = "early_stopping.monitor" if stopping.config.monitor else "checkpoint.monitor"
    stopping.observe(named(metrics, key, stopping.config.monitor or monitor))
    if stopping.over:
        record.print(f"early stopping: nothing better than {stopping.best:.4g} in {stopping.bad} evaluations")


def advance(state: State, record: Record, span: Span, metrics: Metrics) -> bool:
    """Freeze and unfreeze what is due after the window: by the step, or at the end of an epoch, which advances the
    plan. Returns whether the plan wants the best weights back."""
    freezer = state.freezer
    before, freezer.step, restore = freezer.frozen, state.counters.step, False
    if span.last and freezer.parts:
        metric = _followed(state, metrics) if freezer.plan.follows_metric else None
        with state.profiler("probe"):
            readings = probe(state, span.epoch, freezer.plan.probes) if freezer.plan.probes else []
        action = freezer.plan.on_epoch(metric, span.epoch, readings)
        restore = action.restore
        for note in action.notes:
            record.print(f"freeze: {note}")
    if freezer.frozen != before:
        state.refreeze()
        record.print(f"freeze: step {freezer.step} · {freezer.count(state.module)}")
    return restore


def named(metrics: Metrics, key: str, name: str) -> float:
    """Raises InputError, naming the configuration's ``key``, where there is no such metric."""
    if name not in metrics:
        raise InputError(f"{key}: no {name} among the metrics {', '.join(metrics)}")
    return metrics[name]


def _followed(state: State, metrics: Metrics) -> float:
    """The metric that the plan follows, higher meaning better."""
    freeze, checkpoint = state.config.freeze, state.config.checkpoint
    key = "freeze.monitor" if freeze.monitor else "checkpoint.monitor"
    value = named(metrics, key, freeze.monitor or str(checkpoint.monitor))
    return value if (freeze.mode or checkpoint.mode) == "max" else -value
