"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in the published "python version" layout."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fabric_trainer.errors import InputError

Arrays = tuple[np.ndarray, np.ndarray]
"""pixels uint8 (N, H, W, 3), labels int64 (N,)"""


def read_cifar10(root: Path) -> tuple[list[str], dict[str, Arrays]]:
    """Class names, and the splits train and test, of ``root``/cifar-10-batches-py: all data_batch files in the order
    of their numbers. Any number of files and rows is fine, so a subset is."""
    folder = root / "cifar-10-batches-py"
    classes = _names(folder / "batches.meta", "label_names")
    batches = [_read(path, "labels", len(classes)) for path in _batches(folder)]
    train = np.concatenate([pixels for pixels, _ in batches]), np.concatenate([labels for _, labels in batches])
    return classes, {"train": train, "test": _read(folder / "test_batch", "labels", len(classes))}


def read_cifar100(root: Path) -> tuple[list[str], dict[str, Arrays]]:
    """The same of ``root``/cifar-100-python, with its 100 fine classes."""
    folder = root / "cifar-100-python"
    classes = _names(folder / "meta", "fine_label_names")
    return classes, {split: _read(folder / split, "fine_labels", len(classes)) for split in ("train", "test")}


def absent_cifar10(root: Path) -> list[str]:
    """The files that are not there, relative to ``root``."""
    folder = root / "cifar-10-batches-py"
    files = ["data_batch_1", "test_batch", "batches.meta"]
    return [f"{folder.name}/{name}" for name in files[bool(_batches(folder)) :] if not (folder / name).is_file()]


def absent_cifar100(root: Path) -> list[str]:
    folder = root / "cifar-100-python"
    return [f"{folder.name}/{name}" for name in ("train", "test", "meta") if not (folder / name).is_file()]


def _batches(folder: Path) -> list[Path]:
    numbered = (path for path in folder.glob("data_batch_*") if path.name.rpartition("_")[2].isdecimal())
    return sorted(numbered, key=lambda path: int(path.name.rpartition("_")[2]))


def _read(path: Path, label_key: str, classes: int) -> Arrays:
    content = _unpickled(path, "data", label_key)
    try:
        rows, labels = np.asarray(content["data"]), np.asarray(content[label_key])
    except ValueError as error:  # rows of unequal length
        raise InputError(f"{path}: not in CIFAR's layout ({error})") from None
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise InputError(f"{path}: expected data uint8 (pictures, 3072), found {rows.dtype} {rows.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != rows.shape[:1] or not len(labels):
        found = f"{labels.dtype} {labels.shape} for {len(rows)} pictures"
        raise InputError(f"{path}: expected {label_key}, an integer for each of at least one picture, found {found}")
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{path}: {label_key} lie in {labels.min()}..{labels.max()}, not in 0..{classes - 1}")
    pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), labels.astype(np.int64)


def _names(path: Path, key: str) -> list[str]:
    names = _unpickled(path, key)[key]
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: expected {key}, a list of class names")
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _unpickled(path: Path, *keys: str) -> dict[str, Any]:
    """The pickled dict; its keys may be bytes, as Python 3 makes them of Python 2's."""
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise InputError(f"{path}: no pickle in CIFAR's layout ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a pickled dict with {' and '.join(keys)}, found {type(content).__name__}")
    content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    if absent := [key for key in keys if key not in content]:
        raise InputError(
            f"{path}: no {' and no '.join(absent)} in it; found {', '.join(map(str, content)) or 'nothing'}"
        )
    return content


class _ArraysOnly(pickle.Unpickler):
    """Plain containers and numpy arrays: what a pickle otherwise names is code to be run."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before numpy 2
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in Python 2's protocol
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays and plain containers are read")


_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
}
