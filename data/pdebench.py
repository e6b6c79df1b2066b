"""Reader of PDEBench's HDF5 layout, on lines and planes.

``tensor`` (N, T, X), (N, T, H, W) or (N, T, H, W, C) with ``x-coordinate``, on planes ``y-coordinate``, and
``t-coordinate``; a system may have a dataset per channel. Darcy flow has ``nu`` (N, H, W), the permeability that is
given, and ``tensor`` (N, 1, H, W), the solution. Some sets have a group per trajectory, ``0000/data`` (T, H, W, C) or
(T, X, C) with ``0000/grid``: their dataset is ``*/data``. The last axis of a plane is taken for x.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py

from data.fields import MOST_CHANNELS, Fields, Stored, arranged_shape, centres, contents, coordinate, groups, opened
from fabric_trainer.errors import InputError


def fields(path: Path, datasets: str | Sequence[str] = "tensor", given: str | None = None) -> Fields:
    """A file's fields on a line or a plane, read when they are asked for.

    datasets: the field, or one for each channel; named, never guessed: the largest one may be an input. given: of a
    steady problem, the dataset of what is given, ``nu`` for Darcy flow; then the two are the frames. Raises InputError.
    """
    path = Path(path)
    names = (datasets,) if isinstance(datasets, str) else tuple(datasets)
    if given is not None and (len(names) > 1 or given in names):
        raise InputError(f"{path}: a steady problem has one solution beside what is given ({given}), not {names}")
    with opened(path) as file:
        found = [_stored(file, name, steady=given is not None) for name in ((given, *names) if given else names)]
        first = found[0][1]
        for stored, shape in found[1:]:
            if shape[:2] + shape[3:] != first[:2] + first[3:] or (given and shape != first):
                raise InputError(f"{path}: '{stored.name}' {shape} does not fit {first} (N, T, C, H, W)")
        n, t, _, h, w = first
        x, y = coordinate(file, "x", w), coordinate(file, "y", h)
        return Fields(
            name=path.stem,
            paths=(path,),
            datasets=tuple(stored for stored, _ in found),
            counts=(n,),
            shape=(n, 2, first[2], h, w) if given else (n, t, sum(shape[2] for _, shape in found), h, w),
            steady=given is not None,
            x=centres(w) if x is None else x,
            y=centres(h) if y is None else y,
            t=None if given else coordinate(file, "t", t),
            attributes=dict(file.attrs),
        )


def _stored(file: h5py.File, name: str, steady: bool) -> tuple[Stored, tuple[int, int, int, int, int]]:
    """What a dataset's axes are, and its shape as (N, T, C, H, W). A file with a ``y-coordinate`` is on a plane."""
    parts = groups(file, name) if name.startswith("*/") else []
    stored = file.get(f"{parts[0]}/{name[2:]}" if parts else name)
    if not isinstance(stored, h5py.Dataset):
        raise InputError(f"{file.filename}: expected a dataset '{name}', found {contents(file)}")
    for part in parts:
        if (other := file[f"{part}/{name[2:]}"].shape) != stored.shape:
            raise InputError(f"{file.filename}: '{part}/{name[2:]}' {other} is not of the first's {stored.shape}")
    stored_shape = (len(parts), *stored.shape) if parts else stored.shape
    axes = len(stored_shape)
    plane = steady or axes == 5 or "y-coordinate" in file
    layouts = {4: "NTHW", 5: "NTHWC"} if plane else {3: "NTX", 4: "NTXC"}
    layout = "NHW" if steady and axes == 3 else layouts.get(axes)
    shape = arranged_shape(stored_shape, layout) if layout else (0, 0, 0, 0, 0)
    if layout is None or 0 in shape or shape[2] > MOST_CHANNELS or (steady and shape[1] != 1):
        right = "(N, H, W) or (N, 1, H, W)" if steady else "(N, T, H, W[, C])" if plane else "(N, T, X[, C])"
        raise InputError(f"{file.filename}: expected '{name}' as {right}, found {stored_shape}")
    if stored.dtype.kind != "f":
        raise InputError(f"{file.filename}: expected '{name}' as floating point, found {stored.dtype}")
    return Stored(name, layout), shape
