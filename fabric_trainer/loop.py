"""The training loop, top to bottom."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from fabric_trainer.boundary import Boundary
from fabric_trainer.config import Config
from fabric_trainer.errors import BadGradientError
from fabric_trainer.faults import Agree, StopSignals, Verdict
from fabric_trainer.profiler import profiling
from fabric_trainer.random import seed_torch
from fabric_trainer.record import Record, Update
from fabric_trainer.state import State
from fabric_trainer.task import Task
from fabric_trainer.window import EMPTY, windows


def fit(
    fabric: Fabric,
    task: Task,
    config: Config,
    folder: Path | None = None,
    saved: dict[str, Any] | None = None,
    state: State | None = None,
    signals: StopSignals | None = None,
) -> State:
    """Train ``task`` as ``config`` says and return the final state.

    fabric: launched. folder: where metrics, history and checkpoints go; None writes nothing. saved: a checkpoint's
    dict (``checkpoint.load``) to continue from. state: one made beforehand, instead of ``saved``. signals: for a caller
    who asks afterwards which came.

    A stop request (SIGTERM, SIGUSR1, SIGINT) ends the run after the update under way, saved; ``state.stopped`` is
    then the exit code to leave with. Raises InputError for what the user can mend, BadGradientError past the budget,
    CheckpointError where saving fails; an exception of the task's goes through.
    """
    state = state or State(fabric, task, config, saved)
    counters, memory, compilation, device = state.counters, state.memory, state.compilation, fabric.device
    memory.folder = folder
    with (
        _frozen_collector(),
        profiling(state, folder) as profiler,
        Agree(fabric) as agree,
        signals or StopSignals() as signals,
        Record(state, folder) as record,
        Boundary(state, record, folder) as boundary,
    ):
        stream = windows(
            task,
            state.train_set,
            state.order,
            config.seed,
            range(counters.window, state.windows),
            config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
        state.train()
        with profiler("data"):
            window = next(stream, EMPTY)
        agree.ask(window.weight)
        while not state.finished and not state.stopped:
            # the micro-batches of one update, and what all ranks know of it
            with profiler("agree"):
                weight, state.stopped, minutes, memory.halvings, compilation.failed = agree.answer(signals.stop)
            profiler.next_update()
            update = Update(window, weight)

            if weight > 0:
                with profiler("gradients"):
                    compute_gradients(state, record, update)

            # the next one's, prepared and agreed on while the device is busy with these
            with profiler("data"):
                window = next(stream, EMPTY)
            agree.ask(window.weight, signals.stop, state.tick(), memory.halvings, bool(compilation.failure))

            if weight > 0:
                # one step; what became of the one before is known by now, so the step counter is exact
                with profiler("clip"):
                    update.norm, update.part_norms = state.engine.clip(), state.engine.part_norms
                settle(state, record)
                record.gradients()
                update.rates = state.set_learning_rate()
                with profiler("step"):
                    state.guard.step(update.norm)
                    if state.lookahead:
                        state.lookahead.update(counters.step + 1, state.guard.left_out)
                state.leave_open(update)
                state.engine.drop_gradients()
            else:
                counters.empty += 1

            # log, evaluate and save where that is due
            counters.window += 1
            if boundary.due(update.window.span, minutes):
                settle(state, record)
                boundary.act(update.window.span)
            fabric.call("on_update_end", state=state, metrics=boundary.metrics)
        compilation.retreat(record.print)  # from what failed in the last evaluation: to be told
        boundary.finish()
    fabric.barrier()
    fabric.call("on_fit_end", state=state, metrics=boundary.metrics)
    return state


def compute_gradients(state: State, record: Record, update: Update) -> None:
    """The gradient of the mean over the window; under SAM that at the worst point nearby, for the same losses."""
    state.guard.before_forward()
    differentiate(state, record, update)
    if state.sam is not None:
        with state.sam.uphill():
            differentiate(state, record, Update(update.window, update.weight))


def differentiate(state: State, record: Record, update: Update) -> None:
    """The gradient at the present weights: in smaller pieces where the micro-batches don't fit, in eager where a
    compiler fails."""
    memory, compilation = state.memory, state.compilation
    compilation.begin(record.print)
    while not update.complete:
        try:
            backward(state, update)
        except RuntimeError as error:
            memory.ran_out(error)
            record.tell(f"window {update.window.span.window}: out of memory, now {memory.rows} rows a forward")
        else:
            update.complete = compilation.holds(record.print)
        if not update.complete:  # forget this attempt, whose tensors went with the error
            update.sums.clear()
            state.engine.drop_gradients()
            state.guard.undo_forward()
            memory.release()
    state.engine.reduce_gradients()


def backward(state: State, update: Update) -> None:
    """Forward and backward of this rank's micro-batches; gradients are exchanged with the last."""
    fabric, network, window, ranks = state.fabric, state.network, update.window, state.ranks
    seed_torch(fabric.device, state.config.seed, window.span.window, ranks.rank)
    for batch, last in window.on(fabric.device, state.memory.rows):
        with accumulating(fabric, network, not last):
            with state.profiler("forward"):
                loss = state.task.loss(network, batch)
            with state.profiler("backward"):
                fabric.backward(loss.total / (update.weight / ranks.size), model=network)
        update.add(loss)


def settle(state: State, record: Record) -> None:
    """Count the last update and average its weights, now that it is known to be applied; or leave it out."""
    with state.profiler("settle"):
        verdict = state.guard.settle()
    if verdict is None:
        return
    update, counters = state.open, state.counters
    if verdict.applied:
        counters.step += 1
        counters.samples += update.window.span.samples
        update.step, update.samples = counters.step, counters.samples
        if state.ema is not None:
            with state.profiler("ema"):
                state.ema.update(counters.step)
        record.add(update)
        return
    leave_out(state, record, verdict)


def leave_out(state: State, record: Record, verdict: Verdict) -> None:
    """Count an update that was not applied, and say so. Raises BadGradientError past the budget."""
    counters, config, scaled = state.counters, state.config.faults, state.engine.scaler is not None
    spike = math.isfinite(verdict.norm)
    counters.skipped += 1
    counters.spikes += spike
    if scaled and not spike:  # lowers its scale and goes on: no sign of trouble
        return
    window, count = state.open.window.span.window, counters.spikes if scaled else counters.skipped
    why = f"gradient norm {verdict.norm}" + f", the limit is {verdict.limit:.4g}" * spike
    record.print(f"window {window}: {why}, update left out ({count} of {config.budget})")
    if count > config.budget:
        spikes = " or a spike" * (config.spike is not None)
        raise BadGradientError(
            f"{count} updates had a gradient that was not finite{spikes}, the last in window {window}; "
            f"faults.budget allows {config.budget}"
        )


def accumulating(fabric: Fabric, network: Any, more: bool) -> AbstractContextManager[None]:
    """Inside, gradients are not exchanged between ranks while ``more`` micro-batches follow.

    Entered only then: under FSDP2 Fabric's context, entered with enabled=False, leaves the exchange switched off.
    """
    return fabric.no_backward_sync(network) if more else nullcontext()


@contextmanager
def _frozen_collector() -> Iterator[None]:
    """Keep the garbage collector off what is there already: modules and data, which it would walk again and again.

    A caller that has done so is left alone: its own freeze would be undone at the end."""
    gc.collect()
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
