"""The power-function average of EDM2 (arXiv 2312.02696, section 3): its profile, without any weights.

After t updates the weights of time s < t have the share p(s) = (gamma + 1) s^gamma / t^(gamma + 1). Its *width* is the
standard deviation of p relative to t: of 0.1 five sixths of the weight lie on the last fifth, however long the run is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def exponent(width: float) -> float:
    """gamma of a relative width between 0 and ``checks.WIDEST``: the largest root of (gamma + 2)^2 (gamma + 3) =
    (gamma + 1) / width^2."""
    root = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max()
    return max(float(root), 0.0)


def relative_width(gamma: float) -> float:
    """The other way round."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def decay_at(gamma: float, n: int) -> float:
    """What the average keeps at its ``n``-th update, from 1: the share of all before. Nothing at the first."""
    return float((1 - 1 / n) ** (gamma + 1))


# ---- other widths, afterwards -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A profile as a sum of others."""

    coefficients: np.ndarray  # float64, one for each of the others; their sum is 1
    error: float  # of the profile: the norm of the difference, relative to its own
    condition: float  # of the others' inner products, as unit vectors


def fit(profiles: Sequence[tuple[float, int]], wanted: tuple[float, int]) -> Fit:
    """The sum of ``profiles``, given as (gamma, updates), that is nearest to ``wanted``: least squares, as in EDM2's
    algorithm 3, among the sums whose coefficients add up to 1, so that a weight that stood still stays what it was.

    Directions that the profiles hardly differ in, by 1e-12, are left out.
    """
    gammas, times = np.array(profiles, dtype=np.float64).T
    lengths = np.sqrt(inner(gammas, times, gammas, times))
    length = math.sqrt(inner(*wanted, *wanted))
    products = inner(gammas[:, None], times[:, None], gammas, times) / np.outer(lengths, lengths)
    towards = inner(gammas, times, *wanted) / (lengths * length)
    inverse = np.linalg.pinv(products, rcond=1e-12, hermitian=True)
    found, ones = inverse @ towards, length / lengths  # of unit vectors; they weigh ``ones`` in the sum
    found += inverse @ ones * (1 - ones @ found) / (ones @ inverse @ ones)
    error = math.sqrt(max(1 - 2 * towards @ found + found @ products @ found, 0.0))
    return Fit(found * ones, error, float(np.linalg.cond(products)))


def inner(a: np.ndarray | float, t: np.ndarray | float, b: np.ndarray | float, u: np.ndarray | float) -> np.ndarray:
    """The integral of the product of two profiles, of gamma ``a`` after ``t`` updates and ``b`` after ``u``, broadcast:
    (a + 1) (b + 1) / (a + b + 1) min(t, u)^(a + b + 1) / (t^(a + 1) u^(b + 1)), in a form that doesn't overflow."""
    early, late = np.minimum(t, u), np.maximum(t, u)
    last = np.where(np.less(t, u), b, a)  # gamma of the later one
    ratio: np.ndarray = (early / late) ** last / late
    return (np.add(a, 1) * np.add(b, 1)) / (np.add(a, b) + 1) * ratio
