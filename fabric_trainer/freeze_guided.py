"""The freezing strategies that measure frozen units on probe batches: ``gradient_guided`` and ``advanced``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import floor, isfinite
from statistics import fmean
from typing import Any

from fabric_trainer.config import AdvancedFreezeConfig, GradientGuidedFreezeConfig
from fabric_trainer.freeze_machine import Action, Plan, Probe, Reading, Unit, Warmup


def finite(reading: Reading) -> bool:
    """Whether it may be counted: a gradient that overflowed would stay in every running mean."""
    return all(map(isfinite, (*reading.mean, *reading.variance, reading.activation)))


class GradientGuided(Plan):
    """The units whose gradients are largest, some epochs apart, each with a warm-up of its learning rate.

    importance: unit -> mean over its parameter tensors of mean |g|, over the last epoch's probe batches.
    """

    strategy, carried = "gradient_guided", ("waited", "importance")

    def __init__(self, config: GradientGuidedFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config
        self.waited = 0  # epochs, of patience
        self.importance: dict[str, float] = {}

    @property
    def probes(self) -> int:
        return self.config.probes if self.frozen else 0

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        self.importance = self._importance(probe)
        self.advance_warmups()
        if epoch < self.config.sampling_epochs:
            return Action()
        if self.waited < self.config.patience:
            self.waited += 1
            return Action()
        ranked = sorted(self.importance, key=lambda name: -self.importance[name])
        chosen = [name for name in ranked if self.importance[name] > self.config.threshold][: self.config.per_epoch]
        if chosen:
            self.waited = 0
            self.warmups |= {name: Warmup(self.config.warmup_epochs) for name in chosen}
            return self.release(chosen, f"mean gradient above {self.config.threshold}")
        if not ranked:
            return Action()
        largest = f"{ranked[0]} has the largest mean gradient, {self.importance[ranked[0]]:.3g}"
        return Action(notes=(f"nothing unfrozen: {largest}, not above {self.config.threshold}",))

    def _importance(self, probe: Probe) -> dict[str, float]:
        means: dict[str, list[float]] = {name: [] for name in self.units if name in self.frozen}
        for batch in probe:
            for name in means.keys() & batch.keys():
                if finite(batch[name]):
                    means[name].append(fmean(batch[name].mean))
        return {name: fmean(values) for name, values in means.items() if values}


@dataclass
class Statistics:
    """Of one frozen unit, over the probe batches since it was frozen; an entry per parameter tensor."""

    importance: list[float] = field(default_factory=list)  # running mean of mean|g| (1 + var(g))
    sign: list[int] = field(default_factory=list)  # the last one
    flips: list[int] = field(default_factory=list)  # how often it changed
    activations: list[float] = field(default_factory=list)  # the last ten

    def add(self, reading: Reading, momentum: float) -> None:
        samples = [mean * (1 + variance) for mean, variance in zip(reading.mean, reading.variance, strict=True)]
        old, before = self.importance or samples, self.sign or reading.sign  # the first reading sets them
        self.importance = [momentum * i + (1 - momentum) * x for i, x in zip(old, samples, strict=True)]
        changed = [a != b for a, b in zip(before, reading.sign, strict=True)]
        self.flips = [n + c for n, c in zip(self.flips or [0] * len(changed), changed, strict=True)]
        self.sign = list(reading.sign)
        self.activations = [*self.activations, reading.activation][-10:]

    @property
    def gradient(self) -> float:
        """The unit's gradient importance: the mean over its parameter tensors."""
        return fmean(self.importance) if self.importance else 0.0

    @property
    def potential(self) -> float:
        """Its learning potential: changes of sign per parameter tensor."""
        return fmean(self.flips) if self.flips else 0.0

    @property
    def activation(self) -> float:
        return fmean(self.activations) if self.activations else 0.0


