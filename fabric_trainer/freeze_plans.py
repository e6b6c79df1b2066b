"""The freezing strategies that measure nothing of the frozen units; ``docs/freezing.md`` tells how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from math import isfinite

from fabric_trainer.config import (
    AdaptiveFreezeConfig,
    EarlyGradualFreezeConfig,
    FixedFreezeConfig,
    FreezeConfig,
    ProgressiveFreezeConfig,
)
from fabric_trainer.errors import InputError
from fabric_trainer.freeze_guided import Advanced, GradientGuided
from fabric_trainer.freeze_machine import Action, Plan, Probe, Reading, Unit, Warmup

__all__ = ["Action", "Plan", "Probe", "Reading", "Schedule", "Unit", "Warmup", "make_plan"]


def make_plan(config: FreezeConfig, units: Sequence[Unit]) -> Plan:
    """The machine of ``freeze.strategy`` over ``units``, which are in the order of unfreezing.

    Raises InputError where a pattern of ``freeze.schedule`` fits no unit.
    """
    if config.strategy == "fixed":
        return Fixed(config.fixed, units)
    if config.strategy == "schedule":
        return Schedule(config.schedule, units)
    if config.strategy == "adaptive":
        return Adaptive(config.adaptive, units)
    if config.strategy == "progressive":
        return Progressive(config.progressive, units)
    if config.strategy == "early_gradual":
        return EarlyGradual(config.early_gradual, units)
    if config.strategy == "gradient_guided":
        return GradientGuided(config.gradient_guided, units)
    if config.strategy == "advanced":
        return Advanced(config.advanced, units)
    return Nothing()


class Nothing(Plan):
    """Everything trains."""

    strategy = "none"

    def __init__(self) -> None:
        super().__init__(())


class Fixed(Plan):
    """Everything frozen, for good, or until ``phase1_epochs`` are over: two-phase gradual fine-tuning."""

    def __init__(self, config: FixedFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        phase1 = self.config.phase1_epochs
        if phase1 is None or epoch + 1 < phase1 or self.unfrozen:
            return Action()
        return self.release(self.next_frozen(self.config.unfreeze), f"phase 2, after {phase1} epochs")


class Schedule(Plan):
    """The frozen set as a function of the step; no machine, and no state.

    schedule: {step: patterns of the units that train from there on}. changes: the steps at which the set becomes
    another one.
    """

    strategy = "schedule"

    def __init__(self, schedule: dict[int, list[str]], units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.sets = {step: self._frozen(step, schedule[step]) for step in sorted(schedule)}
        steps = list(self.sets)
        self.changes = tuple(step for before, step in pairwise(steps) if self.sets[step] != self.sets[before])

    def _frozen(self, step: int, patterns: list[str]) -> frozenset[str]:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.units):
                raise InputError(f"freeze.schedule {step}: no unit fits {pattern}; there are {', '.join(self.units)}")
        return frozenset(name for name in self.units if not any(fnmatchcase(name, p) for p in patterns))

    def frozen_at(self, step: int) -> frozenset[str]:
        """The units that are frozen in the update that follows ``step`` applied ones."""
        return self.sets[max(start for start in self.sets if start <= step)]

    @property
    def frozen(self) -> frozenset[str]:
        """Those at the start of the run; ``frozen_at`` knows the others."""
        return self.frozen_at(0)

    def share(self, unit: str) -> float:
        return 1.0


class Adaptive(Plan):
    """The next unit whenever the metric has not improved for ``patience`` evaluated epochs."""

    strategy, follows_metric, carried = "adaptive", True, ("best", "bad")

    def __init__(self, config: AdaptiveFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config
        self.best: float | None = None
        self.bad = 0

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        if metric is None:
            return Action()
        if isfinite(metric) and (self.best is None or metric - self.best > self.config.min_improvement):
            self.best, self.bad = metric, 0
            return Action()
        self.bad += 1
        if self.bad < self.config.patience or not self.frozen:
            return Action()
        self.bad = 0
        return self.release(self.next_frozen(1), f"no improvement for {self.config.patience} epochs")


class Progressive(Plan):
    """The next unit every ``interval`` epochs."""

    strategy = "progressive"

    def __init__(self, config: ProgressiveFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        limit = len(self.units) if self.config.limit is None else self.config.limit
        if (epoch + 1) % self.config.interval or len(self.unfrozen) >= limit:
            return Action()
        return self.release(self.next_frozen(1), f"after {epoch + 1} epochs")


class EarlyGradual(Plan):
    """A few units every epoch from early on, until the ``target`` share of all units' parameters trains."""

    strategy = "early_gradual"

    def __init__(self, config: EarlyGradualFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config
        self.total = sum(unit.parameters for unit in units)

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        if epoch < self.config.from_epoch or self._trained() >= self.config.target * self.total:
            return Action()
        return self.release(self.next_frozen(self.config.per_epoch), f"towards {self.config.target:.0%} of parameters")

    def _trained(self) -> int:
        return sum(self.units[name].parameters for name in self.unfrozen)
