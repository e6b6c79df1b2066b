"""The last stage: long rollouts of the whole system, measured and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data import ups
from data.fields import Fields
from data.pairs import States
from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch, Loss
from models.physics import conditioned, conditioning, rollouts
from models.physics.linear import LinearStep, fit_fields
from models.physics.rollouts import Step, Trajectories
from models.physics.stage import Stage
from models.physics.system import Parts, PhysicsSystem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 16  # trajectories whose error a picture shows
FRAMES = 4  # states of a plane that a picture shows


class EvaluationNetwork(PhysicsSystem):
    """The system, with what is measured along rollouts as ``forward``.

    linear: each task's. steps: of each task's rollouts. space: of ``rollouts.SPACES``. difference: as
    ``rollouts.rollout`` has it. tau: level at which the
    corrector is called once in every step, where there is one; None: never. ttc: of test-time conditioning; InputError
    where the tasks lack what it names.
    """

    def __init__(
        self,
        parts: Parts,
        trains: Sequence[str],
        linear: Sequence[LinearStep],
        steps: Sequence[int],
        space: str,
        difference: bool = True,
        tau: float | None = None,
        ttc: conditioning.Settings | None = None,
    ) -> None:
        super().__init__(parts, trains)
        self.linear, self.steps, self.space, self.ttc = list(linear), list(steps), space, ttc
        self.difference = difference
        self.tau = None if self.corrector is None else tau
        self.scores = {} if ttc is None else conditioned.scores(ttc, self.grids, steps)

    def ahead(self, z: Tensor, task: Tensor | int) -> Tensor:
        z1 = self.step(z, task)
        return z1 if self.tau is None else self.corrected(z1, task, tau=self.tau)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of ``rollouts.measures`` and ``conditioned.measures`` over the batch's trajectories ``u``,
        ``<task>/<name>`` and ``<task>/weight``. A task that a batch is without has a trajectory of zeros there, which
        counts for nothing: every rank takes the same steps and has the same sums."""
        found: dict[str, Tensor] = {}
        for task, grid in enumerate(self.grids):
            shape = (self.steps[task] + 1, grid.channels, grid.height, grid.width)
            places = [row for row, other in enumerate(batch["tasks"]) if other == task]
            rows = torch.tensor(places or [0], device=batch["u"].device)
            u = batch["u"][rows].flatten(1)[:, : math.prod(shape)]
            u, weight = u.unflatten(1, shape), batch["weight"][rows]
            if not places:
                u, weight = torch.zeros_like(u), torch.zeros_like(weight)
            periodic = grid.name in ups.PERIODIC
            values = rollouts.measures(
                self, u, task, self.linear[task], self.space, periodic=periodic, difference=self.difference
            )
            if self.ttc is not None and task in self.scores:
                own = batch["random"][rows]
                values |= conditioned.measures(self, u, task, self.ttc, self.scores[task], own, weight, self.tau)
            found |= {f"{grid.name}/{name}": value for name, value in rollouts.summed(values, weight).items()}
        return found


class EvaluationStage(Stage):
    """Measure rollouts of a stage's checkpoint: ``train.py --evaluate FILE``, with ``task.args`` and ``start`` as that
    stage had them. Nothing is trained.

    rollout_steps: of ``time_stride`` frames each, or as many as a trajectory has. starts: rollouts from each
    trajectory, the first from its first state. space: "latent" goes on from predicted latents, "field" encodes each
    predicted field again. difference: a field is u0 + D(z) - D(z0); false reads D(z) alone, which is better where what
    latents don't hold, such as noise at the start, is soon gone. corrector_tau: level at which the corrector, where
    the file has one, corrects every step in one call: 1, or 0.5 where it was trained in the original's form; null
    leaves it out. ttc: settings of test-time conditioning (``conditioning.Settings``): from every state ``ttc.steps``
    steps are predicted once more, as ``nrmse_ttc`` and ``nrmse_physical_ttc``; steady tasks are left out.
    """

    trains = ("operator", "decoder")  # a run has to train something; this one can't be trained

    def __init__(
        self,
        *,
        rollout_steps: int = 50,
        starts: int = 1,
        space: str = "latent",
        difference: bool = True,
        corrector_tau: float | None = 1.0,
        ttc: dict[str, Any] | None = None,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        self.ttc = None if ttc is None else conditioning.settings(ttc)
        if space not in rollouts.SPACES:
            raise InputError(f"task.args.space: {space!r} is none of {', '.join(rollouts.SPACES)}")
        if corrector_tau is not None and not 0 <= corrector_tau <= 1:
            raise InputError(f"task.args.corrector_tau: must be within 0 and 1, or null, not {corrector_tau}")
        self.rollout_steps, self.starts, self.tau = rollout_steps, starts, corrector_tau
        self.way: dict[str, Any] = {"space": space, "difference": difference}
        self.val_every = 1  # every trajectory counts

    def _states(self, folder: Path | None, *parts: Any) -> dict[str, States]:
        return super()._states(None, *parts)  # latents are made as they are needed, once

    def pairs(self, states: dict[str, States], fields: Fields) -> Trajectories:
        return Trajectories(states["u"], self.rollout_steps, self.stride, self.starts, fields.steady, fields.name)

    def network(self) -> EvaluationNetwork:
        steps = [self.pairs(*each).steps for each in zip(self.states["train"], self.sets["train"], strict=True)]
        linear = linear_steps(self)
        way = (self.way["space"], self.way["difference"])
        network: EvaluationNetwork = self.build(EvaluationNetwork, linear, steps, *way, self.tau, self.ttc)
        return network

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        raise InputError("task.path: EvaluationStage trains nothing: measure a checkpoint with --evaluate FILE")

    def evaluate(self, network: nn.Module, batch: Batch, meters: dict[str, Any]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = network(batch)
        return sums

    def figures(self, sums: dict[str, Any]) -> dict[str, Any]:
        """``rollouts.figures`` and ``conditioned.figures`` of each task, of several as ``<task>/…``, and their means
        over the tasks that have them."""
        own = {}
        for number, grid in enumerate(self.grids):
            mine = {name.partition("/")[2]: value for name, value in sums.items() if name.startswith(f"{grid.name}/")}
            dt = frame_time(self.sets["train"][number]) * self.stride
            own[grid.name] = rollouts.figures(mine, dt) | conditioned.figures(mine)
        if len(own) == 1:
            return next(iter(own.values()))
        named: dict[str, list[float]] = {}
        for figures in own.values():  # not all have all: a steady task is not conditioned
            for name, value in figures.items():
                if isinstance(value, float):
                    named.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in named.items()}
        return means | {f"{task}/{name}": value for task, figures in own.items() for name, value in figures.items()}

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        assert isinstance(network, EvaluationNetwork)
        split = "test" if "test" in self.sets else "val"
        return rollout_pictures(self, network, device, split, self.rollout_steps, network.linear, **self.way)


# ---- of any stage ---------------------------------------------------------------------------------------------------


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
