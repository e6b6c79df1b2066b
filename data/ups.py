"""Reader of the Universal Physics Stack's HDF5 layout: ``<root>/<task>_<split>.h5``.

A split may be cut into shards, ``<task>_<split>_*.h5``, which are taken in the order of their names. A file has one
dataset ``data``, float32: (N, T, X) or (N, T, X, C) on a line, (N, T, H, W, C) on a plane, with at most 8 channels.
A steady task, Darcy flow, has two frames: the field that is given (permeability) and the solution.

Files of the original's own converter may break this: for ``darcy2d`` it stored the permeability alone, (N, H, W, 1),
to be read as H frames on a line. Such a file is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from data.fields import MOST_CHANNELS, Fields, Stored, arranged_shape, centres, contents, coordinate, opened
from fabric_trainer.errors import InputError

LINE = (
    "burgers1d",
    "advection1d",
    "diffusion_sorption1d",
    "reaction_diffusion1d",
    "cfd1d_shocktube",
    "compressible_ns1d",
)
PLANE = (
    "darcy2d",
    "navier_stokes2d",
    "cfd2d_rand",
    "cfd2d_turb",
    "allen_cahn2d",
    "cahn_hilliard2d",
    "reaction_diffusion2d",
    "shallow_water2d",
)
STEADY = ("darcy2d",)
PERIODIC = (  # as published; all others have walls or open ends
    "burgers1d",
    "advection1d",
    "reaction_diffusion1d",
    "compressible_ns1d",
    "cfd2d_rand",
    "cfd2d_turb",
    "allen_cahn2d",
    "cahn_hilliard2d",
)
TASKS = LINE + PLANE
SPLITS = ("train", "val", "test")

_REFUSED = {
    "darcy2d_mesh": "a mesh",
    "particles_advect": "particles",
    "compressible_ns3d": "a grid of three dimensions",
    "cfd3d": "a grid of three dimensions",
}
_LAYOUTS = {"line": {3: "NTX", 4: "NTXC"}, "plane": {5: "NTHWC"}}
_SHAPES = {"line": "(N, T, X) or (N, T, X, C)", "plane": "(N, T, H, W, C)"}


def check_task(task: str, key: str = "task") -> None:
    """Raise InputError, naming ``key``, unless ``task`` is a grid's name."""
    if task in _REFUSED:
        raise InputError(f"{key}: {task} is on {_REFUSED[task]}; grids of one or two dimensions are read: {_names()}")
    if task not in TASKS:
        raise InputError(f"{key}: {task!r} is none of the tasks: {_names()}")


def files(root: Path, task: str, split: str) -> list[Path]:
    """The file of a split, or its shards in order. Raises InputError where there are none, or both."""
    root = Path(root)
    whole, shards = root / f"{task}_{split}.h5", sorted(root.glob(f"{task}_{split}_*.h5"))
    if whole.is_file() and shards:
        raise InputError(f"{whole} is there and shards beside it ({shards[0].name}, …): keep one of them")
    if whole.is_file():
        return [whole]
    if not shards:
        raise InputError(f"data.root: {task} has no {split} split: expected {whole} or shards {whole.stem}_*.h5")
    return shards


def missing(root: Path, task: str, split: str) -> list[str]:
    """What would stop ``read``: a line, or none. Reads headers only."""
    try:
        read(root, task, split)
    except InputError as error:
        return [str(error)]
    return []


def read(root: Path, task: str, split: str) -> Fields:
    """A split of a task; its fields are read when they are asked for. A split that isn't there is an error: nothing
    takes its place. Raises InputError."""
    check_task(task)
    if split not in SPLITS:
        raise InputError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    paths = files(root, task, split)
    found = [_look(path, task) for path in paths]
    for path, other in zip(paths[1:], found[1:], strict=True):
        if other.shape[1:] != found[0].shape[1:]:
            raise InputError(
                f"{path}: trajectories of {other.shape[1:]}, but {found[0].shape[1:]} (T, C, H, W) in {paths[0].name}"
            )
    counts = tuple(len(other) for other in found)
    shape = (sum(counts), *found[0].shape[1:])
    return replace(found[0], name=f"{task}_{split}", paths=tuple(paths), counts=counts, shape=shape)


def _look(path: Path, task: str) -> Fields:
    """One file's header."""
    kind, steady = ("line" if task in LINE else "plane"), task in STEADY
    with opened(path) as file:
        data = file.get("data")
        if not isinstance(data, h5py.Dataset):
            raise InputError(f"{path}: expected a dataset 'data', found {contents(file)}")
        layout = _LAYOUTS[kind].get(data.ndim)
        if layout is None or 0 in data.shape or (layout[-1] == "C" and data.shape[-1] > MOST_CHANNELS):
            raise InputError(
                f"{path}: expected 'data' of {task} as {_SHAPES[kind]}, C at most {MOST_CHANNELS}, found {data.shape}"
            )
        if data.dtype != np.float32:
            raise InputError(f"{path}: expected 'data' as float32, found {data.dtype}")
        shape = arranged_shape(data.shape, layout)
        if steady and shape[1] != 2:
            raise InputError(
                f"{path}: expected 2 frames, the given field and the solution, found {shape[1]}: {task} is steady"
            )
        t = None if steady else coordinate(file, "t", shape[1])
        x, y = coordinate(file, "x", shape[4]), coordinate(file, "y", shape[3])
        return Fields(
            name=path.stem,
            paths=(path,),
            datasets=(Stored("data", layout),),
            counts=(shape[0],),
            shape=shape,
            steady=steady,
            x=centres(shape[4]) if x is None else x,
            y=centres(shape[3]) if y is None else y,
            t=t,
            attributes=dict(file.attrs),
        )


def _names() -> str:
    return ", ".join(TASKS)
