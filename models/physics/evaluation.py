"""The last stage: long rollouts of the whole system, measured and drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data import ups
from data.fields import Fields
from data.pairs import States
from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch, Loss
from models.physics import conditioned, conditioning, rollouts
from models.physics.linear import LinearStep
from models.physics.rollout_pictures import frame_time, linear_steps, rollout_pictures
from models.physics.rollouts import Trajectories
from models.physics.stage import Stage
from models.physics.system import Parts, PhysicsSystem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    caches = False  # latents are made as they are needed, once
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
