"""The learning rate as a share of its peak: a function of the applied updates, but for ``plateau``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fabric_trainer.config import ScheduleConfig

Share = Callable[[int], float]


def share(config: ScheduleConfig, total: int) -> Share:
    """The function step -> share of the peak rate for the update that follows ``step`` applied ones.

    total: the run's updates. All forms start with a linear warm-up (1/warmup, 2/warmup, …, 1); cosine is SGDR's
    (Loshchilov & Hutter, arXiv 1608.03983) without restarts, one_cycle that of Smith & Topin (arXiv 1708.07120)
    with cosine legs. Raises ValueError where the warm-up leaves nothing.
    """
    warmup = config.warmup
    if warmup and warmup >= total:
        raise ValueError(f"schedule.warmup of {warmup} updates leaves none of the run's {total}")
    main = _form(config, max(1, total - warmup))
    return lambda step: (step + 1) / warmup if step < warmup else main(step - warmup)


def _form(config: ScheduleConfig, total: int) -> Share:
    final, factor = config.final, config.factor
    if config.name == "linear":
        return lambda step: 1 + (final - 1) * min(1.0, step / total)
    if config.name == "cosine":
        return lambda step: _cosine(1.0, final, step / total)
    if config.name == "one_cycle":
        top = max(1.0, config.peak * total)
        rest = max(total - top, 1e-9)  # nothing is left after a peak at the end
        return lambda step: (
            _cosine(config.start, 1.0, step / top) if step < top else _cosine(1.0, final, (step - top) / rest)
        )
    if config.name == "step":
        return lambda step: factor ** (step // config.every)
    if config.name == "exponential":
        return lambda step: factor ** (step / total)
    return lambda step: 1.0  # constant; plateau multiplies its own drops in


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def corners(function: Share, warmup: int, total: int) -> dict[int, float]:
    """step -> share where a reader would look: the first, the end of warm-up, the top, the middle and the last."""
    sample = range(0, total, max(1, total // 1000))
    steps = {0, warmup, max(sample, key=function), total // 2, total - 1}
    return {step: function(step) for step in sorted(steps) if 0 <= step < total}


class Plateau:
    """Drops the rate when the monitored metric stops improving: a state machine, fed once per evaluation."""

    def __init__(self, config: ScheduleConfig, mode: str) -> None:
        self.config, self.sign = config, -1.0 if mode == "max" else 1.0
        self.share, self.best, self.bad = 1.0, math.inf, 0

    def observe(self, metric: float) -> None:
        """An improvement is relative: better than the best by more than threshold x |best|; a NaN is none."""
        value = self.sign * metric
        margin = self.config.threshold * abs(self.best) if math.isfinite(self.best) else 0.0
        if value < self.best - margin:
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad > self.config.patience:
            self.share, self.bad = max(self.share * self.config.factor, self.config.final), 0

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share, self.best, self.bad = state["share"], state["best"], state["bad"]
