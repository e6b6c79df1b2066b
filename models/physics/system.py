"""The whole physics system as one module: what each stage of the pipeline trains a part of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from data.normalise import Normaliser
from models.physics.decoder import AnyPointDecoder
from models.physics.draws import at_points
from models.physics.encoder import GridEncoder
from models.physics.operator import LatentOperator
from models.physics.prior import SteadyPrior
from models.physics.residual import DiffusionResidual, refined

PARTS = ("encoders", "operator", "decoder", "corrector", "prior")


@dataclass(frozen=True)
class Grid:
    """A task's fields: C channels on H x W points, H = 1 on a line. steady: what is given and its solution."""

    name: str
    channels: int
    height: int
    width: int
    steady: bool = False

    @property
    def points(self) -> int:
        return self.height * self.width


@dataclass
class Parts:
    """What a system is built of; the encoders and normalisers in the order of the grids.

    latent_change, field_change: root mean squares (RMS) of a step's change in latents and in normalised fields, of
    each task. reach: see ``PhysicsSystem.step``. dt: the number that the operator is told. horizon: states after z0
    that a batch brings.
    """

    grids: Sequence[Grid]
    encoders: Sequence[GridEncoder]
    normalisers: Sequence[Normaliser]
    operator: LatentOperator
    decoder: AnyPointDecoder
    corrector: DiffusionResidual | None = None
    prior: SteadyPrior | None = None
    latent_change: Sequence[float] = (1.0,)
    field_change: Sequence[float] = (1.0,)
    reach: float | None = None
    dt: float = 0.1
    horizon: int = 1


