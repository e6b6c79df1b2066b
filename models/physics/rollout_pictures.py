"""Rollouts of any stage's system, drawn for its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data import ups
from data.fields import Fields
from models.physics import conditioning, rollouts
from models.physics.linear import LinearStep, fit_fields
from models.physics.rollouts import Step, Trajectories
from models.physics.system import PhysicsSystem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from models.physics.stage import Stage

DRAWN = 16  # trajectories whose error a picture shows
FRAMES = 4  # states of a plane that a picture shows


def linear_steps(stage: Stage) -> list[LinearStep]:
    """Each task's, fitted on its training split."""
    return [
        fit_fields(fields, stage.stride, grid.name in ups.PERIODIC)
        for grid, fields in zip(stage.grids, stage.sets["train"], strict=True)
    ]


def frame_time(fields: Fields) -> float:
    """Time between two frames, as the file has it; 1 where it has none, or is steady: time is then in frames."""
    known = fields.t is not None and len(fields.t) > 1
    return float(fields.t[-1] - fields.t[0]) / (len(fields.t) - 1) if known and fields.t is not None else 1.0


@torch.no_grad()
def rollout_pictures(
    stage: Stage,
    system: PhysicsSystem,
    device: torch.device,
    split: str = "val",
    steps: int = 50,
    linear: Sequence[LinearStep] | None = None,
    space: str = "latent",
    difference: bool = True,
) -> dict[str, Figure]:
    """Of every task a rollout beside the truth, and how its error and its spectrum go, over the first trajectories.

    system: in eval mode, on ``device``.
    """
    linear = linear or linear_steps(stage)
    found: dict[str, Figure] = {}
    for task, (states, fields) in enumerate(zip(stage.states[split], stage.sets[split], strict=True)):
        trajectories = Trajectories(states["u"], steps, stage.stride, 1, fields.steady, fields.name)
        count = min(DRAWN, len(trajectories))
        u = trajectories.__getitems__(list(range(count)))["u"].to(device)
        found |= _pictures(stage, system, task, fields, split, u, linear[task], space, difference)
    return found


def _pictures(
    stage: Stage,
    system: PhysicsSystem,
    task: int,
    fields: Fields,
    split: str,
    u: Tensor,
    linear: Step,
    space: str,
    difference: bool,
) -> dict[str, Figure]:
    """One task's."""
    from models.physics import pictures

    grid, steps, periodic = system.grids[task], u.shape[1] - 1, system.names[task] in ups.PERIODIC
    dt, unit = frame_time(fields) * stage.stride, "t" if fields.t is not None else "frames"
    names, (x, y) = conditioning.channel_names(grid.name, grid.channels), (edges(fields.x), edges(fields.y))
    rolled = rollouts.rollout(system, u[:, 0], steps, task, space, difference=difference)
    predicted = torch.stack((u[:, 0], *rolled), 1).float().cpu()
    truth = u.float().cpu()
    if grid.steady:
        some = slice(0, FRAMES)
        title = f"{grid.name}, {split}: the solutions of {len(truth[some])} problems"
        columns = [f"problem {number}" for number in range(len(truth[some]))]
        return {title: pictures.planes(truth[some, 1], predicted[some, 1], columns, (*x, *y), names, truth[some, 0])}
    ahead = f"{steps} steps from the first state"
    if grid.height == 1:
        rows = 2 if grid.channels == 1 else 1
        lines = [series[:rows, :, :, 0].transpose(1, 2).flatten(0, 1) for series in (truth, predicted)]
        of = f"{rows} trajectories" if rows > 1 else "a trajectory"
        found = {f"{grid.name}, {split}: {ahead} of {of}": pictures.space_time(*lines, dt, unit, x, names)}
    else:
        times = sorted(set(np.linspace(0, steps, FRAMES + 1).round().astype(int).tolist()) - {0})
        columns = [f"{unit} = {k * dt:.4g}" for k in times]
        drawn = pictures.planes(truth[0, times], predicted[0, times], columns, (*x, *y), names)
        found = {f"{grid.name}, {split}: {ahead} of a trajectory": drawn}
    values = rollouts.measures(system, u, task, linear, space=space, periodic=periodic, difference=difference)
    sums = {
        name: value.cpu().numpy()
        for name, value in rollouts.summed(values, torch.ones(len(u), device=u.device)).items()
    }
    measured = rollouts.figures(sums, dt)
    curves = {name: measured[f"rollout_nrmse{kind}/steps"] for name, kind in pictures.KINDS.items()}
    whole = rollouts.whole_bins(grid.height, grid.width, periodic)
    energies = zip(measured["spectrum/truth"][:, :whole], measured["spectrum/rollout"][:, :whole], strict=True)
    times = [f"{unit} = {(k + 1) * dt:.4g}" for k in rollouts.moments(steps)]
    spectra = dict(zip(times, energies, strict=True))
    waves = rollouts.wavenumbers(whole, periodic)
    title = f"{grid.name}, {split}: error and spectrum of {len(u)} trajectories"
    return found | {title: pictures.growth(curves, spectra, waves, dt, unit)}


def edges(centres: Any) -> tuple[float, float]:
    """Where cells of these centres begin and end."""
    if len(centres) < 2:
        return 0.0, 1.0
    half = float(centres[-1] - centres[0]) / (len(centres) - 1) / 2
    return float(centres[0]) - half, float(centres[-1]) + half
