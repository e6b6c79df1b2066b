"""Which sample comes when, and how much per window: pure functions of (seed, epoch, window).

An epoch is an index array; an update cuts a *window* off it; a rank takes its slice of the window. Nothing here
depends on what was drawn before, so resuming in the middle of an epoch is arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

Accumulate = int | dict[str, dict[int, int]]
Limit = int | float | None


class Plan(Protocol):
    """The order of an epoch: an index array that may repeat and leave out samples."""

    def length(self, epoch: int) -> int:
        """How many entries the epoch has; known for every epoch before the run, so that schedules can use it."""
        ...

    def __call__(self, epoch: int) -> np.ndarray:
        """The epoch's dataset indices: int64 (length(epoch),)."""
        ...


class Shuffled:
    """Every sample once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def length(self, epoch: int) -> int:
        return self.samples

    def __call__(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.samples)


class Sequential:
    """Every sample once, in the dataset's order."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def length(self, epoch: int) -> int:
        return self.samples

    def __call__(self, epoch: int) -> np.ndarray:
        return np.arange(self.samples)


class First:
    """The first ``samples`` entries of a plan's epoch 0, the same in every epoch."""

    def __init__(self, plan: Plan, samples: int) -> None:
        self.plan, self.samples = plan, samples

    def length(self, epoch: int) -> int:
        return self.samples

    def __call__(self, epoch: int) -> np.ndarray:
        return self.plan(0)[: self.samples]


@dataclass(frozen=True, slots=True)
class Span:
    """Where a window lies: entries ``start:stop`` of the plan of ``epoch``."""

    window: int
    epoch: int
    start: int
    stop: int
    last: bool  # the last window of its epoch

    @property
    def samples(self) -> int:
        """Samples of the window over all ranks, padding left out."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one micro-batch of one rank: dataset indices, and 1 for a sample or 0 for a row that only pads."""

    epoch: int
    index: np.ndarray  # int64 (B,)
    weight: np.ndarray  # float32 (B,)


def accumulation(accumulate: Accumulate, window: int, epoch: int) -> int:
    """Micro-batches per rank in this window. ``{"window": {0: 8, 500: 4}}`` means 8 until window 500, then 4."""
    if isinstance(accumulate, int):
        return accumulate
    ((clock, steps),) = accumulate.items()
    now = window if clock == "window" else epoch
    return steps[max(start for start in steps if start <= now)]


def limited(limit: Limit, batches: int) -> int:
    """How many of ``batches`` a limit leaves: a count (int) at most so many, a share (float) that part, rounded down,
    but at least one."""
    if isinstance(limit, float):
        return max(1, int(limit * batches + 1e-9))  # 0.29 x 100 is 28.999…
    return batches if limit is None else min(limit, batches)


