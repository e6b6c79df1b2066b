"""The best that a linear stencil can do: a baseline for the operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.fields import Fields

RADIUS = {"line": 16, "plane": 3}  # grid points on either side, of which a step sees the values
POINTS = 2_000_000  # of the grid, over all states, that a fit sees; the states are spread over the set
_BLOCK = 100_000  # points that are looked at together
_TINY = 1e-13  # of the largest eigenvalue: what is below is float32's rounding of the fields


@dataclass(frozen=True)
class LinearStep:
    """One step of time by a linear, translation-invariant stencil: every channel's change from all channels around.

    weight: float64 (C, C, height, width), both odd; bias: float64 (C,). periodic: the grid goes on at its other edge;
    otherwise with the values at its edge.
    """

    weight: Tensor
    bias: Tensor
    periodic: bool = True

    def __call__(self, fields: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, a step later, in the fields' precision; computed in that of the weights where the
        device has it. ValueError where a periodic grid is shorter than the stencil reaches."""
        exact = torch.float32 if fields.device.type == "mps" else torch.float64
        weight, bias = (part.to(fields.device, exact) for part in (self.weight, self.bias))
        wide = fields.to(exact)
        return (wide + F.conv2d(_padded(wide, weight.shape[2:], self.periodic), weight, bias)).to(fields.dtype)


def fit(pairs: Iterable[tuple[Tensor, Tensor]], radius: tuple[int, int], periodic: bool = True) -> LinearStep:
    """The LinearStep of the least squared error over all pairs: states (B, C, H, W) before and after a step.

    radius: points on either side along y and x; no more than fit once into a periodic grid are used. The normal
    equations are added up in float64, of values less their mean and divided by their spread. Directions in which the
    fields of the set do not vary, beyond float32's rounding, are left out: there nothing changes.
    """
    gram, right, mean, std, size = None, None, None, None, (1, 1)
    for before, after in pairs:
        before, after = before.double(), after.double()
        channels = before.shape[1]
        if gram is None or right is None or mean is None or std is None:
            mean = before.mean((0, 2, 3))
            std = before.std((0, 2, 3), correction=0)
            std = torch.where(std > torch.finfo(torch.float32).eps * mean.abs(), std, torch.ones_like(std))
            fitting = ((length - 1) // 2 if periodic else length - 1 for length in before.shape[2:])
            size = tuple(2 * min(r, most) + 1 for r, most in zip(radius, fitting, strict=True))
            columns = channels * size[0] * size[1] + 1
            gram = before.new_zeros(columns, columns)
            right = before.new_zeros(columns, channels)
        scaled = (before - mean[:, None, None]) / std[:, None, None]
        seen = _padded(scaled, size, periodic).unfold(2, size[0], 1).unfold(3, size[1], 1)  # (B, C, H, W, h, w)
        rows = seen.permute(0, 2, 3, 1, 4, 5).reshape(-1, gram.shape[0] - 1)
        rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
        gram += rows.T @ rows
        right += rows.T @ (after - before).permute(0, 2, 3, 1).reshape(-1, channels)
    if gram is None or right is None or mean is None or std is None:
        raise ValueError("a linear step is fitted to pairs of states: there are none")
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _TINY * values[-1]
    solution = vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept, None])  # (columns, C)
    weight = solution[:-1].T.reshape(len(mean), len(mean), *size) / std[:, None, None]
    bias = solution[-1] - (weight.sum((2, 3)) * mean).sum(1)
    return LinearStep(weight, bias, periodic)


def fit_fields(fields: Fields, stride: int, periodic: bool = True, points: int = POINTS) -> LinearStep:
    """The LinearStep of a set, of ``stride`` frames. Of a large one, states spread evenly over trajectories and
    time: about ``points`` grid points in all. A steady set's step is from what is given to the solution."""
    radius = RADIUS["line"] if fields.shape[3] == 1 else RADIUS["plane"]
    return fit(_pairs(fields, 1 if fields.steady else stride, points), (radius, radius), periodic)


def _pairs(fields: Fields, stride: int, points: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the pairs of states, a few of one trajectory at a time."""
    trajectories, frames, _, height, width = fields.shape
    starts = frames - stride
    states = min(trajectories * starts, max(1, points // (height * width)))
    index = np.unique(np.linspace(0, trajectories * starts - 1, states).astype(np.int64))
    owner, first = index // starts, index % starts
    for trajectory in np.unique(owner):
        u = torch.from_numpy(fields.read(int(trajectory), int(trajectory) + 1)[0])
        moments = torch.from_numpy(first[owner == trajectory])
        for some in moments.split(max(1, _BLOCK // (height * width))):
            yield u[some], u[some + stride]


def _padded(fields: Tensor, size: tuple[int, ...] | torch.Size, periodic: bool) -> Tensor:
    """Enough points around a grid for a stencil of this size to be asked at every one of its own."""
    y, x = (length // 2 for length in size)
    return F.pad(fields, (x, x, y, y), mode="circular" if periodic else "replicate")
