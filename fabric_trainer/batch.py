"""How many samples an update sees: from the ``batch`` section, and over a resume on another number of ranks."""

from __future__ import annotations

from typing import Any

from fabric_trainer.config import BatchConfig
from fabric_trainer.errors import InputError
from fabric_trainer.order import Accumulate


def resolve_accumulate(batch: BatchConfig, world_size: int) -> Accumulate:
    """``batch.accumulate``, or what follows from ``batch.global_batch_size``. Raises InputError."""
    if batch.global_batch_size is None:
        return batch.accumulate
    if batch.accumulate != 1:
        raise InputError("batch.accumulate and batch.global_batch_size are both set: one follows from the other")
    return divided(batch.global_batch_size, batch.micro_batch_size, world_size, "batch.global_batch_size")


def divided(global_batch_size: int, micro_batch_size: int, world_size: int, what: str) -> int:
    """The accumulation that makes ``global_batch_size``. Raises InputError, with the nearest that would do."""
    step = micro_batch_size * world_size
    count, rest = divmod(global_batch_size, step)
    if rest or not count:
        near = " or ".join(str(step * k) for k in (count, count + 1) if k)
        raise InputError(
            f"{what} of {global_batch_size} does not divide into micro-batches of {micro_batch_size} on "
            f"{world_size} rank{'s' * (world_size > 1)}; the nearest that do: {near}"
        )
    return count


def rescaled(saved: dict[str, Any], batch: BatchConfig, world_size: int, given: bool) -> Accumulate:
    """The accumulation with which this world keeps the effective batch of every entry of a saved run.

    saved: {"micro_batch_size", "accumulate", "world_size"}; given: the command itself sets a ``batch.*`` key, which
    must then make the saved batch by itself. Raises InputError where the batch would change or does not divide.
    """
    old = _effective(saved["accumulate"], saved["micro_batch_size"] * saved["world_size"])
    micro = batch.micro_batch_size
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
