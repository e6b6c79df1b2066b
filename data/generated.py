"""Sets that are made rather than fetched: HDF5 files, written on first use and verified on every.

A set is a frozen dataclass of parameters, such as data.burgers.Burgers. Each of its trajectories is a function of the
parameters, the seed and its own number alone: it doesn't depend on how many others are made beside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

Datasets = dict[str, NDArray[np.float32]]


class GeneratedSet(Protocol):
    """What a set says of itself.

    file_name: with every parameter in it. attributes: the file's. shapes: of the datasets that are made.
    coordinates: the grid's, float64, by the names of their datasets.
    """

    @property
    def file_name(self) -> str: ...

    @property
    def attributes(self) -> Mapping[str, float | int]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def coordinates(self) -> Mapping[str, NDArray[np.float64]]: ...

    def datasets(self) -> Datasets:
        """The datasets, made now."""
        ...

    def fault(self, datasets: Datasets) -> str | None:
        """Which law of its physics the datasets break, in a few words, or None."""
        ...


def ensure(folder: Path, generated: GeneratedSet, say: Callable[[str], None] = print) -> Path:
    """The set's HDF5 file in ``folder``, made where it is missing, damaged or another's; ``say`` hears which and why.

    Datasets are float32. The file is written beside and renamed, so that a killed process never leaves half of one;
    the same parameters give the same bytes. RuntimeError where what was made breaks its own physics.
    """
    path = Path(folder) / generated.file_name
    fault = check(path, generated)
    if fault is None:
        return path
    if path.exists():
        say(f"{path}: {fault}; making it anew")
    datasets = generated.datasets()
    if broken := generated.fault(datasets):
        raise RuntimeError(f"{generated}: {broken}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, generated, datasets)
    return path


def check(path: Path, generated: GeneratedSet) -> str | None:
    """What is wrong with the file, in a few words, or None. Reads it whole: about 0.1 s for 30 MB."""
    if not path.is_file():
        return "missing"
    try:
        with h5py.File(path, "r") as file:
            for name, shape in generated.shapes.items():
                if file[name].shape != shape:
                    return f"its {name} holds {file[name].shape}, not {shape}"
            for name, value in generated.attributes.items():
                if file.attrs.get(name) != value:
                    return f"its {name} is {file.attrs.get(name)}, not {value}"
            for name, values in generated.coordinates.items():
                if not np.array_equal(file[name][:], values.astype(np.float32)):
                    return f"its {name} is of another grid"
            if file.attrs.get("sha256") != _digest({name: file[name][:] for name in generated.shapes}):
                return "its content does not match its checksum"
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        return f"can't be read ({error})"
    return None


def _write(path: Path, generated: GeneratedSet, datasets: Datasets) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with h5py.File(beside, "w") as file:
            for name, values in datasets.items():
                file[name] = values
            for name, values in generated.coordinates.items():
                file[name] = values.astype(np.float32)
            file.attrs.update({**generated.attributes, "sha256": _digest(datasets)})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _digest(datasets: Datasets) -> str:
    digest = hashlib.sha256()
    for values in datasets.values():
        digest.update(np.ascontiguousarray(values, "<f4").tobytes())
    return digest.hexdigest()
