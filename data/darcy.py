"""Steady Darcy flow through a random medium of two phases, made on first use.

    -div(a grad u) = beta,   u = 0 on the boundary of (0, 1)^2

Layout, phases and source are those of PDEBench's 2-D Darcy set (Takamoto et al., arXiv 2210.07182), the medium that of
the Fourier neural operator's (Li et al., arXiv 2010.08895): a Gaussian random field of covariance (9 - Laplacian)^-2
with no flow through the boundary and no mean, cut at 0. The file: ``nu`` (samples, nx, nx), the permeability a, y
before x; ``tensor`` (samples, 1, nx, nx), the solution; ``x-coordinate``, ``y-coordinate`` (nx,); attribute ``beta``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import idctn
from scipy.sparse import diags
from scipy.sparse.linalg import splu

from data.generated import Datasets
from data.waves import centres

Array = NDArray[np.float64]

VERSION = 1  # of the numbers: raise it when the same parameters would give other samples


@dataclass(frozen=True)
class Darcy:
    """One set of samples.

    beta: the constant source. low, high: permeabilities of the two phases, PDEBench's 0.1 and 1; the Fourier neural
    operator's are 3 and 12. nx: cells of a side. samples: media with their solutions. seed: sets of different seeds
    share nothing.
    """

    beta: float = 1.0
    low: float = 0.1
    high: float = 1.0
    nx: int = 64
    samples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.nx >= 2 and self.samples >= 1 and self.seed >= 0
        if not (0 < self.beta < np.inf and 0 < self.low <= self.high < np.inf and sizes):
            raise ValueError(
                f"needs beta > 0, 0 < low <= high, nx >= 2, samples >= 1 and seed >= 0, all finite, not {self}"
            )

    @property
    def file_name(self) -> str:
        medium = f"beta{self.beta:g}_low{self.low:g}_high{self.high:g}"
        return f"darcy_{medium}_nx{self.nx}_n{self.samples}_seed{self.seed}_v{VERSION}.hdf5"

    @property
    def attributes(self) -> dict[str, float | int]:
        return {"beta": self.beta, "low": self.low, "high": self.high, "seed": self.seed, "version": VERSION}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        medium = (self.nx, self.nx)
        return {"nu": (self.samples, *medium), "tensor": (self.samples, 1, *medium)}

    @property
    def coordinates(self) -> dict[str, Array]:
        return {"x-coordinate": centres(self.nx), "y-coordinate": centres(self.nx)}

    def datasets(self) -> Datasets:
        nu, u = generate(self)
        return {"nu": nu, "tensor": u[:, None]}

    def fault(self, datasets: Datasets) -> str | None:
        return fault(datasets["nu"], datasets["tensor"][:, 0], self.beta)


def generate(darcy: Darcy) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Permeabilities and solutions: float32 (samples, nx, nx) both. 1.3 s for 200 of 64 x 64 cells."""
    nu, u = np.empty((2, *darcy.shapes["nu"]), np.float32)
    for n in range(darcy.samples):
        field = random_field(np.random.default_rng((darcy.seed, n)), darcy.nx)
        nu[n] = np.where(field >= 0, darcy.high, darcy.low)
        u[n] = solve(nu[n].astype(np.float64), darcy.beta)
    return nu, u


def random_field(random: np.random.Generator, nx: int) -> Array:
    """A Gaussian random field at the cell centres: (nx, nx), of covariance (9 - Laplacian)^-2 on cosine modes."""
    mode = np.pi * np.arange(nx)
    deviation = 1 / (mode[:, None] ** 2 + mode**2 + 9)
    deviation[0, 0] = 0
    # an orthonormal mode of the grid is the continuous one, of norm 1 on the unit square, divided by nx
    return nx * idctn(deviation * random.standard_normal((nx, nx)), norm="ortho")


def conductances(a: Array) -> tuple[Array, Array]:
    """Of the faces between cells: (H, W + 1) across x and (H + 1, W) across y, harmonic means.

    At the boundary, half a cell away, twice the cell's own.
    """

    def across(a: Array) -> Array:
        left, right = a[:, :-1], a[:, 1:]
        return np.concatenate((2 * a[:, :1], 2 * left * right / (left + right), 2 * a[:, -1:]), axis=1)

    return across(a), across(a.T).T


def solve(a: Array, source: float | Array) -> Array:
    """u of -div(a grad u) = source with u = 0 around: permeability (H, W), square cells of 1/W -> float64 (H, W).

    Finite volumes of five points, and a sparse direct solver.
    """
    height, width = a.shape
    x, y = conductances(a)
    whole = x[:, :-1] + x[:, 1:] + y[:-1] + y[1:]
    beside = x[:, 1:].copy()
    beside[:, -1] = 0  # the last cell of a row has no neighbour in the next
    beside, above = beside.ravel()[:-1], y[1:-1].ravel()
    matrix = diags([whole.ravel(), -beside, -beside, -above, -above], [0, 1, -1, width, -width], format="csc")
    right = np.broadcast_to(np.asarray(source) / width**2, a.shape).ravel()
    # the matrix is symmetric and positive definite: an ordering for that, and no pivoting
    factors = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return factors.solve(right).reshape(height, width)


def imbalance(a: Array, u: Array, source: float | Array) -> Array:
    """Of each cell: what flows out less what its source gives, over the sum of the sizes of all these terms: (H, W)."""
    x, y = conductances(a)
    along, up = np.pad(u, ((0, 0), (1, 1))), np.pad(u, ((1, 1), (0, 0)))
    out = -np.diff(x * np.diff(along, axis=1), axis=1) - np.diff(y * np.diff(up, axis=0), axis=0)
    given = np.asarray(source) / u.shape[1] ** 2
    size = np.abs(u) * (x[:, :-1] + x[:, 1:] + y[:-1] + y[1:]) + np.abs(given)
    size += x[:, :-1] * np.abs(along[:, :-2]) + x[:, 1:] * np.abs(along[:, 2:])
    size += y[:-1] * np.abs(up[:-2]) + y[1:] * np.abs(up[2:])
    return (out - given) / size


def fault(nu: NDArray[np.float32], u: NDArray[np.float32], beta: float) -> str | None:
    """Which law the samples (N, H, W) break: each cell's balance up to float32's rounding, and u > 0 inside."""
    worst = max(np.abs(imbalance(a, b, beta)).max() for a, b in zip(nu.astype(np.float64), u.astype(np.float64)))
    if not worst <= 1e-6:
        return f"a cell's flows don't balance: {worst:.1e} of their size"
    return None if (u > 0).all() else "u is not positive"
