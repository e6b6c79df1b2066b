"""Pictures of the physics system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("tab:blue", "tab:orange", "tab:green")
LOOKS: dict[str, dict[str, Any]] = {  # of what is compared
    "prediction": {"color": "tab:blue", "linewidth": 2.2},
    "persistence": {"color": "tab:gray", "linestyle": "--"},
    "linear stencil": {"color": "tab:orange", "linestyle": "-."},
    "decoder's floor": {"color": "tab:green", "linestyle": ":", "linewidth": 2},
}
KINDS = {"prediction": "", "persistence": "_persistence", "linear stencil": "_linear", "decoder's floor": "_floor"}


def space_time(
    truth: Tensor,
    predicted: Tensor,
    dt: float,
    time: str = "t",
    x: tuple[float, float] = (0, 1),
    names: Sequence[str] = ("u",),
) -> Figure:
    """Truth, rollout and their difference over space and time, a row per trajectory, and profiles at three times.

    truth, predicted: (N, T, X), states ``dt`` apart in units of ``time``, on the CPU. x: where the line starts and
    ends. names: of the rows' fields, in turn.
    """
    import matplotlib.pyplot as plt

    end = (truth.shape[1] - 1) * dt
    figure, axes = plt.subplots(
        len(truth), 4, figsize=(14, 3.2 * len(truth)), squeeze=False, layout="constrained", width_ratios=(1, 1, 1, 1.3)
    )
    for number, (row, u, v) in enumerate(zip(axes, truth, predicted, strict=True)):
        name = names[number % len(names)]
        of = f" of {name}" if len(names) > 1 else ""
        limit, error = u.abs().max().item(), v - u
        shown = ((f"truth{of}", u, limit), (f"prediction{of}", v, limit), ("error", error, _largest(error)))
        for axis, (title, field, bound) in zip(row, shown, strict=False):
            image = axis.imshow(
                field, cmap="RdBu_r", vmin=-bound, vmax=bound, origin="lower", aspect="auto", extent=(*x, 0, end)
            )
            axis.set(title=title, xlabel="x", ylabel=time)
            figure.colorbar(image, ax=axis, shrink=0.9)
        relative = (error.pow(2).mean().sqrt() / u.pow(2).mean().sqrt()).item()
        row[2].set_title(f"error, NRMSE {relative:.3f}")
        _profiles(row[3], u, v, dt, time, x, name)
    return figure


def _profiles(
    axis: Axes, truth: Tensor, predicted: Tensor, dt: float, time: str, x: tuple[float, float], name: str
) -> None:
    """The fields at a quarter, half and the whole of the time: truth as thin lines, the rollout dashed over it."""
    last, cells = truth.shape[0] - 1, truth.shape[1]
    places = x[0] + (torch.arange(cells) + 0.5) / cells * (x[1] - x[0])
    for color, frame in zip(COLORS, (last // 4, last // 2, last), strict=True):
        axis.plot(places, truth[frame], color=color, linewidth=1, label=f"{time} = {frame * dt:.2f}")
        axis.plot(places, predicted[frame], color=color, linewidth=2.2, linestyle=(0, (2, 2)), alpha=0.6)
    axis.set(title="truth thin, prediction dashed", xlabel="x", ylabel=name, xlim=x)
    axis.legend(frameon=False, fontsize="small")


def planes(
    truth: Tensor,
    predicted: Tensor,
    titles: Sequence[str],
    edges: tuple[float, float, float, float] = (0, 1, 0, 1),
    names: Sequence[str] = ("u",),
    given: Tensor | None = None,
) -> Figure:
    """Truth, prediction and their difference on a plane, a column for each of ``titles``, three rows per channel.

    truth, predicted: (columns, C, H, W), on the CPU. edges: of x and of y. given: (columns, 1, H, W), what the solution
    of a steady problem is of, in a row above.
    """
    import matplotlib.pyplot as plt

    channels, columns, above = truth.shape[1], len(titles), int(given is not None)
    rows = above + 3 * channels
    tall = 1.75 * (edges[3] - edges[2]) / (edges[1] - edges[0]) + 0.3
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.1 * columns + 1.6, tall * rows + 0.5),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    looks: list[tuple[str, Tensor, float, float, str]] = []
    if given is not None:
        looks.append(("given", given[:, 0], given.min().item(), given.max().item(), "cividis"))
    for channel in range(channels):
        u, v = truth[:, channel], predicted[:, channel]
        low, high, bound = u.min().item(), u.max().item(), _largest(v - u)
        looks.append((f"truth, {names[channel]}", u, low, high, "viridis"))
        looks.append((f"prediction, {names[channel]}", v, low, high, "viridis"))
        looks.append((f"error, {names[channel]}", v - u, -bound, bound, "RdBu_r"))
        for axis, before, after in zip(axes[above + 3 * channel + 2], u, v, strict=True):
            axis.set_title(f"NRMSE {((after - before).norm() / before.norm()).item():.3f}", fontsize="small")
    for row, (label, fields, least, most, colors) in zip(axes, looks, strict=True):
        for axis, field in zip(row, fields, strict=True):
            image = axis.imshow(field, cmap=colors, vmin=least, vmax=most, origin="lower", extent=edges)
        row[0].set_ylabel(f"{label}\ny")
        figure.colorbar(image, ax=list(row), shrink=0.9, aspect=12)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("x")
        axis.locator_params(nbins=4)
    return figure


def growth(
    curves: Mapping[str, NDArray[Any]],
    spectra: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    waves: NDArray[Any],
    dt: float,
    time: str = "t",
) -> Figure:
    """How a rollout's error grows, and its energy by wavenumber.

    curves: NRMSE of the steps 1 … K, by name (of ``LOOKS``). spectra: the energies (bins,) of truth and rollout, by the
    time they are of. waves: the bins' wavenumbers (bins,). dt: a step, in units of ``time``.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for name, values in curves.items():
        finite = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        left.plot(
            dt * np.arange(1, len(values) + 1),
            finite,
            label=name,
            marker="." if len(values) < 12 else None,
            **LOOKS[name],
        )
    seen = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in curves.values()])
    if len(seen):  # what has blown up leaves through the top
        left.set_ylim(0.7 * max(seen.min(), 1e-6), min(1.4 * seen.max(), 10))
    left.set(
        yscale="log",
        xlabel=f"{time} since the first state",
        ylabel="NRMSE",
        title="error of the rollout, all trajectories",
    )
    left.grid(which="both", alpha=0.25)
    left.legend(frameon=False, fontsize="small")
    kept = waves > 0  # the mean is no wave
    for color, (label, (truth, ours)) in zip(COLORS, spectra.items(), strict=False):
        right.plot(waves[kept], truth[kept], color=color, linewidth=1, label=label)
        right.plot(waves[kept], ours[kept], color=color, linewidth=2.2, linestyle=(0, (2, 2)), alpha=0.6)
    highest = max(truth[kept].max() for truth, _ in spectra.values())
    lowest = min(truth[kept].min() for truth, _ in spectra.values())
    right.set_ylim(max(lowest / 10, 1e-12 * highest), 10 * highest)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="wavenumber, waves per side",
        ylabel="energy",
        title="energy spectrum: truth thin, prediction dashed",
    )
    right.grid(which="both", alpha=0.25)
    right.legend(frameon=False, fontsize="small")
    return figure


def _largest(error: Tensor) -> float:
    """Of the finite values; 1 where all are 0."""
    return error.nan_to_num(0, 0, 0).abs().max().item() or 1.0
