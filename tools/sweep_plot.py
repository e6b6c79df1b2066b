"""A sweep's trials as a table and a picture."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fabric_trainer.curves import BLUE, GREY, INK, ORANGE, RED, wants_log
from fabric_trainer.files import write_atomically
from tools.sweep_space import Parameter

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # of panels
LONGEST = 12  # letters of a choice's label


def state_of(trial: optuna.trial.FrozenTrial) -> str:
    """finished, pruned, diverged, refused, failed or stopped."""
    return str(trial.user_attrs.get("state", "stopped"))


def value_of(trial: optuna.trial.FrozenTrial) -> float | None:
    """Of a finished trial; Optuna gives a pruned one that of its last evaluation."""
    return trial.value if state_of(trial) == "finished" else None


def write_csv(path: Path, study: optuna.Study, parameters: list[Parameter], metric: str) -> None:
    """A row per trial; without a value where it has none."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", metric, *(parameter.key for parameter in parameters), "seconds"])
    for trial in study.trials:
        seconds = f"{trial.duration.total_seconds():.1f}" if trial.duration else ""
        chosen = [trial.params.get(parameter.key, "") for parameter in parameters]
        writer.writerow([trial.number, state_of(trial), value_of(trial), *chosen, seconds])
    write_atomically(path, text.getvalue())


def write_plot(path: Path, study: optuna.Study, parameters: list[Parameter], metric: str) -> None:
    picture = io.BytesIO()
    draw(study, parameters, metric).savefig(picture, format="png", dpi=130)
    write_atomically(path, picture.getvalue())


def draw(study: optuna.Study, parameters: list[Parameter], metric: str) -> Figure:
    """The metric against the trial and against each parameter: the best orange; trials without a value are crosses."""
    from matplotlib.figure import Figure

    trials = [trial for trial in study.trials if state_of(trial) not in ("stopped", "failed")]
    values = np.array([value_of(trial) for trial in trials], dtype=float)  # None is NaN
    rows = -(-(1 + len(parameters)) // COLUMNS)
    columns = min(COLUMNS, 1 + len(parameters))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    best = None
    if np.isfinite(values).any():
        best = int(np.nanargmin(values) if study.direction.name == "MINIMIZE" else np.nanargmax(values))
    _trials(panels[0], np.array([trial.number for trial in trials]), values, study.direction.name == "MINIMIZE")
    for axes, parameter in zip(panels[1:], parameters, strict=False):
        _against(axes, parameter, [trial.params[parameter.key] for trial in trials], values)
    for axes in panels[: 1 + len(parameters)]:
        _dress(axes, values, best)
    for axes in panels[1 + len(parameters) :]:
        axes.set_axis_off()
    for axes in panels[: 1 + len(parameters) : columns]:
        axes.set_ylabel(metric, color=INK)
    return figure


def _trials(axes: Axes, numbers: np.ndarray, values: np.ndarray, minimize: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    _dots(axes, numbers, values)
    worst = math.inf if minimize else -math.inf
    so_far = (np.minimum if minimize else np.maximum).accumulate(np.where(np.isfinite(values), values, worst))
    known = np.isfinite(so_far)
    axes.step(numbers[known], so_far[known], where="post", color=GREY, linewidth=1.2, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("trial", color=INK)


def _against(axes: Axes, parameter: Parameter, chosen: list[Any], values: np.ndarray) -> None:
    axes.set_xlabel(parameter.key, color=INK)
    if parameter.choices:
        _dots(axes, np.array([parameter.choices.index(value) for value in chosen]), values)
        labels = [text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for text in parameter.choices]
        crowded = sum(map(len, labels)) > 30
        axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlim(-0.5, len(labels) - 0.5)
        return
    if parameter.log:
        axes.set_xscale("log")
    _dots(axes, np.array(chosen, dtype=float), values)
    if not parameter.log:
        axes.locator_params(axis="x", nbins=5, integer=parameter.whole)


def _dots(axes: Axes, x: np.ndarray, values: np.ndarray) -> None:
    axes.plot(x, values, "o", color=BLUE, alpha=0.75, markersize=5, markeredgewidth=0, zorder=2)
    lost = x[~np.isfinite(values)]
    axes.plot(lost, np.full(len(lost), 0.03), "x", color=RED, markersize=5, transform=axes.get_xaxis_transform())


def _dress(axes: Axes, values: np.ndarray, best: int | None) -> None:
    if best is not None:
        x = axes.lines[0].get_xdata()[best]  # type: ignore[index]
        axes.plot([x], [values[best]], "o", color=ORANGE, markersize=8, markeredgewidth=0, zorder=3)
    if wants_log(values):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.margins(x=0.05, y=0.1)
    axes.set_axisbelow(True)
