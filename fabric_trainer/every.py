"""When something is due: ``"100 steps"``, ``"1 epochs"``, ``"0.5 epochs"``, ``"10 minutes"``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """A moment of a run: applied updates, epochs done (with the share of the one under way), minutes of training."""

    steps: int = 0
    epochs: float = 0.0
    minutes: float = 0.0


@dataclass(frozen=True, slots=True)
class Every:
    """An interval, such as 100 ``steps``."""

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Every:
        """Raise ValueError, with what would be right, where ``text`` is no interval."""
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(step|epoch|minute)s?\s*", str(text))
        if not match or float(match[1]) <= 0 or (match[2] == "step" and float(match[1]) % 1):
            raise ValueError(f"must read like '100 steps', '0.5 epochs' or '10 minutes', not {text!r}")
        return cls(float(match[1]), match[2] + "s")

    def after(self, clock: Clock) -> float:
        """The next multiple: a function of the clock alone, so that a resume needs to remember nothing."""
        return (int(self._now(clock) / self.count + 1e-9) + 1) * self.count  # 0.3 is three times 0.1

    def reached(self, mark: float, clock: Clock) -> bool:
        """Whether the clock is at ``mark``, or past it."""
        return self._now(clock) >= mark - 1e-9

    def _now(self, clock: Clock) -> float:
        return getattr(clock, self.unit)  # type: ignore[no-any-return]
