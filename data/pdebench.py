"""Reader of PDEBench's HDF5 layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from fabric_trainer.errors import InputError


@dataclass(frozen=True)
class Trajectories:
    """One-dimensional fields over time.

    u: float32 (N, T, X). x: float32 (X,), cell centres. t: float32 (T,), the times of the frames.
    attributes: the file's own, such as ``Nu``.
    """

    u: NDArray[np.float32]
    x: NDArray[np.float32]
    t: NDArray[np.float32]
    attributes: dict[str, object]


def read(path: Path, dataset: str = "tensor", samples: int | None = None) -> Trajectories:
    """The first ``samples`` trajectories of a file, or all.

    The dataset is named, never guessed: the largest one of a PDEBench file may be an input field. InputError for a
    missing file, and for one that is no HDF5, lacks a dataset or holds another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected PDEBench HDF5 with a dataset '{dataset}'")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from None
    with file:
        for name in (dataset, "x-coordinate", "t-coordinate"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise InputError(f"{path}: expected a dataset '{name}', found {_contents(file)}")
        stored, x, t = file[dataset], file["x-coordinate"][:], file["t-coordinate"][:]
        # t may be one longer than the frames: PDEBench writes the end of the last interval too
        fits = stored.ndim == 3 and stored.shape[2] == len(x) and stored.shape[1] in (len(t), len(t) - 1)
        if not fits:
            raise InputError(
                f"{path}: expected '{dataset}' of shape (samples, times, {len(x)}) with {len(t)} or {len(t) - 1} "
                f"times, found {_contents(file)}"
            )
        u = stored[:samples].astype(np.float32, copy=False)
        return Trajectories(u, x.astype(np.float32), t[: u.shape[1]].astype(np.float32), dict(file.attrs))


def _contents(file: h5py.File) -> str:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(f"'{name}' {item.shape}") if hasattr(item, "shape") else None)
    return ", ".join(names) or "no dataset"
