"""The training loop, top to bottom."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from fabric_trainer.boundary import Boundary
from fabric_trainer.clip import clip_gradients
from fabric_trainer.config import Config
from fabric_trainer.errors import BadGradientError
from fabric_trainer.faults import Agree, StopSignals
from fabric_trainer.random import seed_torch
from fabric_trainer.record import Record, Update
from fabric_trainer.state import State
from fabric_trainer.task import Task
from fabric_trainer.window import windows


def fit(
    fabric: Fabric,
    task: Task,
    config: Config,
    folder: Path | None = None,
    saved: dict[str, Any] | None = None,
    state: State | None = None,
) -> State:
    """Train ``task`` as ``config`` says and return the final state.

    fabric: launched. folder: where metrics, history and checkpoints go; None writes nothing. saved: a checkpoint's
    dict (``checkpoint.load``) to continue from. state: one made beforehand, instead of ``saved``.

    A stop request (SIGTERM, SIGUSR1, SIGINT) ends the run after the update under way, saved; ``state.stopped`` is
    then the exit code to leave with. Raises InputError for what the user can mend, BadGradientError past the budget,
    CheckpointError where saving fails; an exception of the task's goes through.
    """
    state = state or State(fabric, task, config, saved)
    network, counters, device = state.network, state.counters, fabric.device
    trainable, clip = state.trainable, config.clip
    agree = Agree(fabric)
    with (
        _frozen_collector(),
        StopSignals() as signals,
        Record(state, folder) as record,
        Boundary(state, record, folder) as boundary,
    ):
        stream = windows(
            task,
            state.train_set,
            state.order,
            config.seed,
            counters.window,
            config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
        network.train()
        while not state.finished and not state.stopped:
            # the micro-batches of one update, and what all ranks know of it
            window = next(stream)
            weight, state.stopped, minutes = agree(window.weight, signals.stop, state.tick())
            update = Update(window, weight)

            if weight > 0:
                # forward and backward: the gradient of the mean over the whole window
                seed_torch(device, config.seed, window.span.window, fabric.global_rank)
                state.guard.before_forward()
                for batch, last in window.on(device):
                    with accumulating(fabric, network, not last):
                        loss = task.loss(network, batch)
                        fabric.backward(loss.total / (weight / fabric.world_size))
                    update.add(loss)

                # one step; what became of the one before is known by now, so the step counter is exact
                if state.scaler is not None:
                    fabric.strategy.precision.unscale_gradients(state.bare_optimizer)
                update.norm = clip_gradients(trainable, clip.norm, clip.value, clip.p)
                settle(state, record)
                update.rates = state.set_learning_rate()
                state.guard.step(update.norm)
                state.open = update
                for parameter in trainable:
                    parameter.grad = None
            else:
                counters.empty += 1

            # log, evaluate and save where that is due
            counters.window += 1
            if boundary.due(window.span, minutes):
                settle(state, record)
                boundary.act(window.span)
            fabric.call("on_update_end", state=state, metrics=boundary.metrics)
    fabric.barrier()
    fabric.call("on_fit_end", state=state, metrics=boundary.metrics)
    return state


def settle(state: State, record: Record) -> None:
    """Count the last update and average its weights, now that it is known to be applied; or leave it out."""
    verdict = state.guard.settle()
    if verdict is None:
        return
    update, counters = state.open, state.counters
    if verdict.applied:
        counters.step += 1
        counters.samples += update.window.span.samples
        update.step, update.samples = counters.step, counters.samples
        if state.ema is not None:
            state.ema.update(counters.step)
        record.add(update)
        return
    counters.skipped += 1
    window, budget = update.window.span.window, state.config.faults.budget
    if state.scaler is not None:  # lowers its scale and goes on: no sign of trouble
        return
    record.print(f"window {window}: gradient norm {verdict.norm}, update left out ({counters.skipped} of {budget})")
    if counters.skipped > budget:
        raise BadGradientError(
            f"{counters.skipped} updates had a gradient that was not finite, the last in window {window}; "
            f"faults.budget allows {budget}"
        )


def accumulating(fabric: Fabric, network: Any, more: bool) -> AbstractContextManager[None]:
    """Inside, gradients are not exchanged between ranks while ``more`` micro-batches follow.

    Entered only then: under FSDP2 Fabric's context, entered with enabled=False, leaves the exchange switched off.
    """
    return fabric.no_backward_sync(network) if more else nullcontext()


@contextmanager
def _frozen_collector() -> Iterator[None]:
    """Keep the garbage collector off what is there already: modules and data, which it would walk again and again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
