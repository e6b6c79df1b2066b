"""The order of an epoch over several tasks, whose samples lie one task after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fabric_trainer.errors import InputError
from fabric_trainer.order import Plan, Shuffled

STRATEGIES = ("proportional", "balanced")


def check(strategy: str) -> None:
    """Raise InputError for one that there is none of."""
    if strategy not in STRATEGIES:
        raise InputError(f"task.args.sampling: {strategy!r} is none of {', '.join(STRATEGIES)}")


def plan(strategy: str, sizes: Sequence[int], seed: int) -> Plan:
    """``proportional``: every sample once an epoch, all tasks mixed. ``balanced``: see ``Balanced``. sizes: samples of
    each task, in the dataset's order. Raises InputError for another strategy."""
    check(strategy)
    return Balanced(sizes, seed) if strategy == "balanced" else Shuffled(sum(sizes), seed)


class Balanced:
    """As many samples of every task, drawn from (seed, epoch).

    An epoch has (number of tasks) x (samples of the largest) entries, in rounds of one sample of each task in an order
    of its own. The largest task's samples come once; a smaller one's come again in fresh permutations, each as often
    as the others within 1. Wherever the epoch is cut off, tasks have come equally often within 1; any stretch of whole
    rounds holds as many of each.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every task needs a sample, not {list(sizes)}")
        self.sizes, self.seed = list(sizes), seed

    def length(self, epoch: int) -> int:
        return len(self.sizes) * max(self.sizes)

    def __call__(self, epoch: int) -> np.ndarray:
        rounds = np.empty((max(self.sizes), len(self.sizes)), np.int64)
        first = 0
        for task, size in enumerate(self.sizes):
            random = np.random.default_rng((self.seed, epoch, task))
            passes = -(-len(rounds) // size)
            places = random.permuted(np.tile(np.arange(size), (passes, 1)), axis=1)  # each row anew
            rounds[:, task] = first + places.ravel()[: len(rounds)]
            first += size
        return np.random.default_rng((self.seed, epoch, len(self.sizes))).permuted(rounds, axis=1).ravel()
