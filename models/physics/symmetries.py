"""Symmetries of equations: what turns a solution into another one, so that one trajectory teaches of many.

Each sample is turned by draws of its own, all of its states and channels alike. Whether an equation has a symmetry is
for whoever names it to know: the shift needs a periodic domain, the mirror is Burgers' equation's, negation any linear
one's without sources, and reaction-diffusion between closed walls has the flips and the transpose of its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from data.ups import STEADY
from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom
from fabric_trainer.task import Batch
from models.physics.system import Grid

States = Mapping[str, Tensor]
"""By name (B, ..., H, W), a row per sample."""


def shift(states: States, random: SampleRandom) -> dict[str, Tensor]:
    """Along x, and on a plane along y, around the period."""
    height, width = next(iter(states.values())).shape[-2:]
    x = (torch.arange(width) + random.integers("shift x", 0, width, 1)) % width
    y = (torch.arange(height) + random.integers("shift y", 0, height, 1)) % height
    places = (y[:, :, None] * width + x[:, None]).flatten(1)  # (B, H x W)

    def moved(fields: Tensor) -> Tensor:
        flat = fields.flatten(-2)
        return flat.gather(-1, _beside(places, flat).expand_as(flat)).view_as(fields)

    return {name: moved(fields) for name, fields in states.items()}


def mirror(states: States, random: SampleRandom) -> dict[str, Tensor]:
    """Half of them u(x) -> -u(-x)."""
    return _half(states, random.uniform("mirror", 1) < 0.5, lambda fields: -fields.flip(-1))


def negate(states: States, random: SampleRandom) -> dict[str, Tensor]:
    """Half of them u -> -u."""
    return _half(states, random.uniform("negate", 1) < 0.5, torch.neg)


def flip(states: States, random: SampleRandom) -> dict[str, Tensor]:
    """Each axis of half of them the other way round."""
    x, y = (random.uniform("flip", 2) < 0.5).split(1, 1)
    return _half(_half(states, x, lambda fields: fields.flip(-1)), y, lambda fields: fields.flip(-2))


def transpose(states: States, random: SampleRandom) -> dict[str, Tensor]:
    """Half of them with x and y exchanged."""
    return _half(states, random.uniform("transpose", 1) < 0.5, lambda fields: fields.mT)


SYMMETRIES: dict[str, Callable[[States, SampleRandom], dict[str, Tensor]]] = {
    "shift": shift,
    "mirror": mirror,
    "negate": negate,
    "flip": flip,
    "transpose": transpose,
}


def turned(states: States, random: SampleRandom, names: Sequence[str]) -> dict[str, Tensor]:
    """The states after the named symmetries, one after the other."""
    moved = dict(states)
    for name in names:
        moved = SYMMETRIES[name](moved, random)
    return moved


def turn(batch: Batch, grids: Sequence[Grid], names: Sequence[Sequence[str]], horizon: int) -> Batch:
    """A batch whose rows of ``u0``, ``u1`` and ``u_future`` (horizon - 1 frames) are turned, in place, by the
    symmetries that are named for their task."""
    frames = {"u0": 1, "u1": 1, "u_future": horizon - 1}
    flat = {key: batch[key].flatten(1) for key in frames if key in batch}  # views
    tasks = torch.tensor(batch["tasks"])
    for task, (grid, named) in enumerate(zip(grids, names, strict=True)):
        rows = (tasks == task).nonzero()[:, 0]
        if not named or not len(rows):
            continue
        states = {}
        for key, values in flat.items():
            shape = (frames[key] * grid.channels, grid.height, grid.width)
            states[key] = values[rows, : math.prod(shape)].unflatten(1, shape)
        for key, fields in turned(states, batch["random"][rows], named).items():
            values = fields.flatten(1)
            flat[key][rows, : values.shape[1]] = values
    return batch


def check(symmetries: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError for a name that there is none of."""
    for task, names in symmetries.items():
        key = f"task.args.symmetries.{task}"
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise InputError(f"{key}: must be a list of {', '.join(SYMMETRIES)}, not {names!r}")
        if unknown := [str(name) for name in names if name not in SYMMETRIES]:
            raise InputError(f"{key}: {', '.join(unknown)} is none of {', '.join(SYMMETRIES)}")
        if task in STEADY and set(names) & {"mirror", "negate"}:
            raise InputError(f"{key}: what is given and its solution don't change sign together")


def check_grid(task: str, names: Sequence[str], height: int, width: int) -> None:
    """Raise InputError for a symmetry that a grid hasn't."""
    key = f"task.args.symmetries.{task}"
    if "mirror" in names and height > 1:
        raise InputError(f"{key}: mirror is a line's, and the grid is {height} x {width}")
    if "transpose" in names and height != width:
        raise InputError(f"{key}: transpose is a square's, and the grid is {height} x {width}")


def _half(states: States, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """chosen: bool (B, 1), the samples to change."""
    return {
        name: torch.where(_beside(chosen, fields[..., 0]).unsqueeze(-1), change(fields), fields)
        for name, fields in states.items()
    }


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """(B, N) -> (B, 1, ..., 1, N) with as many axes as ``like``."""
    return values.view(len(values), *(1,) * (like.ndim - 2), -1)
