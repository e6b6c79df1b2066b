"""The states of a stage's trajectories: fields, their latents, and how much they change in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import latent_cache
from data.fields import Fields
from data.normalise import Normaliser
from data.pairs import States
from models.physics.encoder import GridEncoder

RESIDENT = 1 << 30  # bytes of fields of a split that are kept in memory; more are read as they are asked for
SCALED_BY = 256  # trajectories from which the RMS of a step's change is taken


@dataclass(frozen=True)
class Cache:
    """Where latents are kept. encoding: the encoder's settings. dtype: "float32" or "float16"."""

    folder: Path
    encoding: Mapping[str, Any]
    dtype: str

    def latents(self, fields: Fields, normaliser: Normaliser, encoder: GridEncoder) -> latent_cache.Latents:
        configuration = {key: value for key, value in self.encoding.items() if key != "seed"}  # which the weights show
        return latent_cache.ensure(self.folder, fields, normaliser, encoder, configuration, self.dtype)


def states_of(cache: Cache | None, fields: Fields, normaliser: Normaliser, encoder: GridEncoder) -> dict[str, States]:
    """``u``, the fields, in memory where they are small, and ``z``, their latents from the cache; without a cache the
    network makes them, of what a sample has become."""
    states: dict[str, States] = {"u": fields.tensor() if 4 * math.prod(fields.shape) <= RESIDENT else fields}
    return states if cache is None else states | {"z": cache.latents(fields, normaliser, encoder)}


@torch.no_grad()
def changes(time_stride: int, fields: Fields, normaliser: Normaliser, encoder: GridEncoder) -> tuple[float, float]:
    """RMS of a step's change in latents and in normalised fields, from the first trajectories; 1 where nothing ever
    changes, which has no scale of its own."""
    stride = 1 if fields.steady else time_stride
    latent = field = 0.0
    count = min(len(fields), SCALED_BY)
    for start in range(0, count, 32):
        u = normaliser(torch.from_numpy(fields.read(start, min(start + 32, count))))
        field += (u[:, stride:] - u[:, :-stride]).double().pow(2).flatten(1).mean(1).sum().item()
        z = torch.cat([encoder(some) for some in u.flatten(0, 1).split(latent_cache.STATES)])
        z = z.unflatten(0, u.shape[:2])
        latent += (z[:, stride:] - z[:, :-stride]).double().pow(2).flatten(1).mean(1).sum().item()
    return math.sqrt(latent / count) or 1.0, math.sqrt(field / count) or 1.0
