"""What the parts of a physics system are to be: their settings, checked, and the parts made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from data.normalise import Normaliser
from fabric_trainer.errors import InputError
from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.operator import CORES, LatentOperator
from models.physics.prior import SteadyPrior
from models.physics.residual import DiffusionResidual
from models.physics.system import Grid, Parts

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Design:
    """The arguments of every part, those left out that follow from the data or from the encoder's ``dim``; reach, dt
    and horizon are the system's. Raises InputError for one that a part doesn't take."""

    encoder: Settings = field(default_factory=dict)
    operator: Settings = field(default_factory=dict)
    decoder: Settings = field(default_factory=dict)
    corrector: Settings = field(default_factory=dict)
    prior: Settings = field(default_factory=dict)
    reach: float | None = None
    dt: float = 0.1
    horizon: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", {"tokens": 32, "dim": 16, **self.encoder})
        check("encoder", self.encoder, GridEncoder, given=("channels",))
        check("operator", self.operator, LatentOperator, given=("dim", "sources", "source_hidden"))
        check("decoder", self.decoder, AnyPointDecoder, given=("dim", "fields"))
        check("corrector", self.corrector, DiffusionResidual, given=("dim", "cond"))
        check("prior", self.prior, SteadyPrior, given=("dim", "cond"))
        if (architecture := self.operator.get("architecture", "pdet_unet")) in CORES:
            check("operator.core", self.operator.get("core") or {}, CORES[architecture], given=("input_dim",))

    def encoders(self, grids: Sequence[Grid]) -> list[GridEncoder]:
        """A task's each, all from one seed. InputError where a grid doesn't give their tokens."""
        encoders = [GridEncoder(channels=grid.channels, **on_grid(self.encoder, grid)) for grid in grids]
        for grid, encoder in zip(grids, encoders, strict=True):
            try:
                encoder.places(grid.height, grid.width)
            except ValueError as error:
                raise InputError(f"task.args.encoder: {grid.name}: {error}") from None
        return encoders

    def parts(
        self,
        grids: Sequence[Grid],
        normalisers: Sequence[Normaliser],
        changes: tuple[Sequence[float], Sequence[float]],
        has: Collection[str],
    ) -> Parts:
        """New ones, drawn from the global generator but for the encoders. changes: of latents and of fields. has:
        which of corrector and prior there are."""
        dim = self.encoder["dim"]
        return Parts(
            grids,
            self.encoders(grids),
            deepcopy(normalisers),
            LatentOperator(dim, **self.operator),
            AnyPointDecoder(dim, sum(grid.channels for grid in grids), **self.decoder),
            DiffusionResidual(dim, **self.corrector) if "corrector" in has else None,
            SteadyPrior(dim, **self.prior) if "prior" in has else None,
            *changes,
            self.reach,
            self.dt,
            self.horizon,
        )


def on_grid(encoding: Settings, grid: Grid) -> dict[str, Any]:
    """GridEncoder's arguments on a grid: patch and margin along both axes, none across a line."""
    settings = dict(encoding)
    for name, across in (("patch", 1), ("margin", 0)):
        if name in settings:
            size = settings[name]
            y, x = (size, size) if isinstance(size, int) else size
            settings[name] = (across if grid.height == 1 else y, x)
    return settings


def check(key: str, settings: Settings, kind: Callable[..., Any], given: Sequence[str]) -> None:
    """Raise InputError for a setting that ``kind`` doesn't take; ``given`` are those that are no setting."""
    known = [name for name in inspect.signature(kind).parameters if name not in given]
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"task.args.{key}: no {', '.join(unknown)}; there are {', '.join(known)}")
