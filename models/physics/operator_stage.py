"""The first stage: the operator's step in latent space, and the decoder that reads latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch
from models.physics import losses, priors
from models.physics.draws import at_points, query_points
from models.physics.stage import Stage
from models.physics.system import Parts, PhysicsSystem, joined, mean_square

SPECTRAL = {
    "space": losses.spectral_amplitude_loss,
    "energy": losses.spectral_energy_loss,
    "original": losses.feature_spectral_loss,
}
INVERSE = ("inverse_encoding", "inverse_decoding")
READS = {"physical", "decoder", *INVERSE}  # the decoder
PRIORS = ("divergence", "conservation", "boundary", "positivity", "latent_norm", "latent_diversity")


class OperatorNetwork(PhysicsSystem):
    """The system, with the losses of its operator, decoder and encoders as ``forward``.

    spectral: of ``SPECTRAL``. boundary: arguments of ``boundary_penalty``. scaled: losses of steps in units of the
    task's change.
    """

    def __init__(
        self, parts: Parts, trains: Sequence[str], spectral: str, boundary: Mapping[str, Any], scaled: bool
    ) -> None:
        super().__init__(parts, trains)
        self.spectral, self.boundary, self.scaled = spectral, dict(boundary), scaled

    def forward(self, batch: Batch, terms: Sequence[str] | None = None, measured: bool = False) -> dict[str, Tensor]:
        """The losses ``terms`` of each row, by name: (B,) each; ``measured``: the rows of ``measure`` too, else
        ``latent`` and ``latent_error`` alone. Without terms ``u1``, what ``predict`` makes of ``u0`` and, of several
        tasks, ``task``."""
        if terms is None:
            return {"u1": self.predict(batch)}
        z0_live, z1_true = self.latents(batch, "z0"), self.latents(batch, "z1").detach()
        z0 = (
            z0_live.detach()
        )  # encoders learn from the inverse losses alone: a step is easiest where all latents are alike
        z1 = self.step(z0, batch["task"])
        rows = {name: getattr(self, f"_{name}")(batch, z0_live) for name in terms if name in INVERSE}
        operator_terms = [name for name in terms if name not in (*INVERSE, *PRIORS)]
        rows |= {name: getattr(self, f"_{name}")(batch, z0, z1, z1_true) for name in operator_terms}
        if wanted := [name for name in terms if name in PRIORS]:
            rows |= self._priors(batch, z0, z1, wanted)
        if measured:
            return rows | self.measure(batch, z0, z1, z1_true)
        with torch.no_grad():
            rows |= {"latent": mean_square(z1_true), "latent_error": mean_square(z1 - z1_true)}
        idle = "decoder" in self.trains and not READS & set(terms)  # an inverse loss that has not begun yet
        return rows | ({"untouched": self.untouched()} if idle or "encoders" in self.trains else {})

    # ---- of the operator --------------------------------------------------------------------------------------

    def _unit(self, task: Tensor) -> Tensor | float:
        """What a step's squared error in latents is divided by."""
        return self.latent_change[task] ** 2 if self.scaled else 1.0

    def _forward(self, batch: Batch, z0: Tensor, z1: Tensor, z1_true: Tensor) -> Tensor:
        return losses.forward_loss(z1, z1_true) / self._unit(batch["task"])

    def _spectral(self, batch: Batch, z0: Tensor, z1: Tensor, z1_true: Tensor) -> Tensor:
        loss = SPECTRAL[self.spectral](z1, z1_true)
        return loss if self.spectral == "energy" else loss / self._unit(batch["task"])  # a ratio has no unit

    def _rollout(self, batch: Batch, z0: Tensor, z1: Tensor, z1_true: Tensor) -> Tensor:
        """The mean over the steps after the first, each from the one predicted before."""
        future, task = self.latents(batch, "z_future").detach(), batch["task"]
        predicted = losses.unrolled(partial(self.step, task=task), z1, future.shape[1])
        return losses.rollout_loss(predicted, future).mean(1) / self._unit(task)

    def _physical(self, batch: Batch, z0: Tensor, z1: Tensor, z1_true: Tensor) -> Tensor:
        """Squared error of the predicted field at the query points, in units of the field's change: the gradient goes
        through the decoder into the operator."""
        return self._by_task(batch, partial(self._physical_of, batch, z0, z1))

    def _physical_of(self, batch: Batch, z0: Tensor, z1: Tensor, task: int, rows: Tensor | slice) -> Tensor:
        u0, u1 = (self.fields(batch, key, task, rows) for key in ("u0", "u1"))
        points, normaliser = batch["points"][rows], self.normalisers[self.names[task]]
        error = self.advance(u0, z0[rows], z1[rows], task, points) - at_points(u1, points)
        std = normaliser.std[-1]  # a steady task's second frame is the solution
        return mean_square(error / std) / self.field_change[task] ** 2

    # ---- of the decoder and the encoders ----------------------------------------------------------------------

    def _decoder(self, batch: Batch, z0: Tensor, z1: Tensor, z1_true: Tensor) -> Tensor:
        """What the decoder makes of true latents: of the change of a step, in its units, and of both states. The
        gradient goes to the decoder alone."""
        return self._by_task(batch, partial(self._decoder_of, batch, z0, z1_true))

    def _decoder_of(self, batch: Batch, z0: Tensor, z1: Tensor, task: int, rows: Tensor | slice) -> Tensor:
        points = batch["points"][rows]
        first, then = (self._normal(batch, key, task, rows) for key in ("u0", "u1"))
        truth = torch.cat((at_points(first, points), at_points(then, points)))
        read = self.read(torch.cat((z0[rows], z1[rows])), task, torch.cat((points, points)))
        error0, error1 = (read - truth).chunk(2)
        level = (mean_square(error0) + mean_square(error1)) / 2
        if self.grids[task].steady:
            return level
        return level + losses.forward_loss(error1, error0) / self.field_change[task] ** 2

    def _inverse_encoding(self, batch: Batch, z0: Tensor) -> Tensor:
        def of(task: int, rows: Tensor | slice) -> Tensor:
            points = batch["points"][rows]
            truth = at_points(self._normal(batch, "u0", task, rows), points)
            return losses.inverse_encoding_loss({"u": self.read(z0[rows], task, points)}, {"u": truth})

        return self._by_task(batch, of)

    def _inverse_decoding(self, batch: Batch, z0: Tensor) -> Tensor:
        def of(task: int, rows: Tensor | slice) -> Tensor:
            grid, z = self.grids[task], z0[rows]
            fields = self.read(z, task).mT.unflatten(2, (grid.height, grid.width))
            return losses.inverse_decoding_loss(self.encoders[grid.name](fields), z)

        return self._by_task(batch, of)

    def _normal(self, batch: Batch, key: str, task: int, rows: Tensor | slice) -> Tensor:
        """Normalised fields (B', C, H, W)."""
        return self.normalisers[self.names[task]](self.fields(batch, key, task, rows), int(key == "u1"))

    def _by_task(self, batch: Batch, of: Any) -> Tensor:
        return joined([(rows, of(task, rows)) for task, rows in self.groups(batch)])

    # ---- physics priors ---------------------------------------------------------------------------------------

    def _priors(self, batch: Batch, z0: Tensor, z1: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Penalties of the predicted latents, and of the fields that they mean, decoded once at every point."""
        rows: dict[str, Tensor] = {}
        if "latent_norm" in wanted:
            rows["latent_norm"] = priors.latent_norm_penalty(z1)
        if "latent_diversity" in wanted:
            rows["latent_diversity"] = priors.latent_diversity_penalty(z1)
        of_fields = [name for name in wanted if not name.startswith("latent")]
        pieces: dict[str, list[tuple[Tensor | slice, Tensor]]] = {name: [] for name in of_fields}
        for task, places in self.groups(batch) if of_fields else []:
            u0 = self.fields(batch, "u0", task, places)
            u1 = self.advance(u0, z0[places], z1[places], task)
            for name in of_fields:
                pieces[name].append((places, self._prior(name, u0, u1, task)))
        return rows | {name: joined(each) for name, each in pieces.items()}

    def _prior(self, name: str, u0: Tensor, u1: Tensor, task: int) -> Tensor:
        grid = self.grids[task]
        if name == "boundary":
            return priors.boundary_penalty(u1, **self.boundary)
        if name == "positivity":
            return priors.positivity_penalty(u1)
        if grid.steady:  # what is given and what is found share no integral, and a scalar has no divergence
            return u1.new_zeros(len(u1))
        if name == "conservation":
            return priors.conservation_penalty(u1, u0)
        return priors.divergence_penalty(u1, (1 / grid.height, 1 / grid.width))


class OperatorStage(Stage):
    """Train the operator on single steps and rollouts, the decoder on true latents and, where asked, the encoders.

    spectral_weight, rollout_weight (which needs a rollout_horizon above 1), physical_weight (of the predicted field's
    error, with a gradient through the decoder): beside the forward loss, whose weight is 1. spectral: "space", of
    amplitudes; "energy", of energies, relative to each sample's; or "original": over a latent's features.
    decoder_weight: of the decoder's own loss, on latents held fixed. inverse_encoding, inverse_decoding: of those that
    reach an encoder that learns, and alone do: 0 before epoch ``inverse_warmup``, growing until twice that, at most
    ``inverse_cap``.
    queries: points per sample at which fields are compared, all where a grid has fewer; stratified: spread evenly.
    priors: weights by name, {divergence, conservation, boundary, positivity, latent_norm, latent_diversity}, of the
    predicted state. boundary: {value, edges} of the boundary's. scaled: losses of a step in units of the task's change;
    else as latents are; left out: with a reach.
    """

    trains = ("operator", "decoder")

    def __init__(
        self,
        *,
        spectral_weight: float = 0.0,
        spectral: str = "space",
        rollout_weight: float = 0.0,
        physical_weight: float = 0.0,
        decoder_weight: float = 1.0,
        inverse_encoding: float = 0.0,
        inverse_decoding: float = 0.0,
        inverse_warmup: float = 15,
        inverse_cap: float = 0.05,
        queries: int = 64,
        stratified: bool = False,
        priors: dict[str, float] | None = None,
        boundary: dict[str, Any] | None = None,
        scaled: bool | None = None,
        **stage: Any,
    ) -> None:
        super().__init__(**stage)
        if spectral not in SPECTRAL:
            raise InputError(f"task.args.spectral: {spectral!r} is none of {', '.join(SPECTRAL)}")
        if unknown := set(priors or {}) - set(PRIORS):
            raise InputError(f"task.args.priors: {', '.join(sorted(unknown))} is none of {', '.join(PRIORS)}")
        if rollout_weight and self.horizon < 2:
            raise InputError("task.args.rollout_weight: needs a task.args.rollout_horizon of at least 2")
        if self.train_encoder and not inverse_encoding:
            raise InputError(
                "task.args.train_encoder: needs inverse_encoding above 0: no other loss alone tells fields apart"
            )
        if queries < 1:
            raise InputError(f"task.args.queries: must be at least 1, not {queries}")
        self.spectral, self.queries, self.stratified = spectral, queries, stratified
        self.boundary = dict(boundary or {})
        self.scaled = self.design.reach is not None if scaled is None else scaled
        self.constant = {"forward": 1.0, "spectral": spectral_weight, "rollout": rollout_weight}
        self.constant |= {"physical": physical_weight, "decoder": decoder_weight} | dict(priors or {})
        self.growing = {"inverse_encoding": inverse_encoding, "inverse_decoding": inverse_decoding}
        self.inverse = {"warmup": inverse_warmup, "cap": inverse_cap}
        if not any(weight for name, weight in (self.constant | self.growing).items() if name in READS):
            self.trains = ("operator",)

    def network(self) -> OperatorNetwork:
        network: OperatorNetwork = self.build(OperatorNetwork, self.spectral, self.boundary, self.scaled)
        return network

    def preprocess(self, batch: Batch) -> Batch:
        batch = super().preprocess(batch)
        grids, tasks = self.grids, batch["task"]
        queries = min(self.queries, *(grid.points for grid in grids))
        batch["points"] = torch.zeros(len(tasks), queries, dtype=torch.int64)
        for number in set(batch["tasks"]):
            rows, grid = tasks == number, grids[number]
            batch["points"][rows] = query_points(
                batch["random"][rows], grid.height, grid.width, queries, self.stratified
            )
        return batch

    def weights(self, epoch: float) -> dict[str, float]:
        grown = {name: losses.curriculum_weight(epoch, base, **self.inverse) for name, base in self.growing.items()}
        return {name: weight for name, weight in (self.constant | grown).items() if weight}
