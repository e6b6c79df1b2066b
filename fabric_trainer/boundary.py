"""What may follow an update: a log point, the end of an epoch, an evaluation, a checkpoint."""

from __future__ import annotations

import gc
import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fabric_trainer.checkpoint import Checkpoints, check_finite, load, take_part
from fabric_trainer.decide import advance, named, watch
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import measure, measure_test
from fabric_trainer.every import Clock, Every
from fabric_trainer.memory import in_use
from fabric_trainer.order import Span
from fabric_trainer.portable import shared
from fabric_trainer.record import Record
from fabric_trainer.sharded_save import save_shards
from fabric_trainer.snapshots import Snapshots
from fabric_trainer.state import State


class Boundary(AbstractContextManager["Boundary"]):
    """Knows when something is due, and does it. ``metrics`` are those of the last evaluation.

    A resumed run first makes up for an evaluation that the stop left undone.
    """

    def __init__(self, state: State, record: Record, folder: Path | None) -> None:
        config = state.config
        self.state, self.record, self.fabric = state, record, state.fabric
        self.every = {
            "log": Every(config.run.log_every_n_steps, "steps"),
            "evaluate": Every.parse(config.evaluate.every),
            "save": Every.parse(config.checkpoint.every),
        }
        if config.checkpoint.keep_every:
            self.every["keep"] = Every.parse(config.checkpoint.keep_every)
        if config.run.cleanup_every:
            self.every["clean up"] = Every.parse(config.run.cleanup_every)
        if config.ema.snapshots and folder is not None:
            self.every["snapshot"] = Every.parse(config.ema.snapshots)
        self.saves = folder is not None
        if config.freeze.strategy == "advanced" and config.freeze.advanced.restore_weights and not self.saves:
            raise InputError("freeze.advanced.restore_weights needs a folder to write to: the weights are in best.pt")
        if config.early_stopping.restore_best and not self.saves:
            raise InputError("early_stopping.restore_best needs a folder to write to: the best weights are in best.pt")
        self.checkpoints: Checkpoints | None = None
        if folder is not None and self.fabric.is_global_zero:
            self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint, record.loggers.log_checkpoint)
            self.checkpoints.forget_after(state.counters.window)
        self.snapshots = Snapshots(state, folder)
        self.metrics: dict[str, float] = {}
        self.measured_at = -1  # the window after which they were measured
        self.now = self._resumed_clock()
        self.marks = {name: every.after(self.now) for name, every in self.every.items()}  # when each is due next
        self._set_soonest()
        if state.owes_evaluation:
            self.evaluate()
            if state.freezer.plan.follows_metric:
                self.freeze(state.order.span(state.counters.window - 1))
            with state.profiler("save"):
                self.save()

    def _resumed_clock(self) -> Clock:
        counters, order = self.state.counters, self.state.order
        epochs = 0.0
        if counters.window:
            span = order.span(counters.window - 1)
            epochs = span.epoch + span.stop / order.length(span.epoch)
        return Clock(counters.step, epochs, counters.seconds / 60)

    def due(self, span: Span, minutes: float) -> bool:
        """Whether anything follows the window just done, if its update was applied: nobody has asked yet."""
        if self.checkpoints is not None:
            self.checkpoints.check()
            self.snapshots.check()
        state = self.state
        steps = state.counters.step + state.guard.unsettled
        epochs = span.epoch + span.stop / state.order.length(span.epoch)
        soonest = self._soonest
        if not (
            span.last
            or state.stopped
            or steps >= soonest["steps"]
            or epochs >= soonest["epochs"]
            or minutes >= soonest["minutes"]
        ):
            return False
        self.now = Clock(steps, epochs, minutes)
        return True

    def act(self, span: Span) -> None:
        """Do what is due after the window; its update is settled by now."""
        state = self.state
        self.now = replace(self.now, steps=state.counters.step)
        due = self._reached()
        for name in due:
            self.marks[name] = self.every[name].after(self.now)
        self._set_soonest()
        state.time_is_up = self.now.minutes >= state.most_minutes
        finished = state.finished
        if finished:
            state.stopped = 0
        with state.profiler("log"):
            self.record.flush(show="log" in due or finished)
        if span.last:
            self.end_epoch(span.epoch)
        improved, follows = False, state.freezer.plan.follows_metric
        asked = "evaluate" in due or (span.last and follows)
        if state.val_set is not None and (finished or asked):
            state.owes_evaluation = bool(state.stopped)
            if not state.stopped:
                improved = self.evaluate(planned=asked or state.complete)
        if not (follows and state.owes_evaluation):
            self.freeze(span)
        if "snapshot" in due or (state.finished and "snapshot" in self.every):
            with state.profiler("save"):
                self.snapshots.save()
        if state.finished or state.stopped or improved or {"save", "keep"} & due:
            with state.profiler("save"):
                self.save(keep="keep" in due)
        if "clean up" in due:
            with state.profiler("clean up"):
                self.clean_up()
        self.record.restart_clock()

    def _reached(self) -> set[str]:
        return {name for name, mark in self.marks.items() if self.every[name].reached(mark, self.now)}

    def _set_soonest(self) -> None:
        """The first mark of each unit: all that an ordinary update has to be compared with."""
        change = self.state.freezer.next_change
        steps = float(self.state.steps if change is None else min(change, self.state.steps))
        self._soonest = {"steps": steps, "epochs": math.inf, "minutes": self.state.most_minutes}
        for name, mark in self.marks.items():
            unit = self.every[name].unit
            self._soonest[unit] = min(self._soonest[unit], mark - 1e-9)

    def end_epoch(self, epoch: int) -> None:
        """The exact means of the epoch's training losses."""
        state = self.state
        means, state.epoch = state.task.training_figures(state.epoch.means()), type(state.epoch)()
        means = {f"train_epoch/{name}": value for name, value in means.items()}
        state.history.add_epoch({"epoch": epoch, "step": state.counters.step, **means})
        self.record.metrics(means)
        self.fabric.call("on_epoch_end", state=state, metrics=means)

    def freeze(self, span: Span) -> None:
        """What the freezing plan does now; it may ask for the best weights back."""
        if advance(self.state, self.record, span, self.metrics):
            if (best := self._best()) is None:
                raise InputError("freeze.advanced.restore_weights: no best.pt, the monitored metric was never finite")
            self.state.load_tensors(shared(self.fabric, lambda: load(best[0])))
            self.measured_at = -1  # not these weights
        self._set_soonest()

    def _best(self) -> Any:
        """The file of the best weights so far and its entry in the index, the same on every rank; or None."""
        found = None
        if self.checkpoints is not None:
            self.checkpoints.wait()
            found = self.checkpoints.best()
        return self.fabric.broadcast(found)

    def evaluate(self, planned: bool = True) -> bool:
        """Measure the raw and the averaged weights; returns whether the monitored metric is the best so far.

        planned: False for one that ``evaluate.every`` does not ask for, where the time is up: nothing that decides
        counts it, so that a run continued with more time is the run that was never stopped.
        """
        state, counters = self.state, self.state.counters
        with state.profiler("evaluate"):
            self.metrics, self.measured_at = measure(state, "val"), counters.window
        state.owes_evaluation = False
        state.tick()
        place = {"step": counters.step, "epoch": self.now.epochs, "window": counters.window}
        state.history.add_evaluation(
            {**place, "samples": counters.samples, "seconds": counters.seconds, **self.metrics}
        )
        self.record.metrics(self.metrics)
        self.record.best()
        self.record.settled()
        for split in dict.fromkeys(name.partition("/")[0] for name in self.metrics):
            self._show(split, counters.step, self.metrics)
        self.fabric.call("on_evaluation_end", state=state, metrics=self.metrics)
        if planned:
            watch(state, self.record, self.metrics)
        monitor = state.config.checkpoint.monitor
        if monitor is None:
            return False
        metric = named(self.metrics, "checkpoint.monitor", monitor)
        best = self.checkpoints is not None and self.checkpoints.is_best(metric)
        return bool(self.fabric.broadcast(best))

    def _show(self, split: str, step: int, metrics: dict[str, float]) -> None:
        """A line of the split's metrics, without their parts, such as val/recall/cat."""
        shown = {name.removeprefix(f"{split}/"): value for name, value in metrics.items()}
        line = " · ".join(f"{name} {value:.4g}" for name, value in shown.items() if "/" not in name)
        self.record.print(f"{split} at step {step} · {line}")

    def finish(self) -> None:
        """After the last update: the best weights in the network where ``early_stopping.restore_best`` or a test split
        asks for them, and the test split measured with them. last.pt keeps the last update's weights."""
        state = self.state
        restores = state.config.early_stopping.restore_best and state.finished
        tests = state.complete and not state.stopped and state.task.dataset("test") is not None
        if not (restores or tests):
            return
        step = state.counters.step
        if (best := self._best()) is not None:
            path, entry = best
            step = entry["step"]
            state.load_weights(shared(self.fabric, lambda: load(path)))
            self.record.print(f"restored the weights of step {step} from {path}; last.pt has the last update's")
            if restores:
                state.restored = self.metrics = entry["metrics"]
        elif restores:
            self.record.print("no best.pt to restore: the monitored metric was never finite")
        if tests:
            self.test(step)

    def test(self, step: int) -> None:
        """Measure the test split with the weights of ``step``, which the network has."""
        state = self.state
        with state.profiler("evaluate"):
            metrics = measure_test(state)
        state.history.add_test({"step": step, **metrics})
        self.record.metrics(metrics)
        self.record.settled()
        self._show("test", step, metrics)

    def save(self, keep: bool = False) -> None:
        """Write a checkpoint in the background, or each rank its shard at once. Raises CheckpointError, in the
        background for the one before."""
        if not self.saves:
            return
        state = self.state
        state.tick()
        self.record.settled()
        self.snapshots.wait()  # a resume from this checkpoint relies on those before it
        tree = state.state_dict()
        weights = {"model": tree["model"], "ema": tree["ema"] or {}, **tree["averages"]}
        learned = {name for name, _ in state.module.named_parameters()}
        check_finite(
            {key: {k: v for k, v in named.items() if k in learned} for key, named in weights.items()}
            | {"optimizer": tree["optimizer"]["state"]}
        )
        counters = tree["counters"] | {"epoch": int(self.now.epochs + 1e-9)}
        metrics = self.metrics if self.measured_at == state.counters.window else {}
        if state.config.checkpoint.sharded:
            path = save_shards(self.checkpoints, tree, counters, metrics, keep)
        elif self.checkpoints is not None:
            path = self.checkpoints.save(tree, counters, metrics, keep)
        else:
            take_part(tree)
        if self.checkpoints is not None:
            self.fabric.call("on_checkpoint_saved", state=state, metrics=metrics, path=path)

    def clean_up(self) -> None:
        """Collect garbage, of what came after the start, and give the device's unused blocks back."""
        device = self.fabric.device
        before = in_use(device)
        gc.collect()
        self.state.memory.release()
        after = in_use(device)
        change = " · ".join(f"{name} {before[name] / 1e9:.2f} -> {after[name] / 1e9:.2f} GB" for name in before)
        self.record.print(f"clean-up at step {self.state.counters.step} · {change}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the last checkpoint is on disk, whatever ended the run; its own error is told, or raised."""
        if self.checkpoints is None:
            return
        try:
            with self.state.profiler("wait for disk"), ExitStack() as both:
                both.callback(self.checkpoints.wait)
                both.callback(self.snapshots.wait)
        except Exception as error:
            if kind is None:
                raise
            self.record.print(str(error))  # beside the exception that is on its way already
