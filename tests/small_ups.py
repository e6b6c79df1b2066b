"""Small files in the UPS layout, of any task that is on a grid: waves that travel and die away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import h5py
import numpy as np
from numpy.typing import NDArray

from data.ups import PLANE, STEADY

CHANNELS = {  # of the published sets; of the others 1
    "cfd1d_shocktube": 3,
    "compressible_ns1d": 3,
    "navier_stokes2d": 3,
    "cfd2d_rand": 4,
    "cfd2d_turb": 4,
    "reaction_diffusion2d": 2,
}
SAMPLES = {"train": 6, "val": 2, "test": 2}
MODES = 3


def write_ups(
    root: Path, *tasks: str, samples: Mapping[str, int] = SAMPLES, frames: int = 9, cells: int = 32, height: int = 8
) -> Path:
    """``<root>/<task>_<split>.h5`` of each task; returns ``root``. The same arguments give the same values.

    samples: trajectories of each split. cells: points along x. height: along y, of a plane. A steady task has its two
    frames: a medium of two values, and a field above 0.
    """
    root.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for split, count in samples.items():
            with h5py.File(root / f"{task}_{split}.h5", "w") as file:
                file["data"] = trajectories(task, count, frames, cells, height, crc32(f"{task}_{split}".encode()))
    return root


def trajectories(task: str, count: int, frames: int, cells: int, height: int, seed: int) -> NDArray[np.float32]:
    """(N, T, X) or (N, T, X, C) on a line, (N, T, H, W, C) on a plane."""
    plane, channels = task in PLANE, CHANNELS.get(task, 1)
    random = np.random.default_rng(seed)
    time = np.arange(2 if task in STEADY else frames)[:, None, None, None] / 100
    y = ((np.arange(height) + 0.5) / height)[:, None, None] if plane else np.zeros((1, 1, 1))
    x = ((np.arange(cells) + 0.5) / cells)[:, None]
    u = np.zeros((count, len(time), height if plane else 1, cells, channels))
    for mode in range(1, MODES + 1):
        size, phase, speed = (random.normal(size=(count, 1, 1, 1, channels)) for _ in range(3))
        along = random.integers(0, 2, size=(count, 1, 1, 1, channels))  # waves in y, of a plane
        u += size / mode * np.exp(-time * mode) * np.cos(2 * np.pi * (mode * x + along * y - speed * time) + phase)
    if task in STEADY:
        u = np.stack((np.where(u[:, 0] > 0, 12.0, 3.0), 0.1 + 0.01 * u[:, 1] ** 2), 1)
    if not plane:
        u = u[:, :, 0]
    return (u if plane or channels > 1 else u[..., 0]).astype(np.float32)
