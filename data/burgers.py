"""Burgers trajectories in PDEBench's layout, made on first use.

    u_t + (u^2/2)_x = (nu/pi) u_xx,   x in (0, 1) periodic

Equations, scheme and initial conditions are those of PDEBench's 1-D Burgers set (Takamoto et al., NeurIPS 2022, which
divides its ``Nu`` by pi); the code is our own. The file: ``tensor`` (samples, frames, nx), ``x-coordinate`` (nx,),
``t-coordinate`` (frames + 1,), attribute ``Nu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.generated import Datasets
from data.waves import centres, initial_condition

Array = NDArray[np.float64]

VERSION = 1  # of the numbers: raise it when the same parameters would give other trajectories
FRAME_TIME = 0.01  # time between two saved frames
CFL = 0.25
CHUNK = 128  # trajectories solved together: enough to hide Python's cost, little enough for a core's cache


@dataclass(frozen=True)
class Burgers:
    """One set of trajectories.

    nu: PDEBench's ``Nu``; the viscosity is nu / pi. nx: cells of the grid. samples: trajectories.
    frames: saved states, 0.01 time units apart, the initial one included. seed: sets of different seeds share nothing.
    """

    nu: float = 0.01
    nx: int = 256
    samples: int = 128
    frames: int = 201
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.nu >= 0 and self.nx >= 4 and self.samples >= 1 and self.frames >= 1 and self.seed >= 0):
            raise ValueError(f"needs nu >= 0, nx >= 4, samples >= 1, frames >= 1 and seed >= 0, not {self}")

    @property
    def file_name(self) -> str:
        return f"burgers_nu{self.nu:g}_nx{self.nx}_t{self.frames}_n{self.samples}_seed{self.seed}_v{VERSION}.hdf5"

    @property
    def attributes(self) -> dict[str, float | int]:
        """What the file says about itself; ``Nu`` is PDEBench's own."""
        return {"Nu": self.nu, "seed": self.seed, "version": VERSION}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"tensor": (self.samples, self.frames, self.nx)}

    @property
    def coordinates(self) -> dict[str, Array]:
        """``t-coordinate`` is one longer than the frames, as in PDEBench."""
        return {"x-coordinate": centres(self.nx), "t-coordinate": np.arange(self.frames + 1) * FRAME_TIME}

    def datasets(self) -> Datasets:
        return {"tensor": generate(self)}

    def fault(self, datasets: Datasets) -> str | None:
        return fault(datasets["tensor"])


def generate(burgers: Burgers) -> NDArray[np.float32]:
    """The trajectories: float32 (samples, frames, nx). About 3 s for 128 of 201 frames and 256 cells, nu 0.01."""

    def chunk(first: int) -> NDArray[np.float32]:
        numbers = range(first, min(first + CHUNK, burgers.samples))
        start = np.stack([initial_condition(np.random.default_rng((burgers.seed, n)), burgers.nx) for n in numbers])
        return solve(start, burgers.nu / np.pi, burgers.frames).astype(np.float32)

    # threads don't help: numpy's calls on arrays of this size are too short to overlap
    return np.concatenate([chunk(first) for first in range(0, burgers.samples, CHUNK)])


def fault(u: NDArray[np.float32]) -> str | None:
    """Which law u (N, frames, X) breaks by more than rounding: its mean is conserved, its energy never grows."""
    u = u.astype(np.float64)
    scale = np.abs(u).max()
    drift = np.abs(u.mean(2) - u[:, :1].mean(2)).max()
    if not drift <= 1e-6 * scale:
        return f"the mean of u drifts by {drift:.1e}"
    growth = np.diff((u**2).mean(2), axis=1).max(initial=0)
    if not growth <= 1e-6 * scale**2:
        return f"the energy grows by {growth:.1e} in a frame"
    return None


def solve(start: Array, viscosity: float, frames: int, frame_time: float = FRAME_TIME) -> Array:
    """Saved states of u_t + (u^2/2)_x = viscosity u_xx: (N, X) initial cell averages -> float64 (N, frames, X).

    The midpoint rule in time. Every trajectory takes its own steps, at most CFL min(dx / max|u|, dx^2 / (2 viscosity))
    and cut to end on the next frame; one that is there waits with a step of 0.
    """
    u, dx = start.T.astype(np.float64, order="C"), 1.0 / start.shape[1]
    diffusive = 0.5 * dx**2 / viscosity if viscosity > 0 else np.inf
    outflow, change, saved = Outflow(u.shape, viscosity), np.empty_like(u), [u.copy()]
    for _ in range(frames - 1):
        left = np.full(u.shape[1], frame_time)
        while left.any():
            fastest = np.maximum(u.max(axis=0), -u.min(axis=0))
            step = np.minimum(CFL * np.minimum(dx / np.maximum(fastest, 1e-12), diffusive), left)
            outflow(u, change)
            change *= -0.5 * step
            change += u  # the state in the middle of the step
            outflow(change, change)
            change *= step
            u -= change
            left -= step
        saved.append(u.copy())
    return np.stack(saved).transpose(2, 0, 1)


class Outflow:
    """What flows out of each cell per unit of time and length: (X, N) -> ``out`` (X, N), which may be the same array.

    Finite volumes: linear states inside the cells with monotonised-central slopes (van Leer 1977), the upwind flux at
    the faces, and central diffusion. Upwind by the sign of a + b is what PDEBench writes as
    (a^2 + b^2)/4 - |a + b| (b - a)/4 for the states a and b on either side.

    Space comes first in memory, so that a shift in space is a contiguous slice, and the arrays in between are kept:
    to allocate them in every call costs up to six times the arithmetic.
    """

    def __init__(self, shape: tuple[int, ...], viscosity: float) -> None:
        cells, samples = shape
        self.dx = 1.0 / cells
        self.diffusion = viscosity / self.dx
        self.around = np.empty((cells + 4, samples))
        self.jump = np.empty((cells + 3, samples))
        self.low, self.high, self.slope = np.empty((3, cells + 2, samples))

    def __call__(self, u: Array, out: Array) -> None:
        around, jump, low, high, slope = self.around, self.jump, self.low, self.high, self.slope
        around[:2], around[2:-2], around[-2:] = u[-2:], u, u[:2]  # periodic ghost cells
        np.subtract(around[1:], around[:-1], out=jump)
        np.minimum(jump[:-1], jump[1:], out=low)
        np.maximum(jump[:-1], jump[1:], out=high)
        # half of minmod(2 low, 2 high, (low + high)/2): 0 where the signs differ, else no steeper than either side
        np.add(low, high, out=slope)
        slope *= 0.25
        np.minimum(slope, np.maximum(low, 0, out=low), out=slope)
        np.maximum(slope, np.minimum(high, 0, out=high), out=slope)
        left = np.add(around[1:-1], slope, out=low)[:-1]  # of each face
        right = np.subtract(around[1:-1], slope, out=high)[1:]
        flux = np.add(left, right, out=slope[:-1])
        np.copyto(left, right, where=flux <= 0)
        np.multiply(left, left, out=flux)
        flux *= 0.5
        jump *= self.diffusion
        flux -= jump[1:-1]
        np.subtract(flux[1:], flux[:-1], out=out)
        out /= self.dx
