"""When to give up: the monitored metric has stopped improving."""

from __future__ import annotations

import math
from typing import Any

from fabric_trainer.config import EarlyStoppingConfig


class EarlyStopping:
    """A state machine, fed once per evaluation; ``over`` once ``patience`` of them in a row were no improvement. The
    metric is the same on every rank, so all of them stop together.

    An improvement is better than the best before by more than ``min_delta``; a NaN is none. mode: min or max.
    """

    def __init__(self, config: EarlyStoppingConfig, mode: str) -> None:
        self.config, self.sign = config, -1.0 if mode == "max" else 1.0
        self._least, self.bad = math.inf, 0

    def observe(self, metric: float) -> None:
        value = self.sign * metric
        if value < self._least - self.config.min_delta:
            self._least, self.bad = value, 0
        else:
            self.bad += 1

    @property
    def over(self) -> bool:
        return self.config.patience is not None and self.bad >= self.config.patience

    @property
    def best(self) -> float:
        """The metric that none since has bettered."""
        return self.sign * self._least

    def state_dict(self) -> dict[str, Any]:
        return {"least": self._least, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._least, self.bad = state["least"], state["bad"]
