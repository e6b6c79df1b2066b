"""The keys of ``freeze``, and of each strategy of freezing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class FixedFreezeConfig:
    """fixed: the units stay frozen, for good or for a first phase."""

    phase1_epochs: int | None = None
    """Epochs after which the second phase begins; null: the units stay frozen for the whole run."""
    unfreeze: int = 3
    """How many units the second phase trains, the first in order."""


@dataclass
class AdaptiveFreezeConfig:
    """adaptive: unfreezes the next unit when the monitored metric stands still."""

    patience: int = 2
    """Evaluated epochs without improvement before the next unit is unfrozen."""
    min_improvement: float = 0.005
    """What the metric must gain on its best to count as improved, in its own units."""


@dataclass
class ProgressiveFreezeConfig:
    """progressive: unfreezes the next unit at fixed intervals."""

    interval: int = 5
    """Epochs between two units; the first comes after as many."""
    limit: int | None = None
    """How many units it unfreezes at most; null: all."""


@dataclass
class EarlyGradualFreezeConfig:
    """early_gradual: unfreezes units every epoch until a share of the parameters trains."""

    from_epoch: int = 1
    """The first epoch, counted from 0, at whose end units are unfrozen."""
    per_epoch: int = 1
    """How many units at the end of each epoch."""
    target: float = 0.5
    """The share of all units' parameters at which it stops."""


@dataclass
class GradientGuidedFreezeConfig:
    """gradient_guided: unfreezes the units with the largest gradients, measured on probe batches."""

    threshold: float = 0.01
    """What a unit's mean absolute gradient must exceed."""
    sampling_epochs: int = 2
    """Epochs at the start that only measure."""
    patience: int = 2
    """Epochs that pass, after those and after each unfreezing, before units are unfrozen."""
    per_epoch: int = 1
    """The most units unfrozen at once, the largest gradients first."""
    warmup_epochs: int = 3
    """Epochs over which an unfrozen unit's rate rises from a tenth to the whole."""
    probes: int = 4
    """Probe batches an epoch while units are frozen: each costs a forward and a backward."""


@dataclass
class AdvancedFreezeConfig:
    """advanced: unfreezes by a score of gradients, activations and neighbours; rolls back where the metric falls."""

    threshold: float = 0.002
    """Base of what a unit's score must exceed; falls over the epochs to a half, rises with depth."""
    momentum: float = 0.9
    """Of the running mean of gradient importance over probe batches."""
    dependencies: bool = True
    """Unfrozen units raise the score of those they build on."""
    analysis_window: int = 2
    """The first epoch, counted from 0, at whose end a score may unfreeze a unit."""
    patience: int = 2
    """Epochs that pass at the start and after each unfreezing or rollback before units are unfrozen."""
    per_epoch: int = 1
    """The most units unfrozen at once, the highest scores first."""
    warmup_epochs: int = 3
    """Of a unit of no known kind; blocks take one epoch less, at least 2, and convolutions one more."""
    probes: int = 4
    """Probe batches an epoch while units are frozen: each costs a forward and a backward."""
    rollback_patience: int | None = 2
    """Evaluations in a row, each worse than the one before, after which it rolls back; null: it never does."""
    rollback_threshold: float = 0.001
    """How much worse, in the metric's own units."""
    restore_weights: bool = False
    """A rollback also brings the weights of the best evaluation back."""
    emergency_epoch: int | None = 4
    """The epoch, counted from 0, from whose end on units are unfrozen whatever their score while none is; null: it
    never does so."""
    emergency_patience: int = 2
    """The same at once where the metric gained less than emergency_gain over so many evaluations."""
    emergency_gain: float = 0.005
    """In the metric's own units."""
    emergency_units: int = 1
    """How many units it unfreezes, the deepest first."""
    emergency_warmup: int = 6
    """Epochs of their warm-up."""
    emergency_start: float = 0.01
    """The share of the rate at which it starts."""


@dataclass
class FreezeConfig:
    """Which units (layers, blocks) train, and from when on."""

    strategy: Literal[
        "none", "fixed", "schedule", "adaptive", "progressive", "early_gradual", "gradient_guided", "advanced"
    ] = "none"
    """none trains everything, fixed keeps the units frozen, schedule goes by the step; the others unfreeze unit after
    unit, deciding at the end of each epoch."""
    units: list[str] | dict[str, list[str]] | None = None
    """Name patterns in the order of unfreezing, or {unit: [patterns]}; else those that the task names."""
    lr: float | None = None
    """Peak learning rate of the units; else optim.lr."""
    lr_decay: float = 1.0
    """Each further unit's rate is that of the one before times this."""
    monitor: str | None = None
    """adaptive, advanced: the metric followed; else checkpoint.monitor."""
    mode: Literal["min", "max"] | None = None
    """Which end of it is good; else checkpoint.mode."""
    schedule: dict[int, list[str]] = field(default_factory=dict)
    """schedule: the units (names or patterns) that train from a step on: {0: [], 500: [layer4], 2000: ['layer*']}."""
    fixed: FixedFreezeConfig = field(default_factory=FixedFreezeConfig)
    adaptive: AdaptiveFreezeConfig = field(default_factory=AdaptiveFreezeConfig)
    progressive: ProgressiveFreezeConfig = field(default_factory=ProgressiveFreezeConfig)
    early_gradual: EarlyGradualFreezeConfig = field(default_factory=EarlyGradualFreezeConfig)
    gradient_guided: GradientGuidedFreezeConfig = field(default_factory=GradientGuidedFreezeConfig)
    advanced: AdvancedFreezeConfig = field(default_factory=AdvancedFreezeConfig)