def check_accumulate(accumulate: Any) -> None:
    """Raise ValueError, with what would be right, unless ``accumulate`` is one of its three forms."""
    if _whole(accumulate, 1):
        return
    right = "an int >= 1, {window: {0: 8, 500: 4}} or {epoch: {0: 8, 5: 4}}"
    if not isinstance(accumulate, dict) or set(accumulate) not in ({"window"}, {"epoch"}):
        raise ValueError(f"batch.accumulate must be {right}, not {accumulate}")
    (steps,) = accumulate.values()
    whole = isinstance(steps, dict) and all(_whole(k, 0) and _whole(v, 1) for k, v in steps.items())
    if not whole or 0 not in steps:
        raise ValueError(f"batch.accumulate must be {right}, starting at 0, not {accumulate}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Order:
    """Cuts the epochs of a plan into windows, and windows into the micro-batches of each rank.

    micro_batch_size: rows per rank and forward. accumulate: micro-batches per rank and window. world_size and rank
    are those of the data-parallel group. A window takes micro_batch_size x accumulate x world_size entries of the
    plan, the last of an epoch what is left: nothing is dropped and nothing comes twice. limit: an epoch ends after so
    many of its windows, or that share of them, which are those that the whole epoch begins with.
    """

    def __init__(
        self,
        plan: Plan,
        micro_batch_size: int,
        accumulate: Accumulate = 1,
        world_size: int = 1,
        rank: int = 0,
        limit: Limit = None,
    ) -> None:
        check_accumulate(accumulate)
        self.plan, self.accumulate, self.limit = plan, accumulate, limit
        self.micro_batch_size, self.world_size, self.rank = micro_batch_size, world_size, rank
        self._first_windows = [0]  # first window of epoch 0, 1, …; grows as asked
        # one epoch's cuts and indices are kept: windows are asked for in order
        self._cuts = lru_cache(maxsize=2)(self._compute_cuts)
        self._indices = lru_cache(maxsize=2)(plan.__call__)

    def effective_batch_size(self, window: int, epoch: int) -> int:
        """Samples of a full window, over all ranks."""
        return self.micro_batch_size * accumulation(self.accumulate, window, epoch) * self.world_size

    def length(self, epoch: int) -> int:
        """Entries of the plan that the epoch's windows take: all of them, unless there is a limit."""
        return int(self._cuts(epoch)[-1])

    def first_window(self, epoch: int) -> int:
        """The number of the first window of ``epoch``, which is how many windows the epochs before it have."""
        while len(self._first_windows) <= epoch:
            last = len(self._first_windows) - 1
            self._first_windows.append(self._first_windows[last] + len(self._cuts(last)) - 1)
        return self._first_windows[epoch]

    def span(self, window: int) -> Span:
        """Where window number ``window`` lies."""
        while self._first_windows[-1] <= window:
            self.first_window(len(self._first_windows))
        epoch = bisect_right(self._first_windows, window) - 1
        cuts = self._cuts(epoch)
        place = window - self._first_windows[epoch]
        return Span(window, epoch, int(cuts[place]), int(cuts[place + 1]), place == len(cuts) - 2)

    def micro_batches(self, span: Span) -> list[Rows]:
        """This rank's micro-batches of a window. Every rank gets as many, of the same sizes: short ranks are padded
        with rows of weight 0, at most world_size - 1 of them in all."""
        rows = -(-span.samples // self.world_size)
        start = span.start + self.rank * rows
        index = self._indices(span.epoch)[start : min(start + rows, span.stop)]
        weight = np.ones(rows, np.float32)
        if len(index) < rows:
            weight[len(index) :] = 0
            filler = self._indices(span.epoch)[span.start]
            index = np.concatenate([index, np.full(rows - len(index), filler)])
        size = self.micro_batch_size
        return [Rows(span.epoch, index[i : i + size], weight[i : i + size]) for i in range(0, rows, size)]

    def micro_batch_count(self, span: Span) -> int:
        """How many micro-batches ``micro_batches(span)`` has: the same on every rank."""
        rows = -(-span.samples // self.world_size)
        return -(-rows // self.micro_batch_size)

    def _compute_cuts(self, epoch: int) -> np.ndarray:
        """Where the epoch's windows start and end: int64 (windows + 1,), from 0 to the length, or the limit."""
        length = self.plan.length(epoch)
        if length < 1:
            raise ValueError(f"epoch {epoch} has no samples: there is nothing to train on")
        window, position, pieces = self.first_window(epoch), 0, []
        by_window = isinstance(self.accumulate, dict) and "window" in self.accumulate
        changes = sorted(self.accumulate["window"]) if by_window else []  # type: ignore[index]
        while position < length:  # one round for each accumulation that the epoch sees
            size = self.effective_batch_size(window, epoch)
            until = min((c for c in changes if c > window), default=None)
            stop = length if until is None else min(length, position + (until - window) * size)
            pieces.append(np.arange(position, stop, size))
            window += len(pieces[-1])
            position = stop
        cuts = np.concatenate([*pieces, [length]])
        return cuts[: limited(self.limit, len(cuts) - 1) + 1]
