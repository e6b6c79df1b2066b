"""The random initial conditions of PDEBench's one-dimensional sets (Takamoto et al., arXiv 2210.07182); own code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Wave:
    """A function on the unit interval: a sum of sines A sin(k x + phi), with one of some changes or none.

    amplitude, wavenumber, phase: float64 (4,). absolute, negative: take |u|, then -u. window: multiply by a smooth step
    up and one down at these two places, or None.
    """

    amplitude: Array
    wavenumber: Array
    phase: Array
    absolute: bool
    negative: bool
    window: tuple[float, float] | None

    def __call__(self, x: Array) -> Array:
        """Its values at x: float64 (X,)."""
        u = self.amplitude @ np.sin(self.wavenumber[:, None] * x + self.phase[:, None])
        if self.absolute:
            u = np.abs(u)
        if self.negative:
            u = -u
        if self.window:
            left, right = self.window
            u = u * 0.5 * (np.tanh((x - left) / 0.01) - np.tanh((x - right) / 0.01))
        return u


def centres(nx: int) -> Array:
    """Cell centres of the unit interval: float64 (nx,)."""
    return (np.arange(nx) + 0.5) / nx


def draw(random: np.random.Generator, nx: int) -> Wave:
    """One of PDEBench's random initial conditions for a grid of nx cells.

    Modes 1..4 are drawn twice with replacement, and a mode's multiplicity 0, 1 or 2 multiplies its wavenumber: modes
    that were not drawn add constants, a mode drawn twice has the doubled frequency. The wavenumbers are PDEBench's
    2 pi n / (1 - 1/nx), whole periods between the first and the last centre: around the period there is a small jump.
    """
    x = centres(nx)
    multiplicity = np.bincount(random.integers(0, 4, 2), minlength=4)
    wavenumber = 2 * np.pi * np.arange(1, 5) * multiplicity / (x[-1] - x[0])
    amplitude, phase = random.uniform(size=4), random.uniform(0, 2 * np.pi, 4)
    # drawn whether used or not, so that each draw has its own place in the stream
    chance_absolute, chance_window, sign = random.uniform(size=3)
    left, right = random.uniform(0.1, 0.45), random.uniform(0.55, 0.9)
    window = (left, right) if chance_window < 0.1 else None
    return Wave(amplitude, wavenumber, phase, bool(chance_absolute < 0.1), bool(sign < 0.5), window)


def initial_condition(random: np.random.Generator, nx: int) -> Array:
    """One of them at the cell centres: float64 (nx,)."""
    return draw(random, nx)(centres(nx))
