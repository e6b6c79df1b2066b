"""Fields on grids over time, in HDF5 files, read as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fabric_trainer.errors import InputError

CHUNK = 64 << 20  # bytes that one read of a stream brings, about
MOST_CHANNELS = 8  # the published layout's own rule: a longer last axis is one of the grid


@dataclass(frozen=True)
class Stored:
    """A dataset of a file and what its axes are: N trajectories, T frames, X or H and W the grid, C channels.

    A name such as ``*/data`` is that of the dataset ``data`` in each of the file's groups, which are N.
    """

    name: str
    layout: str


@dataclass(frozen=True)
class Fields:
    """Trajectories of fields on a regular grid, float32 (N, T, C, H, W) however the file has them; H is 1 on a line.

    name: for messages, such as ``burgers1d_train``. paths: the files, of one layout, one after the other.
    datasets: what is read of each: one, or several that are the channels, or, where ``steady``, the two frames.
    steady: a problem without time, as two frames: what is given (a permeability) and the solution.
    x: float32 (W,), y: float32 (H,): the coordinates that the file has, else cell centres of the unit interval.
    t: float32 (T,), the times of the frames, or None where the file has none. attributes: the first file's.
    """

    name: str
    paths: tuple[Path, ...]
    datasets: tuple[Stored, ...]
    counts: tuple[int, ...]  # trajectories of each file
    shape: tuple[int, int, int, int, int]
    steady: bool
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    t: NDArray[np.float32] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Trajectories ``start:stop``, or all: float32 (n, T, C, H, W)."""
        start, stop, _ = slice(start, stop).indices(len(self))
        pieces, first = [], 0
        for path, count in zip(self.paths, self.counts, strict=True):
            a, b = max(start - first, 0), min(stop - first, count)
            if a < b:
                with opened(path) as file:
                    pieces.append(self._rows(file, slice(a, b), slice(None)))
            first += count
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), np.float32)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """All trajectories in order, a few at a time: about 64 MB, at least one."""
        size = max(1, CHUNK // (4 * int(np.prod(self.shape[1:]))))
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def tensor(self) -> Tensor:
        """All of them in memory: float32 (N, T, C, H, W)."""
        return torch.from_numpy(self.read())

    def __getitem__(self, key: tuple[Any, Any]) -> Tensor:
        """Single states, as a tensor (N, T, …) has them: two int arrays (B,), the trajectories and the frames, or ones
        that broadcast to a shape (…) -> float32 (…, C, H, W)."""
        trajectory, frame = np.broadcast_arrays(*(np.asarray(part) for part in key))
        out = np.empty((trajectory.size, *self.shape[2:]), np.float32)
        part = np.searchsorted(self._ends, trajectory.ravel(), side="right")
        for number in np.unique(part):
            with opened(self.paths[number]) as file:
                for row in np.flatnonzero(part == number):
                    at = int(trajectory.flat[row]) - int(self._ends[number]) + self.counts[number]
                    moment = int(frame.flat[row])
                    out[row] = self._rows(file, slice(at, at + 1), slice(moment, moment + 1))[0, 0]
        return torch.from_numpy(out.reshape(*trajectory.shape, *self.shape[2:]))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(self.counts)

    def _rows(self, file: h5py.File, rows: slice, frames: slice) -> NDArray[np.float32]:
        if self.steady and len(self.datasets) == 2:  # each is one frame
            asked = range(2)[frames]
            pieces = [arranged(taken(file, self.datasets[k].name, rows), self.datasets[k].layout) for k in asked]
            return np.concatenate(pieces, axis=1).astype(np.float32, copy=False)
        pieces = [arranged(taken(file, stored.name, rows, frames), stored.layout) for stored in self.datasets]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=2)
        return np.ascontiguousarray(joined, np.float32)


def taken(file: h5py.File, name: str, rows: slice, *rest: slice) -> NDArray[Any]:
    """Some rows of a dataset, or of one that lies in groups."""
    if not name.startswith("*/"):
        return file[name][(rows, *rest)]
    return np.stack([file[f"{group}/{name[2:]}"][rest] for group in groups(file, name)[rows]])


def groups(file: h5py.File, name: str) -> list[str]:
    """The groups that have the dataset of a name such as ``*/data``, in the order of their names."""
    return [group for group in sorted(file) if isinstance(file.get(f"{group}/{name[2:]}"), h5py.Dataset)]


def arranged(values: NDArray[Any], layout: str) -> NDArray[Any]:
    """Axes named by ``layout``, such as NTX or NTHWC, to (N, T, C, H, W); those that it lacks get length 1."""
    layout = layout.replace("X", "W")
    missing = [axis for axis in "NTCHW" if axis not in layout]
    order = layout + "".join(missing)
    return values.reshape(values.shape + (1,) * len(missing)).transpose([order.index(axis) for axis in "NTCHW"])


def arranged_shape(shape: Sequence[int], layout: str) -> tuple[int, int, int, int, int]:
    """The shape that ``arranged`` makes of a shape."""
    lengths = dict(zip(layout.replace("X", "W"), shape, strict=True))
    n, t, c, h, w = (int(lengths.get(axis, 1)) for axis in "NTCHW")
    return n, t, c, h, w


def opened(path: Path) -> h5py.File:
    """The file, to read. Raises InputError where it is missing or no HDF5."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from None


def contents(file: h5py.File) -> str:
    """The names and shapes of a file's datasets, in one line; the first sixteen."""
    names: list[str] = []
    file.visititems(lambda name, item: names.append(f"'{name}' {item.shape}") if hasattr(item, "shape") else None)
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return (", ".join(names[:16]) or "no dataset") + more


def centres(size: int) -> NDArray[np.float32]:
    """Cell centres of the unit interval: float32 (size,)."""
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


def coordinate(file: h5py.File, axis: str, size: int) -> NDArray[np.float32] | None:
    """``x-coordinate`` and its like, or ``grid/x`` of the first group, where the file has it. ``t`` may be one longer
    than the frames: PDEBench writes the end of the last interval too. Raises InputError for another length."""
    stored = file.get(f"{axis}-coordinate", file.get(f"{min(file, default='')}/grid/{axis}"))
    if not isinstance(stored, h5py.Dataset):
        return None
    right = (size, size + 1) if axis == "t" else (size,)
    if stored.ndim != 1 or len(stored) not in right:
        raise InputError(f"{file.filename}: '{axis}-coordinate' {stored.shape} does not fit {size} points")
    return stored[:size].astype(np.float32)
