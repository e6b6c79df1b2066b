"""The largest micro-batch that fits: ``--tune batch_size``, and ``batch.micro_batch_size: auto``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy

from fabric_trainer.batch import sizes
from fabric_trainer.errors import InputError, OutOfMemoryRestart
from fabric_trainer.faults import Agree
from fabric_trainer.files import write_atomically
from fabric_trainer.loop import accumulating, backward
from fabric_trainer.memory import Memory, is_out_of_memory
from fabric_trainer.order import Rows, Span
from fabric_trainer.record import Update
from fabric_trainer.state import State
from fabric_trainer.task import Batch
from fabric_trainer.untouched import untouched
from fabric_trainer.window import MicroBatches, Window

START = 32  # rows of the first attempt, where the configuration names none
SPAN = Span(0, 0, 0, 0, False)  # what an attempt's random numbers follow


@dataclass(frozen=True)
class Attempt:
    """pace: samples per second over all ranks, forward to step; 0 where it did not fit."""

    size: int
    fits: bool
    pace: float = 0.0


@dataclass(frozen=True)
class Found:
    """size: the largest of the candidates that fits. attempts: in the order of the search."""

    size: int
    attempts: list[Attempt]


def find_micro_batch_size(state: State, candidates: Sequence[int], note: Path | None = None) -> Found:
    """Try micro-batches of ``candidates`` (rising) rows, each in two whole updates; leaves ``state`` as it was.

    Doubles from the state's own size until one does not fit, then halves what lies between; all ranks take the same
    decisions. Under single and ddp a rank that runs out of memory alone goes on with the others: the updates are not
    synchronised. Elsewhere (sharded weights, SyncBatchNorm) the others wait for it in a collective, so the job ends
    with OutOfMemoryRestart; what is known by then lies in the file ``note``, from where the next job goes on.

    Raises InputError where no candidate fits.
    """
    low, high = _read(note)
    attempts: list[Attempt] = []
    with untouched(state), Agree(state.fabric) as agree:
        state.train()
        for group in state.engine.bare_optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay finite, however often they are stepped

        def fits(size: int) -> bool:
            pace = _attempt(state, size, note, max([low, *(a.size for a in attempts if a.fits)]))
            everywhere = agree(float(pace == 0)).weight == 0
            attempts.append(Attempt(size, everywhere, pace if everywhere else 0.0))
            return everywhere

        size = largest(fits, candidates, state.order.micro_batch_size, low, high)
    if size == 0:
        raise InputError(f"batch.micro_batch_size: not even {candidates[0]} fits on {state.fabric.device}")
    return Found(size, attempts)


def largest(
    fits: Callable[[int], bool], candidates: Iterable[int], start: int, low: int = 0, high: float = float("inf")
) -> int:
    """The largest of the candidates that fits; 0 where none does. low is known to fit, high not to."""
    candidates = list(candidates)
    while between := [size for size in candidates if low < size < high]:
        wanted = max(start, 2 * low) if high == float("inf") else (low + high) / 2
        size = min(between, key=lambda size: abs(size - wanted))
        low, high = (size, high) if fits(size) else (low, size)
    return low


def all_sizes(state: State) -> range:
    """1, 2, … up to what a rank can have of an epoch, at most ``tune.max_batch_size``."""
    return range(1, min(state.config.tune.max_batch_size, -(-state.order.plan.length(0) // state.ranks.size)) + 1)


def sizes_of_same_updates(state: State) -> list[int]:
    """Of these, those that make the updates which the configuration asks for; the smallest always."""
    most = all_sizes(state)[-1]
    return [size for size in sizes(state.config.batch, state.ranks.size) if size <= most]


def _attempt(state: State, size: int, note: Path | None, fitting: int) -> float:
    """Samples per second with micro-batches of this size; 0 where they don't fit on this rank."""
    state.memory = Memory(size, "split")  # no rows to spare: backward takes them all
    try:
        batch = _micro_batch(state, size)
        _update(state, batch)  # the first makes the optimizer's moments: the second has to fit beside them
        began = _now(state)
        samples = _update(state, batch)
        return samples / (_now(state) - began)
    except RuntimeError as error:
        if not is_out_of_memory(error) or size == 1:
            raise
        if not _recovers(state):
            _restart(size, note, fitting, error)
    # the attempt's tensors went with the error
    state.engine.drop_gradients()
    state.memory.release()
    return 0.0


def _update(state: State, batch: Batch) -> int:
    """One update of that micro-batch, twice where the run's updates have several; returns the samples of all ranks."""
    counts = [state.accumulate] if isinstance(state.accumulate, int) else next(iter(state.accumulate.values())).values()
    several = state.order.micro_batch_size * max(counts) > len(batch["index"])
    micro_batches = [dict(batch) for _ in range(1 + several)]
    weight = sum(float(state.task.weight(one)) for one in micro_batches)
    update = Update(Window(SPAN, micro_batches, weight), weight * state.ranks.size)
    state.guard.before_forward()
    with accumulating(state.fabric, state.network, _recovers(state)):
        backward(state, update)
        if state.sam is not None:
            with state.sam.uphill():
                backward(state, update)
    state.guard.step(state.engine.clip())
    state.guard.settle()
    state.engine.drop_gradients()
    return sum(len(one["index"]) for one in micro_batches) * state.ranks.size


def _micro_batch(state: State, size: int) -> Batch:
    """The first rows that this rank has of the plan, all real, from the start again where it has no more."""
    plan, first = state.order.plan(0), state.ranks.rank * size
    index = np.take(plan, np.arange(first, first + size), mode="wrap")
    rows = Rows(0, index, np.ones(size, np.float32))
    return MicroBatches(state.task, state.train_set, state.config.seed, training=True)[rows]


def _recovers(state: State) -> bool:
    """Whether a rank that ran out of memory can go on, with no other waiting for it."""
    whole = isinstance(state.fabric.strategy, (SingleDeviceStrategy, DDPStrategy))
    norms = any(isinstance(module, torch.nn.SyncBatchNorm) for module in state.network.modules())
    return whole and (state.fabric.world_size == 1 or not norms)


def _restart(size: int, note: Path | None, fitting: int, error: RuntimeError) -> None:
    if note is not None:
        write_atomically(note, json.dumps({"fits": fitting, "does_not_fit": size}))
    raise OutOfMemoryRestart(
        f"micro-batches of {size} do not fit ({str(error).splitlines()[0]}); the search goes on with the same command "
        "again, or for a run with --resume auto"
    ) from error


def _read(note: Path | None) -> tuple[int, float]:
    """What a job before this one has found out: a size that fits, and one that does not."""
    known = json.loads(note.read_text()) if note is not None and note.is_file() else {}
    return known.get("fits", 0), known.get("does_not_fit", float("inf"))


def _now(state: State) -> float:
    if state.fabric.device.type == "cuda":
        torch.cuda.synchronize(state.fabric.device)
    return time.perf_counter()
