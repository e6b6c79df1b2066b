"""How many samples an update sees: from the ``batch`` section, and over a resume on another number of ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fabric_trainer.config import BatchConfig
from fabric_trainer.errors import InputError
from fabric_trainer.order import Accumulate


def micro_batch_size(batch: BatchConfig) -> int:
    """Rows of a forward. Raises InputError for ``auto``: who trains has it found first, as ``jobs.train`` does."""
    if batch.micro_batch_size == "auto":
        raise InputError("batch.micro_batch_size: auto is found by train.py; from Python, give a number")
    return batch.micro_batch_size


def resolve_accumulate(batch: BatchConfig, world_size: int) -> Accumulate:
    """``batch.accumulate``, or what follows from ``batch.global_batch_size``. Raises InputError."""
    if batch.global_batch_size is None:
        return batch.accumulate
    if batch.accumulate != 1:
        raise InputError("batch.accumulate and batch.global_batch_size are both set: one follows from the other")
    return divided(batch.global_batch_size, micro_batch_size(batch), world_size, "batch.global_batch_size")


def divided(global_batch_size: int, size: int, world_size: int, what: str) -> int:
    """The accumulation that makes ``global_batch_size``. Raises InputError, with the nearest that would do."""
    step = size * world_size
    count, rest = divmod(global_batch_size, step)
    if rest or not count:
        near = " or ".join(str(step * k) for k in (count, count + 1) if k)
        raise InputError(
            f"{what} of {global_batch_size} does not divide into micro-batches of {size} on "
            f"{world_size} rank{'s' * (world_size > 1)}; the nearest that do: {near}"
        )
    return count


def rows_per_rank(batch: BatchConfig, world_size: int) -> int:
    """A rank's rows of an update; where updates differ, the largest number that divides those of each. Raises
    InputError."""
    if batch.global_batch_size is not None:
        return divided(batch.global_batch_size, 1, world_size, "batch.global_batch_size")
    rows = _effective(batch.accumulate, micro_batch_size(batch))
    return rows if isinstance(rows, int) else math.gcd(*(count for steps in rows.values() for count in steps.values()))


def sizes(batch: BatchConfig, world_size: int) -> list[int]:
    """The micro-batches, rising, that make the same updates. Raises InputError."""
    rows = rows_per_rank(batch, world_size)
    return [size for size in range(1, rows + 1) if rows % size == 0]


def with_micro_batches(batch: BatchConfig, world_size: int, most: int) -> BatchConfig:
    """The same updates of the largest micro-batches that have at most ``most`` rows. Raises InputError."""
    size = max(size for size in sizes(batch, world_size) if size <= max(1, most))
    if batch.global_batch_size is not None:
        return replace(batch, micro_batch_size=size)
    rows = _effective(batch.accumulate, micro_batch_size(batch))
    if isinstance(rows, int):
        return BatchConfig(size, rows // size)
    return BatchConfig(size, {clock: {at: n // size for at, n in steps.items()} for clock, steps in rows.items()})


def rescaled(saved: dict[str, Any], batch: BatchConfig, world_size: int, given: bool) -> Accumulate:
    """The accumulation with which this world keeps the effective batch of every entry of a saved run.

    saved: {"micro_batch_size", "accumulate", "world_size"}; given: the command itself sets a ``batch.*`` key, which
    must then make the saved batch by itself. Raises InputError where the batch would change or does not divide.
    """
    old = _effective(saved["accumulate"], saved["micro_batch_size"] * saved["world_size"])
    micro = micro_batch_size(batch)
    here = _effective(resolve_accumulate(batch, world_size), micro * world_size)
    there = batch.global_batch_size or _effective(batch.accumulate, micro * saved["world_size"])
    if here != old and (given or there != old):
        raise InputError(f"batch.*: the run has an effective batch of {old}, this makes {here}; a resume keeps it")
    if isinstance(old, int):
        return divided(old, micro, world_size, "the run's effective batch")
    ((clock, steps),) = old.items()
    return {clock: {k: divided(v, micro, world_size, "the run's effective batch") for k, v in steps.items()}}


def _effective(accumulate: Accumulate, factor: int) -> Accumulate:
    if isinstance(accumulate, int):
        return accumulate * factor
    return {clock: {k: v * factor for k, v in steps.items()} for clock, steps in accumulate.items()}
