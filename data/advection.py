"""Advection trajectories in PDEBench's layout, made on first use.

    u_t + beta u_x = 0,   x in (0, 1) periodic

Initial conditions and frames are those of PDEBench's 1-D advection set (Takamoto et al., arXiv 2210.07182). PDEBench
solves numerically; here each state is the exact one, the initial condition at x - beta t. The file: ``tensor``
(samples, frames, nx), ``x-coordinate`` (nx,), ``t-coordinate`` (frames + 1,), attribute ``beta``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.generated import Datasets
from data.waves import centres, draw

Array = NDArray[np.float64]

VERSION = 1  # of the numbers: raise it when the same parameters would give other trajectories
FRAME_TIME = 0.01  # time between two saved frames


@dataclass(frozen=True)
class Advection:
    """One set of trajectories.

    beta: the speed, of either sign. nx: cells of the grid. samples: trajectories. frames: saved states, 0.01 time units
    apart, the initial one included. seed: sets of different seeds share nothing; a Burgers set of the same seed and nx
    starts from the same states.
    """

    beta: float = 0.4
    nx: int = 256
    samples: int = 128
    frames: int = 201
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.nx >= 4 and self.samples >= 1 and self.frames >= 1 and self.seed >= 0
        if not (np.isfinite(self.beta) and sizes):
            raise ValueError(f"needs a finite beta, nx >= 4, samples >= 1, frames >= 1 and seed >= 0, not {self}")

    @property
    def file_name(self) -> str:
        return f"advection_beta{self.beta:g}_nx{self.nx}_t{self.frames}_n{self.samples}_seed{self.seed}_v{VERSION}.hdf5"

    @property
    def attributes(self) -> dict[str, float | int]:
        return {"beta": self.beta, "seed": self.seed, "version": VERSION}

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
        return fault(datasets["tensor"], self.beta)


def generate(advection: Advection) -> NDArray[np.float32]:
    """The trajectories: float32 (samples, frames, nx). 0.3 s for 64 of 201 frames and 256 cells."""
    x, times = centres(advection.nx), np.arange(advection.frames) * FRAME_TIME
    made = np.empty(advection.shapes["tensor"], np.float32)
    for n, trajectory in enumerate(made):
        wave = draw(np.random.default_rng((advection.seed, n)), advection.nx)
        for frame, t in zip(trajectory, times):
            # the period goes from 0 to 1, where the waves have their small jump
            frame[:] = wave((x - advection.beta * t) % 1)
    return made


def fault(u: NDArray[np.float32], beta: float) -> str | None:
    """Which law u (N, frames, X) breaks: after a whole number of cells a state is the first one, shifted.

    So the mean and all norms are those of the first state then. In between they vary by the sums' error on the grid.
    """
    shift = np.arange(u.shape[1]) * FRAME_TIME * beta * u.shape[2]
    for frame in np.flatnonzero(np.abs(shift - np.rint(shift)) < 1e-9):
        error = np.abs(u[:, frame] - np.roll(u[:, 0], int(np.rint(shift[frame])), 1)).max()
        if not error <= 1e-5:
            return f"frame {frame} differs by {error:.1e} from the shifted first one"
    return None if np.isfinite(u).all() else "holds what is no number"
