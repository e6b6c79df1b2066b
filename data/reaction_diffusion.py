"""Two-dimensional diffusion-reaction trajectories, made on first use.

    u_t = Du (u_xx + u_yy) + u - u^3 - k - v
    v_t = Dv (v_xx + v_yy) + u - v,            (x, y) in (-1, 1)^2, no flow through the boundary

FitzHugh-Nagumo's equations as in PDEBench's 2-D diffusion-reaction set (Takamoto et al., arXiv 2210.07182): its
constants, times, five-point finite volumes and initial conditions, independent normal noise of every cell and species.
The file: ``tensor`` (samples, frames, nx, nx, 2), y before x and u before v, ``x-coordinate`` and ``y-coordinate``
(nx,), ``t-coordinate`` (frames,), attributes ``Du``, ``Dv``, ``k``. PDEBench's own has a group for each sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

from data.generated import Datasets

Array = NDArray[np.float64]

VERSION = 1  # of the numbers: raise it when the same parameters would give other trajectories
FRAME_TIME = 0.05  # time between two saved frames
STEPS = 4  # coarse steps between two frames


@dataclass(frozen=True)
class ReactionDiffusion:
    """One set of trajectories.

    Du, Dv: diffusivities of u and v. k: the reaction's constant. nx: cells of a side. samples: trajectories.
    frames: saved states, 0.05 time units apart, the initial one included; PDEBench has 101. seed: sets of different
    seeds share nothing.
    """

    Du: float = 1e-3
    Dv: float = 5e-3
    k: float = 5e-3
    nx: int = 64
    samples: int = 32
    frames: int = 101
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.nx >= 2 and self.samples >= 1 and self.frames >= 1 and self.seed >= 0
        if not (0 <= self.Du < np.inf and 0 <= self.Dv < np.inf and abs(self.k) <= 1 and sizes):
            raise ValueError(
                f"needs Du >= 0, Dv >= 0, |k| <= 1, nx >= 2, samples >= 1, frames >= 1 and seed >= 0, not {self}"
            )

    @property
    def file_name(self) -> str:
        constants = f"Du{self.Du:g}_Dv{self.Dv:g}_k{self.k:g}"
        sizes = f"nx{self.nx}_t{self.frames}_n{self.samples}_seed{self.seed}"
        return f"reaction_diffusion_{constants}_{sizes}_v{VERSION}.hdf5"

    @property
    def attributes(self) -> dict[str, float | int]:
        return {"Du": self.Du, "Dv": self.Dv, "k": self.k, "seed": self.seed, "version": VERSION}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"tensor": (self.samples, self.frames, self.nx, self.nx, 2)}

    @property
    def coordinates(self) -> dict[str, Array]:
        centres = (2 * np.arange(self.nx) + 1) / self.nx - 1
        times = np.arange(self.frames) * FRAME_TIME
        return {"x-coordinate": centres, "y-coordinate": centres, "t-coordinate": times}

    def datasets(self) -> Datasets:
        return {"tensor": generate(self)}

    def fault(self, datasets: Datasets) -> str | None:
        return fault(datasets["tensor"], self.k)


def generate(reaction: ReactionDiffusion) -> NDArray[np.float32]:
    """The trajectories: float32 (samples, frames, nx, nx, 2). 10 s for 32 of 101 frames and 64 x 64 cells."""
    made = np.empty(reaction.shapes["tensor"], np.float32)
    for n, trajectory in enumerate(made):
        noise = np.random.default_rng((reaction.seed, n)).standard_normal((2, reaction.nx, reaction.nx))
        states = solve(noise, (reaction.Du, reaction.Dv), reaction.k, reaction.frames)
        trajectory[:] = np.moveaxis(states, 1, -1)
    return made


def solve(start: Array, diffusivities: tuple[float, float], k: float, frames: int, steps: int = STEPS) -> Array:
    """Saved states: (2, H, W) initial cell averages of u and v -> float64 (frames, 2, H, W), W cells across (-1, 1).

    From frame to frame Strang's splitting (doi:10.1137/0705041) with ``steps`` steps and with twice as many, which
    Richardson's extrapolation makes one result of fourth order. From the default noise, on 64 x 64 cells, no value of
    101 frames was further than 1.6e-6 from that of four times the steps; on 128 x 128, none of 11 further than 1.5e-5.
    """
    rates = np.array(diffusivities)[:, None, None] * decay_rates(*start.shape[1:])
    states = [start]
    for _ in range(frames - 1):
        coarse = strang(states[-1], rates, k, FRAME_TIME / steps, steps)
        fine = strang(states[-1], rates, k, FRAME_TIME / (2 * steps), 2 * steps)
        states.append((4 * fine - coarse) / 3)
    return np.stack(states)


def decay_rates(height: int, width: int) -> Array:
    """How fast each cosine mode decays under the five-point Laplacian with no flow through the boundary.

    (H, W), for a diffusivity of 1 and cells of 2/W. Mode m of n cells has 4/dx^2 sin^2(pi m / 2n), near (pi m / 2)^2.
    """
    y, x = (width**2 * np.sin(np.pi * np.arange(n) / (2 * n)) ** 2 for n in (height, width))
    return y[:, None] + x


def strang(state: Array, rates: Array, k: float, step: float, steps: int) -> Array:
    """``steps`` steps: half a step of diffusion, exact in cosine modes, one of reaction, half a one of diffusion."""
    half, whole = np.exp(-0.5 * step * rates), np.exp(-step * rates)
    state = diffused(state, half)
    for left in reversed(range(steps)):
        state = reacted(state, k, step)
        state = diffused(state, whole if left else half)  # two halves at once
    return state


def diffused(state: Array, decay: Array) -> Array:
    """The state after every cosine mode has shrunk by its factor."""
    return idctn(decay * dctn(state, axes=(1, 2)), axes=(1, 2))


def reacted(state: Array, k: float, step: float) -> Array:
    """The state after one step of the classical Runge-Kutta method, in each cell alone."""
    first = reaction_rate(state, k)
    second = reaction_rate(state + 0.5 * step * first, k)
    third = reaction_rate(state + 0.5 * step * second, k)
    fourth = reaction_rate(state + step * third, k)
    return state + step / 6 * (first + 2 * (second + third) + fourth)


def reaction_rate(state: Array, k: float) -> Array:
    """(u - u^3 - k - v, u - v) of (u, v) = ``state`` (2, ...)."""
    u, v = state
    difference = u - v
    return np.stack((difference - u * u * u - k, difference))


def fault(states: NDArray[np.float32], k: float) -> str | None:
    """Which law (N, frames, H, W, 2) breaks: none leaves the square |u|, |v| <= M in which it began, M^3 >= 2 M + |k|.

    On its border the reaction points inwards, and diffusion never makes an extreme larger.
    """
    smallest = np.roots([1, 0, -2, -abs(k)]).real.max()
    bound = np.maximum(np.abs(states[:, 0]).max(axis=(1, 2, 3)), smallest)
    excess = (np.abs(states).max(axis=(2, 3, 4)) - bound[:, None]).max()
    return None if excess <= 1e-4 else f"u or v leaves its invariant square by {excess:.1e}"
