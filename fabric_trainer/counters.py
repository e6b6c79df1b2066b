"""What a run counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """The only clocks of a run."""

    window: int = 0  # windows consumed, skipped ones included: data position, epoch and random seeds follow
    step: int = 0  # applied updates: schedules, EMA decay and every x-axis follow
    samples: int = 0  # of applied updates, over all ranks
    skipped: int = 0  # updates left out for a gradient that was not finite, or a spike
    spikes: int = 0  # of these
    empty: int = 0  # windows without any weight
    seconds: float = 0.0  # of training, over all resumes


@dataclass
class EpochSums:
    """The exact training sums of the epoch under way, over all ranks."""

    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, weight: float, sums: dict[str, float]) -> None:
        self.weight += weight
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / self.weight for name, value in self.sums.items() if self.weight}