class PhysicsSystem(nn.Module):
    """Encoders and normalisers of every task, and one operator, decoder, corrector and prior for all of them.

    A stage's network is a subclass that adds ``forward``, in which its losses are computed: wrappers such as DDP and
    FSDP let in through it alone. Names are thus the same in every stage's checkpoint, and one stage's starts the next.

    trains: the parts (of ``PARTS``) that learn; the others' weights are frozen, and they stay in eval mode. Raises
    ValueError for one that the system hasn't.
    """

    dt: Tensor
    latent_change: Tensor
    field_change: Tensor

    def __init__(self, parts: Parts, trains: Sequence[str]) -> None:
        super().__init__()
        self.grids, self.names = list(parts.grids), [grid.name for grid in parts.grids]
        self.encoders = nn.ModuleDict(dict(zip(self.names, parts.encoders, strict=True)))
        self.normalisers = nn.ModuleDict(dict(zip(self.names, parts.normalisers, strict=True)))
        self.operator, self.decoder = parts.operator, parts.decoder
        self.corrector, self.prior = parts.corrector, parts.prior
        self.reach, self.horizon, self.trains = parts.reach, parts.horizon, tuple(trains)
        self.register_buffer("dt", torch.tensor(float(parts.dt)))
        self.register_buffer("latent_change", torch.tensor(parts.latent_change, dtype=torch.float32))
        self.register_buffer("field_change", torch.tensor(parts.field_change, dtype=torch.float32))
        if absent := [name for name in self.trains if getattr(self, name) is None]:
            raise ValueError(f"there is no {', '.join(absent)} to train")
        for name in PARTS:
            if (part := getattr(self, name)) is not None:
                part.requires_grad_(name in self.trains)

    def train(self, mode: bool = True) -> PhysicsSystem:
        """What is frozen has no dropout and no stochastic depth."""
        super().train(mode)
        for name in PARTS:
            if (part := getattr(self, name)) is not None and name not in self.trains:
                part.eval()
        return self

    # ---- fields and latents -----------------------------------------------------------------------------------

    def encode(self, fields: Tensor, task: int, frame: int = 0) -> Tensor:
        """(B, C, H, W) in their units -> latents (B, T, D). frame: of a steady task, 0 for what is given and 1 for the
        solution."""
        name = self.names[task]
        return self.encoders[name](self.normalisers[name](fields, frame))

    def step(self, z: Tensor, task: Tensor | int) -> Tensor:
        """The operator's next state: (B, T, D) -> (B, T, D). task: int64 (B,), or one for all.

        With a ``reach`` the operator's own change is in units of reach x the task's RMS change: its last norm then
        gets to the size of a shock in tens of updates instead of thousands.
        """
        moved = self.operator(z, self.dt)
        if self.reach is None:
            return moved
        return z + self.reach * self.latent_change[task].reshape(-1, 1, 1) * (moved - z)

    def drift(self, z: Tensor, tau: Tensor | float, task: Tensor | int) -> Tensor:
        """What the corrector adds to latents z (B, T, D) at levels tau, a number or (B,); with a ``reach`` in units of
        the task's RMS change, where the net's own numbers are about 1."""
        assert self.corrector is not None
        return self.corrector(z, tau) * self.unit(task)

    def corrected(self, z: Tensor, task: Tensor | int, calls: int = 1, tau: float = 1.0) -> Tensor:
        """A predicted state after ``calls`` calls of the corrector, from level tau down: (B, T, D) -> (B, T, D)."""
        return refined(partial(self.drift, task=task), z, calls, tau)

    def ahead(self, z: Tensor, task: Tensor | int) -> Tensor:
        """The next state as the stage predicts it: here what the operator says."""
        return self.step(z, task)

    def unit(self, task: Tensor | int) -> Tensor:
        """Of drifts and of what their losses are measured in, (B, 1, 1) or of one task (1, 1, 1): the task's RMS
        change with a ``reach``, else 1."""
        change = self.latent_change[task].reshape(-1, 1, 1)
        return torch.ones_like(change) if self.reach is None else change

    def read(self, z: Tensor, task: int, points: Tensor | None = None) -> Tensor:
        """The decoder's normalised fields at points numbered row by row, int64 (B, Q), or at all: (B, T, D) ->
        (B, Q, C)."""
        grid = self.grids[task]
        if points is None:
            points = torch.arange(grid.points, device=z.device).expand(z.shape[0], -1)
        x, y = (points % grid.width + 0.5) / grid.width, (points // grid.width + 0.5) / grid.height
        first = sum(other.channels for other in self.grids[:task])
        places = self.encoders[grid.name].places(grid.height, grid.width)
        values = self.decoder(torch.stack((x, y), -1).to(places.dtype), z, places)
        return values[..., first : first + grid.channels].to(self.dt.dtype)

    def decode(self, z: Tensor, task: int, points: Tensor | None = None, frame: int = 1) -> Tensor:
        """Fields in their units: (B, C, H, W), or (B, Q, C) at points. frame: as in ``encode``."""
        grid, values = self.grids[task], self.read(z, task, points).mT
        values = self.normalisers[grid.name].inverse(values[..., None, :], frame)[..., 0, :]
        return values.mT if points is not None else values.unflatten(2, (grid.height, grid.width))

    def advance(self, u0: Tensor, z0: Tensor, z1: Tensor, task: int, points: Tensor | None = None) -> Tensor:
        """The fields that latents z1 mean, for a state u0 (B, C, H, W) of latents z0, in its units: as a difference,
        u0 + D(z1) - D(z0), so that what latents don't hold stays as it was; of a steady task D(z1). (B, C, H, W), or
        (B, Q, C) at points."""
        if self.grids[task].steady:
            return self.decode(z1, task, points)
        twice = None if points is None else torch.cat((points, points))
        both, rows = self.decode(torch.cat((z0, z1)), task, twice, frame=0), z0.shape[0]
        return (u0 if points is None else at_points(u0, points)) + both[rows:] - both[:rows]  # ONNX has no chunk

    # ---- batches of several tasks -----------------------------------------------------------------------------

    def groups(self, batch: dict[str, Any]) -> list[tuple[int, Tensor | slice]]:
        """(task, its rows in the batch) of every task that is there."""
        tasks = batch["tasks"]
        if len(self.grids) == 1:
            return [(0, slice(None))]
        device = batch["task"].device
        rows = {task: [row for row, other in enumerate(tasks) if other == task] for task in sorted(set(tasks))}
        return [(task, torch.tensor(places, device=device)) for task, places in rows.items()]

    def fields(self, batch: dict[str, Any], key: str, task: int, rows: Tensor | slice) -> Tensor:
        """A task's rows of ``batch[key]`` in their own shape: (B', C, H, W), or (B', K, C, H, W) of several frames."""
        grid, flat = self.grids[task], batch[key][rows].flatten(1)
        shape: tuple[int, ...] = (grid.channels, grid.height, grid.width)
        if key == "u_future":
            shape = (self.horizon - 1, *shape)
        return flat[:, : math.prod(shape)].unflatten(1, shape)

    def latents(self, batch: dict[str, Any], key: str) -> Tensor:
        """``z0``, ``z1`` or ``z_future``: those that the batch brings, else the fields encoded now, with a graph."""
        if key in batch:
            return batch[key]
        pieces, frame = [], int(key != "z0")
        for task, rows in self.groups(batch):
            fields = self.fields(batch, key.replace("z", "u"), task, rows)
            states = fields.flatten(0, -4) if fields.ndim > 4 else fields
            z = self.encode(states, task, frame)
            pieces.append((rows, z.unflatten(0, fields.shape[:-3])))
        return joined(pieces)

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """The fields a step after ``u0``, in their units and in its shape: (B, C, H, W), or flat rows with zeros behind
        where tasks have different grids.

        Every task's parts are asked about every row, and the row takes what its own say: so nothing depends on which
        tasks a batch has, and a traced graph is right for any.
        """
        u0, tasks = batch["u0"], range(len(self.grids))
        given = [self.fields(batch, "u0", task, slice(None)) for task in tasks]
        if len(given) == 1:
            z0 = self.encode(given[0], 0)
            return self.advance(given[0], z0, self.ahead(z0, 0), 0)

        def own(values: Sequence[Tensor]) -> Tensor:
            """Of each row what its task's values are."""
            rows = batch["task"].view(-1, *(1,) * (values[0].ndim - 1))
            chosen = values[0]
            for task, value in enumerate(values[1:], 1):
                chosen = torch.where(rows == task, value, chosen)
            return chosen

        z0 = own([self.encode(fields, task) for task, fields in enumerate(given)])
        z1, wide = self.ahead(z0, batch["task"]), u0.flatten(1).shape[1]
        found = [self.advance(fields, z0, z1, task).flatten(1) for task, fields in enumerate(given)]
        return own([F.pad(values, (0, wide - values.shape[1])) for values in found]).view_as(u0)

    def measure(
        self, batch: dict[str, Any], z0: Tensor, z1: Tensor, z1_true: Tensor, **others: Tensor
    ) -> dict[str, Tensor]:
        """Mean squares of each row, (B,) float32 at least: of latents and fields after the step and of their errors,
        predicted and by ``persistence``; ``field_floor`` is the error where the decoder is given the true latents.

        Persistence predicts no change; for the solution of a steady task, the training solutions' mean. others: further
        predictions of z1, by name: ``latent_<name>`` and ``field_<name>`` are their errors.
        """
        squares = {"latent": z1_true, "latent_error": z1 - z1_true, "latent_persistence": z0 - z1_true}
        squares |= {f"latent_{name}": other - z1_true for name, other in others.items()}
        found = {name: mean_square(value) for name, value in squares.items()}
        pieces: dict[str, list[tuple[Tensor | slice, Tensor]]] = {}
        for task, rows in self.groups(batch):
            u0, u1 = (self.fields(batch, key, task, rows) for key in ("u0", "u1"))
            z = z0[rows]
            still = self.normalisers[self.names[task]].inverse(torch.zeros_like(u1), 1)
            errors = {
                "field": u1,
                "field_error": self.advance(u0, z, z1[rows], task) - u1,
                "field_persistence": (still if self.grids[task].steady else u0) - u1,
                "field_floor": self.advance(u0, z, z1_true[rows], task) - u1,
            }
            for name, other in others.items():
                errors[f"field_{name}"] = self.advance(u0, z, other[rows], task) - u1
            for name, value in errors.items():
                pieces.setdefault(name, []).append((rows, mean_square(value)))
        return found | {name: joined(each) for name, each in pieces.items()}

    def untouched(self) -> Tensor:
        """A zero that hangs on every weight that learns: DDP waits for the gradient of each, also where a rank's rows
        have none of a task. Under FSDP not on those of blocks: they are in shards again, and every row has used them.
        """
        learning = [p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        return torch.stack([p.sum() for p in learning]).sum() * 0.0


def joined(pieces: Sequence[tuple[Tensor | slice, Tensor]]) -> Tensor:
    """Values of groups of rows, each row back in its place."""
    if len(pieces) == 1 and isinstance(pieces[0][0], slice):
        return pieces[0][1]
    order = torch.cat([places for places, _ in pieces if isinstance(places, Tensor)])
    values = torch.cat([values for _, values in pieces])
    return torch.empty_like(values).index_copy(0, order, values)


def mean_square(x: Tensor) -> Tensor:
    """Of each row, in float32 at least: (B, ...) -> (B,)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).flatten(1).mean(1)