class Advanced(Plan):
    """The units with the best score, with a warm-up that fits their kind; taken back where the metric falls.

    Statistics of a unit begin when it is frozen. smooth: unit -> 0.7 old + 0.3 score, over epochs. A snapshot is what
    trained in an evaluated epoch and the metric it reached.
    """

    strategy, follows_metric = "advanced", True
    carried = ("waited", "history", "declines", "snapshots", "smooth")

    def __init__(self, config: AdvancedFreezeConfig, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self.config = config
        self.waited = 0  # epochs, of patience
        self.history: list[float] = []  # of the metric
        self.declines = 0  # evaluations in a row that were worse than the one before
        self.snapshots: list[dict[str, Any]] = []
        self.smooth = dict.fromkeys(self.units, 0.0)
        self.statistics: dict[str, Statistics] = {}
        self.needs = dependencies(units)

    @property
    def probes(self) -> int:
        return self.config.probes if self.frozen else 0

    def settled(self, unit: str) -> float:
        return max(0.5, 1 - 0.1 * self.units[unit].depth)

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        self._measure(probe)
        if metric is not None and isfinite(metric):
            self.history.append(metric)
            rollback = self._rollback()
            if rollback is not None:
                return rollback
            self._snapshot(epoch, metric)
        self.advance_warmups()
        if self.waited < self.config.patience:
            self.waited += 1
            return Action()
        chosen = self._eligible(epoch)[: self.config.per_epoch]
        if chosen:
            return self._release({name: self._warmup(name) for name in chosen}, "by its score")
        if self._stuck(epoch):
            warmup = Warmup(self.config.emergency_warmup, self.config.emergency_start)
            return self._release(dict.fromkeys(self._deepest(), warmup), "in an emergency: nothing else trains")
        return Action()

    # ---- unfreezing ---------------------------------------------------------------------------------------------

    def _measure(self, probe: Probe) -> None:
        for batch in probe:
            for name in self.frozen & batch.keys():
                if finite(batch[name]):
                    self.statistics.setdefault(name, Statistics()).add(batch[name], self.config.momentum)
        for name in self.frozen:
            self.smooth[name] = 0.7 * self.smooth[name] + 0.3 * self.score(name)

    def score(self, name: str) -> float:
        """Of a frozen unit; half a point of dependency pressure per unfrozen unit that builds on it."""
        measured = self.statistics.get(name, Statistics())
        pressure = 0.5 * sum(name in self.needs[other] for other in self.unfrozen) * self.config.dependencies
        return 0.4 * measured.gradient + 0.3 * measured.activation + 0.2 * measured.potential + 0.1 * pressure

    def threshold(self, name: str, epoch: int) -> float:
        """What the score must exceed: more where the metric just rose, less where it fell."""
        gain = self.history[-1] - self.history[-2] if len(self.history) > 1 else 0.0
        performance = 1.2 if gain > 0.01 else 0.8 if gain < -0.005 else 1.0
        return self.config.threshold * max(0.5, 1 - epoch / 50) * (1 + 0.1 * self.units[name].depth) * performance

    def _eligible(self, epoch: int) -> list[str]:
        """The frozen units that may be unfrozen, the highest score first."""
        if epoch < self.config.analysis_window:
            return []
        names = [name for name in self.units if name in self.frozen and self._may(name, epoch)]
        return sorted(names, key=lambda name: -self.score(name))

    def _may(self, name: str, epoch: int) -> bool:
        measured, depth = self.statistics.get(name, Statistics()), self.units[name].depth
        return (
            self.score(name) > self.threshold(name, epoch)
            and measured.gradient > 0.5 * self.config.threshold
            and measured.potential > 0.1
            and all(abs(depth - self.units[other].depth) > 1 - 1e-9 for other in self.warmups)  # 4.1 - 3.1 < 1
        )

    def _warmup(self, name: str) -> Warmup:
        kind, epochs = self.units[name].kind, self.config.warmup_epochs
        if kind == "conv":
            return Warmup(epochs + 1, 0.05, exponential=True)
        return Warmup(max(2, epochs - 1) if kind in ("block", "sub_block") else epochs)

    def _stuck(self, epoch: int) -> bool:
        """Whether nothing trains, and it is late or the metric stands still."""
        if self.unfrozen or self.config.emergency_epoch is None:
            return False
        back = self.config.emergency_patience
        still = len(self.history) > back and self.history[-1] - self.history[-1 - back] < self.config.emergency_gain
        return still or epoch >= self.config.emergency_epoch

    def _deepest(self) -> list[str]:
        """Sub-blocks where there are any, of the deepest block first; in a block by smoothed score, then by depth."""
        frozen = [unit for unit in self.units.values() if unit.name in self.frozen]
        kinds = [[unit for unit in frozen if unit.kind == kind] for kind in ("sub_block", "block")]
        found = next((units for units in kinds if units), frozen)
        found.sort(key=lambda unit: (-floor(unit.depth), -self.smooth[unit.name], -unit.depth))
        return [unit.name for unit in found[: self.config.emergency_units]]

    def _release(self, warmups: Mapping[str, Warmup], why: str) -> Action:
        self.waited = 0
        self.warmups |= warmups
        for name in warmups:
            self.statistics.pop(name, None)
            self.smooth[name] = 0.0
        return self.release(list(warmups), why)

    # ---- rollback -----------------------------------------------------------------------------------------------

    def _snapshot(self, epoch: int, metric: float) -> None:
        """Keep the last ten. Whose weights come back keeps the best alone: that is where the weights are from."""
        warmups = {name: asdict(warmup) for name, warmup in self.warmups.items()}
        taken = {"epoch": epoch, "metric": metric, "unfrozen": list(self.unfrozen), "warmups": warmups}
        kept = [*self.snapshots, taken]
        self.snapshots = [max(kept, key=_metric)] if self.config.restore_weights else kept[-10:]

    def _rollback(self) -> Action | None:
        """Freeze again what the best snapshot had frozen, after enough declines; None where there is no call for it."""
        patience = self.config.rollback_patience
        if patience is None or len(self.history) < 3:
            return None
        declined = self.history[-1] < self.history[-2] - self.config.rollback_threshold
        self.declines = self.declines + 1 if declined else 0
        best = max(self.snapshots, key=_metric, default=None)
        if self.declines < patience or best is None:
            return None
        self.declines = 0
        frozen = [name for name in self.unfrozen if name not in best["unfrozen"]]
        if not frozen and not self.config.restore_weights:
            return None
        self.waited = 0
        self.unfrozen = list(best["unfrozen"])
        self.warmups = {name: Warmup(**warmup) for name, warmup in best["warmups"].items()}
        if not self.config.restore_weights:  # the weights go on from here: what is best is looked for anew
            self.snapshots = []
        done = [f"{name} frozen again" for name in frozen] + ["weights restored"] * self.config.restore_weights
        note = f"{', '.join(done)} (the metric fell {patience} times: back to epoch {best['epoch']})"
        return Action(freeze=tuple(frozen), restore=self.config.restore_weights, notes=(note,))

    # ---- checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"statistics": {name: asdict(own) for name, own in self.statistics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.statistics = {name: Statistics(**own) for name, own in state["statistics"].items()}


def _metric(snapshot: Mapping[str, Any]) -> float:
    return float(snapshot["metric"])


def dependencies(units: Sequence[Unit]) -> dict[str, list[str]]:
    """unit -> those it builds on: the two before it on the way from the input; of a sub-block, the one."""
    order = sorted(units, key=lambda unit: unit.depth, reverse=True)[::-1]
    names = [unit.name for unit in order]
    reach = [1 if unit.kind == "sub_block" else 2 for unit in order]
    return {name: names[max(0, i - reach[i]) : i] for i, name in enumerate(names)}
