"""The fourth stage: the state that a trajectory ends in, from any of its states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data.fields import Fields
from data.pairs import Pairs, States
from fabric_trainer.task import Batch
from models.physics import losses
from models.physics.residual_stage import check_choice
from models.physics.stage import Stage
from models.physics.system import PhysicsSystem, mean_square

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGETS = ("last", "next")


class PriorNetwork(PhysicsSystem):
    """The system, with the loss of its prior as ``forward``."""

    def ahead(self, z: Tensor, task: Tensor | int) -> Tensor:
        assert self.prior is not None
        return self.prior(z)

    def forward(self, batch: Batch, terms: Sequence[str] | None = None, measured: bool = False) -> dict[str, Tensor]:
        """The loss ``forward`` of each row, (B,); ``measured``: the rows of ``measure`` too, else ``latent`` and
        ``latent_error``. Without terms ``u1``, the fields that the prior expects of ``u0``."""
        if terms is None:
            return {"u1": self.predict(batch)}
        with torch.no_grad():
            z0, z1_true = self.latents(batch, "z0"), self.latents(batch, "z1")
        z1 = self.ahead(z0, batch["task"])
        rows = {"forward": losses.forward_loss(z1, z1_true)}
        if measured:
            return rows | self.measure(batch, z0, z1, z1_true)
        with torch.no_grad():
            return rows | {"latent": mean_square(z1_true), "latent_error": mean_square(z1 - z1_true)}


class PriorStage(Stage):
    """Train the prior: from any state of a trajectory to its last one, or to a steady task's solution.

    Figures are those of that state, beside ``…_persistence``: staying where it is. target: "next", the Universal
    Physics Stack's, is the next state instead, which is not steady.
    """

    trains = ("prior",)

    def __init__(self, *, target: str = "last", **stage: Any) -> None:
        super().__init__(**stage)
        check_choice("target", target, TARGETS)
        self.target = target

    def pairs(self, states: dict[str, States], fields: Fields) -> Pairs:
        return Pairs(states, self.stride, self.horizon, fields.steady, fields.name, last=self.target == "last")

    def network(self) -> PriorNetwork:
        network: PriorNetwork = self.build(PriorNetwork)
        return network

    def weights(self, epoch: float) -> dict[str, float]:
        return {"forward": 1.0}

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        """None: one state after the other is what the prior does not give."""
        return {}
