"""The learning-rate range test: ``--tune lr``."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fabric_trainer.curves import BLUE, GREY, INK, ORANGE
from fabric_trainer.faults import Agree
from fabric_trainer.files import write_atomically
from fabric_trainer.loop import compute_gradients
from fabric_trainer.random import seed_torch
from fabric_trainer.record import Record, Update
from fabric_trainer.state import State
from fabric_trainer.untouched import untouched
from fabric_trainer.window import windows

GONE_UP = 4.0  # times its lowest: a smoothed loss that high has diverged


@dataclass(frozen=True)
class Sweep:
    """rates, losses, smoothed: float64 (N,), one for each update; the loss is that after the update."""

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest on the logarithmic axis; None where it falls nowhere.

        The slope is that of a line through seven updates. The first tenth, where the average has seen little, is left
        out, and what comes after the lowest.
        """
        first, last = max(3, len(self.rates) // 10), min(int(self.smoothed.argmin()) + 1, len(self.rates) - 3)
        if last <= first:
            return None
        slopes = np.convolve(self.smoothed, np.arange(3, -4, -1) / 28, "valid")  # of update 3, 4, ...
        slopes = slopes[first - 3 : last - 3]
        return float(self.rates[first + slopes.argmin()]) if slopes.min() < 0 else None


def sweep_lr(state: State) -> Sweep:
    """Train with a rate that grows by the same factor each update, from ``tune.min_lr`` to ``tune.max_lr`` (Smith,
    arXiv 1506.01186), and leave ``state`` as it was; all ranks together, with the same result.

    The updates are those of ``fit`` without schedule: groups keep the ratios of their peaks. After each the loss is
    measured on the first window again, in training mode with the same dropout: what differs between windows, often
    more than a small rate achieves, is left out. It is smoothed by an exponential average with bias correction. Ends
    early where that is above 4 times its lowest, or a loss or a gradient is not finite (but for an fp16 scaler's search
    for its scale).
    """
    config = state.config.tune
    rates = np.geomspace(config.min_lr, config.max_lr, config.updates)
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with untouched(state), Agree(state.fabric) as agree, Record(state, None) as record:
        state.train()
        probe: Update | None = None
        for count, (rate, update) in enumerate(zip(rates, _updates(state, agree), strict=False), 1):
            probe = probe or update
            _set_learning_rate(state, rate)
            finite = _update(state, record, update)
            loss = _loss(state, probe)
            if not finite or not math.isfinite(loss):
                break
            average = config.smoothing * average + (1 - config.smoothing) * loss
            losses.append(loss)
            smoothed.append(average / (1 - config.smoothing**count))
            lowest = min(smoothed)
            if smoothed[-1] > lowest + (GONE_UP - 1) * abs(lowest):
                break
    return Sweep(rates[: len(losses)], np.array(losses), np.array(smoothed))


def _updates(state: State, agree: Agree) -> Iterator[Update]:
    """Of the run's own windows from where it stands, epoch after epoch; those without weight are passed over."""
    numbers = range(state.counters.window, sys.maxsize)
    config, pin = state.config, state.fabric.device.type == "cuda"
    for window in windows(
        state.task, state.train_set, state.order, config.seed, numbers, config.data.num_workers, pin_memory=pin
    ):
        weight = agree(window.weight).weight
        if weight > 0:
            yield Update(window, weight)


def _set_learning_rate(state: State, rate: float) -> None:
    """As ``optim.lr`` of this value would."""
    configured = state.config.optim.lr
    for group, peak in zip(state.engine.bare_optimizer.param_groups, state.peaks, strict=True):
        group["lr"] = float(rate * peak / configured) if configured else float(rate)


def _update(state: State, record: Record, update: Update) -> bool:
    """Returns whether the gradient was finite."""
    compute_gradients(state, record, update)
    state.guard.step(state.engine.clip())
    verdict = state.guard.settle()
    state.engine.drop_gradients()
    return verdict is None or verdict.applied or state.engine.scaler is not None


@torch.no_grad()
def _loss(state: State, update: Update) -> float:
    """The mean over the update's window and all ranks; every rank goes by rank 0's number."""
    window, fabric = update.window, state.fabric
    wide = torch.float32 if fabric.device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=fabric.device)
    seed_torch(fabric.device, state.config.seed, window.span.window, state.ranks.rank)
    for batch, _ in window.on(fabric.device, state.memory.rows):
        total += state.task.loss(state.network, batch).total
    state.engine.refresh()
    return float(fabric.broadcast(state.ranks.sum(total).item())) / update.weight


# ---- files --------------------------------------------------------------------------------------------------------


def write_sweep(sweep: Sweep, path: Path) -> None:
    """The picture, in the format of the path's suffix, and the numbers beside it as CSV."""
    picture, numbers = io.BytesIO(), io.StringIO(newline="")
    _draw(sweep).savefig(picture, format=path.suffix[1:], dpi=150)
    write_atomically(path, picture.getvalue())
    writer = csv.writer(numbers, lineterminator="\n")
    writer.writerow(["lr", "loss", "smoothed"])
    writer.writerows(zip(sweep.rates.tolist(), sweep.losses.tolist(), sweep.smoothed.tolist(), strict=True))
    write_atomically(path.with_suffix(".csv"), numbers.getvalue())


def _draw(sweep: Sweep):  # type: ignore[no-untyped-def]  # a Figure: matplotlib is imported where it draws
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(sweep.rates, sweep.losses, ".", color=GREY, alpha=0.5, markersize=5, label="loss after an update")
    axes.plot(sweep.rates, sweep.smoothed, color=BLUE, linewidth=2, label="smoothed")
    axes.set_xscale("log")
    low, high = sweep.losses.min(), sweep.smoothed[: sweep.smoothed.argmin() + 1].max()
    margin = 0.25 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)  # the end of what diverges lies far out
    rate = sweep.suggestion
    if rate is not None:
        loss = sweep.smoothed[np.searchsorted(sweep.rates, rate)]
        axes.axvline(rate, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(rate, loss, "o", color=ORANGE, markersize=8, label="steepest descent")
        text = f"optim.lr {rate:.3g}"
        axes.annotate(text, (rate, loss), (10, 10), textcoords="offset points", color=ORANGE, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd5e1")
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.tick_params(colors=INK, length=0, which="both", pad=5)
    axes.set_xlabel("learning rate", color=INK)
    axes.set_ylabel("training loss", color=INK)
    axes.legend(frameon=False, loc="lower left", labelcolor=INK)
    return figure
