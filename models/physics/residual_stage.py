"""The second stage: a corrector of what the operator predicts, at every level between that and the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch
from models.physics import losses
from models.physics.draws import taus
from models.physics.residual import bridged
from models.physics.stage import Stage
from models.physics.system import Parts, PhysicsSystem, mean_square

FORMS = {"bridge": 1.0, "original": 0.5}  # of the loss, and the level at which the prediction is corrected
RATIOS = ("sample", "batch")


class ResidualNetwork(PhysicsSystem):
    """The system, with the losses of its corrector as ``forward``.

    form: of ``FORMS``. noise: at the prediction, in units of the task's RMS change. ratio: of ``RATIOS``. calls: of the
    corrector, for the state that is measured beside the one of a single call.
    """

    def __init__(
        self,
        parts: Parts,
        trains: Sequence[str],
        form: str = "bridge",
        noise: float = 0.0,
        ratio: str = "sample",
        calls: int = 1,
    ) -> None:
        super().__init__(parts, trains)
        self.form, self.noise, self.ratio, self.calls = form, noise, ratio, calls

    def ahead(self, z: Tensor, task: Tensor | int) -> Tensor:
        return self.corrected(self.step(z, task), task, tau=FORMS[self.form])

    def forward(self, batch: Batch, terms: Sequence[str] | None = None, measured: bool = False) -> dict[str, Tensor]:
        """The losses ``terms`` of each row, by name: (B,) each; ``measured``: the rows of ``measure`` too, else
        ``latent`` and ``latent_error``, of the truth that the corrector tells from its level. Without terms ``u1``,
        what ``predict`` makes of ``u0``."""
        if terms is None:
            return {"u1": self.predict(batch)}
        task, tau = batch["task"], batch["taus"][:, 0]
        with torch.no_grad():
            z0, z1_true = self.latents(batch, "z0"), self.latents(batch, "z1")
            predicted = self.step(z0, task)
            state = self._state(batch, z1_true, predicted, tau)
        drift, target = self.drift(state, tau, task), z1_true - state
        rows = {name: self._loss(name, drift, target, batch) for name in terms}
        if not measured:
            with torch.no_grad():
                return rows | {"latent": mean_square(z1_true), "latent_error": mean_square(drift - target)}
        z1 = self.corrected(predicted, task, tau=FORMS[self.form])
        others = {"operator": predicted, "refined": self.corrected(predicted, task, self.calls, FORMS[self.form])}
        rows |= self.measure(batch, z0, z1, z1_true, **others)
        return rows | {"latent_drift": mean_square(z1 - predicted)}

    def _state(self, batch: Batch, z1: Tensor, predicted: Tensor, tau: Tensor) -> Tensor:
        """What the corrector is shown: in the original form always the prediction, whatever tau says."""
        if self.form == "original":
            return predicted
        level = self.noise * self.latent_change[batch["task"]].view(-1, 1, 1)
        return bridged(z1, predicted, tau, level * batch["noise"])

    def _loss(self, name: str, drift: Tensor, target: Tensor, batch: Batch) -> Tensor:
        if name == "forward":
            return losses.forward_loss(drift, target) / self.unit(batch["task"]).flatten() ** 2
        by_sample, by_batch = {
            "spectral": (losses.energy_ratio_loss, losses.batch_energy_ratio_loss),
            "relative": (losses.relative_loss, losses.batch_relative_loss),
        }[name]
        return by_sample(drift, target) if self.ratio == "sample" else by_batch(drift, target, batch["weight"])


class ResidualStage(Stage):
    """Train the corrector of a frozen operator.

    form: "bridge" shows the corrector states between the truth and the prediction (``residual.bridged``, arXiv
    2303.11435), with noise of ``noise`` x the task's RMS change at the prediction; it has to tell the truth from each.
    The prediction is then corrected in one call, at tau = 1, or in several. "original", the Universal Physics Stack's,
    shows the prediction alone, and tau says nothing; corrected in one call at tau = 0.5.
    tau: [alpha, beta] of the Beta distribution that every sample's tau is from.
    spectral_weight, relative_weight: of the relative error of the drift's energy over tokens, and of its NRMSE, beside
    the squared error, whose weight is 1. ratio: "sample": of each sample, or "batch": the original's, of a whole
    micro-batch: it depends on how an update is split.
    calls: of the corrector, for the prediction that is measured as ``nrmse_refined``.
    """

    trains = ("corrector",)
    compared = ("operator", "refined")

    def __init__(
        self,
        *,
        form: str = "bridge",
        noise: float = 0.1,
        tau: Sequence[float] = (2.0, 1.0),
        spectral_weight: float = 0.0,
        relative_weight: float = 0.0,
        ratio: str = "sample",
        calls: int = 2,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        check_choice("form", form, FORMS)
        check_choice("ratio", ratio, RATIOS)
        if noise < 0:
            raise InputError(f"task.args.noise: must be at least 0, not {noise}")
        if calls < 1:
            raise InputError(f"task.args.calls: must be at least 1, not {calls}")
        self.form, self.noise, self.ratio, self.calls, self.tau = form, noise, ratio, calls, beta("tau", tau)
        self.constant = {"forward": 1.0, "spectral": spectral_weight, "relative": relative_weight}

    def network(self) -> ResidualNetwork:
        network: ResidualNetwork = self.build(ResidualNetwork, self.form, self.noise, self.ratio, self.calls)
        return network

    def preprocess(self, batch: Batch) -> Batch:
        batch = super().preprocess(batch)
        batch["taus"] = taus(batch["random"], 1, *self.tau)
        if self.form == "bridge":
            batch["noise"] = batch["random"].normal("noise", self.design.encoder["tokens"], self.design.encoder["dim"])
        return batch

    def weights(self, epoch: float) -> dict[str, float]:
        return {name: weight for name, weight in self.constant.items() if weight}

    def describe(self) -> dict[str, str]:
        ratios = [name for name in self.weights(0) if name != "forward"] if self.ratio == "batch" else []
        said = f"{' and '.join(ratios)} loss of a micro-batch: it depends on how an update is split"
        return super().describe() | ({"by batch": said} if ratios else {})

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        return super().figures(sums) | drift_figure(self, sums)


def drift_figure(stage: Stage, sums: dict[str, Any]) -> dict[str, float]:
    """``drift``: RMS of the correction, in units of the split's own RMS change of a step."""
    drift, change = (sum(sums[f"{g.name}/latent_{name}"] for g in stage.grids) for name in ("drift", "persistence"))
    return {"drift": (drift / (change + losses.EPS)) ** 0.5}


def beta(key: str, values: Sequence[float]) -> tuple[float, float]:
    """Alpha and beta of a Beta distribution. Raises InputError for anything else."""
    numbers = tuple(values) if isinstance(values, list | tuple) else ()
    if len(numbers) != 2 or not all(isinstance(x, int | float) and x > 0 for x in numbers):
        raise InputError(f"task.args.{key}: needs [alpha, beta] of a Beta distribution, both above 0, not {values!r}")
    return float(numbers[0]), float(numbers[1])


def check_choice(key: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    if value not in choices:
        raise InputError(f"task.args.{key}: {value!r} is none of {', '.join(choices)}")
