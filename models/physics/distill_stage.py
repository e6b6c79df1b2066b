"""The third stage: what the corrector does in several calls, in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch
from models.physics import losses
from models.physics.draws import taus
from models.physics.residual import refined
from models.physics.residual_stage import beta, check_choice, drift_figure
from models.physics.stage import Stage
from models.physics.system import Parts, PhysicsSystem, mean_square

FORMS = ("honest", "original")


class DistillNetwork(PhysicsSystem):
    """The system, whose corrector is the student, with the loss of its distillation as ``forward``.

    The teacher is the corrector that the stage starts with, held as constants: it is in no checkpoint, so that names
    are those of every stage, and a file's corrector is the student. form: of ``FORMS``. teacher_steps: its calls.
    """

    def __init__(self, parts: Parts, trains: Sequence[str], form: str = "honest", teacher_steps: int = 1) -> None:
        super().__init__(parts, trains)
        self.form, self.teacher_steps = form, teacher_steps
        self.teacher: nn.Module | None = None

    def hold_teacher(self) -> None:
        """The corrector as it is now becomes the teacher."""
        assert self.corrector is not None
        self.teacher = constant(self.corrector)

    def taught(self, z: Tensor, task: Tensor | int) -> Tensor:
        """The teacher's corrected state after ``teacher_steps`` calls, from level 1 down."""
        teacher: Callable[..., Tensor] | None = self.teacher
        assert teacher is not None
        return refined(lambda state, tau: teacher(state, tau) * self.unit(task), z, self.teacher_steps)

    def ahead(self, z: Tensor, task: Tensor | int) -> Tensor:
        return self.corrected(self.step(z, task), task)

    def forward(self, batch: Batch, terms: Sequence[str] | None = None, measured: bool = False) -> dict[str, Tensor]:
        """The loss ``distillation`` of each row, (B,); ``measured``: the rows of ``measure`` too, of one call at
        tau = 1, else ``latent`` and ``latent_error``. Without terms ``u1``, what ``predict`` makes of ``u0``."""
        if terms is None:
            return {"u1": self.predict(batch)}
        task, levels = batch["task"], batch["taus"]
        with torch.no_grad():
            z0, z1_true = self.latents(batch, "z0"), self.latents(batch, "z1")
            predicted = self.step(z0, task)
            taught = self.taught(predicted, task)
        by_row = task.repeat_interleave(levels.shape[1])
        drifts = losses.drifts_at(partial(self.drift, task=by_row), predicted, levels)
        rows = {"distillation": self._distillation(drifts, taught - predicted) / self.unit(task).flatten() ** 2}
        if not measured:
            with torch.no_grad():
                error = mean_square(predicted + drifts[:, 0] - z1_true)
                return rows | {"latent": mean_square(z1_true), "latent_error": error}
        z1 = self.corrected(predicted, task)
        rows |= self.measure(batch, z0, z1, z1_true, operator=predicted, teacher=taught)
        return rows | {"latent_drift": mean_square(z1 - predicted)}

    def _distillation(self, drifts: Tensor, teacher_drift: Tensor) -> Tensor:
        if self.form == "original":
            return losses.collapsing_distillation_loss(drifts)
        return losses.distillation_loss(drifts, teacher_drift)


class DistillStage(Stage):
    """Train the corrector (the student) to do in one call, at any tau, what the one that the stage starts with (the
    teacher) does in several. ``start`` must have a corrector; it is the teacher, also of a run that is resumed or
    evaluated, so the file has to stay.

    teacher_steps: its calls, from tau = 1 down. tau_schedule: at how many taus each sample is asked in an epoch; the
    last number holds from there on. tau: [alpha, beta] of the Beta distribution that they are from. form: "original",
    the Universal Physics Stack's, has the drift itself as its loss and so trains it to 0: for comparison only.
    """

    trains = ("corrector",)
    compared = ("operator", "teacher")

    def __init__(
        self,
        *,
        form: str = "honest",
        teacher_steps: int = 2,
        tau_schedule: Sequence[int] = (3,),
        tau: Sequence[float] = (1.0, 1.0),
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        check_choice("form", form, FORMS)
        if teacher_steps < 1:
            raise InputError(f"task.args.teacher_steps: must be at least 1, not {teacher_steps}")
        if not tau_schedule or not all(isinstance(n, int) and n >= 1 for n in tau_schedule):
            raise InputError(f"task.args.tau_schedule: needs numbers of at least 1, not {tau_schedule}")
        self.form, self.teacher_steps = form, teacher_steps
        self.tau_schedule, self.tau = list(tau_schedule), beta("tau", tau)

    def network(self) -> DistillNetwork:
        if not any(name.startswith("corrector.") for name in self.started):
            raise InputError(
                f"task.args.start: {self.start or 'null'}: distillation starts with a file that has a corrector"
            )
        network: DistillNetwork = self.build(DistillNetwork, self.form, self.teacher_steps)
        network.hold_teacher()
        return network

    def augment(self, batch: Batch) -> Batch:
        count = self.tau_schedule[min(batch["random"].epoch, len(self.tau_schedule) - 1)]
        return super().augment(batch) | {"taus": taus(batch["random"], count, *self.tau)}

    def preprocess(self, batch: Batch) -> Batch:
        batch = super().preprocess(batch)
        batch["taus"] = taus(batch["random"], self.tau_schedule[-1], *self.tau)
        return batch

    def weights(self, epoch: float) -> dict[str, float]:
        return {"distillation": 1.0}

    def describe(self) -> dict[str, str]:
        return super().describe() | {"teacher": f"the start's corrector in {self.teacher_steps} calls"}

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        return super().figures(sums) | drift_figure(self, sums)


def constant(module: nn.Module) -> nn.Module:
    """A copy whose weights are buffers that no state dict has: it moves with the network, and that is all."""
    made = deepcopy(module).eval()
    for part in made.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone(), persistent=False)
    return made
