"""MNIST and FashionMNIST in the layout that torchvision keeps them in: idx files, as they are or gzipped.

The format: two zero bytes, a type (8: unsigned byte), the number of axes, each axis's length as a big-endian uint32,
then the values (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from fabric_trainer.errors import InputError

CLASSES = {
    "MNIST": list("0123456789"),
    "FashionMNIST": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
}
_PREFIX = {"train": "train", "test": "t10k"}
_KINDS = ("images-idx3", "labels-idx1")


def read_mnist(root: Path, folder: str) -> tuple[list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Class names, and the splits train and test: pixels uint8 (N, H, W, 3), the gray ones three times; labels int64
    (N,). folder: MNIST or FashionMNIST."""
    splits = {}
    for split in _PREFIX:
        (image_path, images), (label_path, labels) = (_read(root, folder, split, kind) for kind in _KINDS)
        if len(images) != len(labels) or not len(labels):
            raise InputError(f"{image_path}: {len(images)} pictures, but {len(labels)} labels in {label_path.name}")
        if labels.max() > 9:
            raise InputError(f"{label_path}: a label of {labels.max()}; {folder} has 0 to 9")
        splits[split] = np.repeat(images[..., None], 3, axis=3), labels.astype(np.int64)
    return CLASSES[folder], splits


def absent_mnist(root: Path, folder: str) -> list[str]:
    """The files that are there neither plain nor gzipped, relative to ``root``."""
    stems = [_stem(folder, split, kind) for split in _PREFIX for kind in _KINDS]
    return [f"{stem}[.gz]" for stem in stems if not ((root / stem).is_file() or (root / f"{stem}.gz").is_file())]


def _stem(folder: str, split: str, kind: str) -> str:
    return f"{folder}/raw/{_PREFIX[split]}-{kind}-ubyte"


def _read(root: Path, folder: str, split: str, kind: str) -> tuple[Path, np.ndarray]:
    path = root / _stem(folder, split, kind)
    path = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz may raise any of them
        raise InputError(f"{path}: can't be read ({error})") from None
    axes = int(kind[-1])
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes([0, 0, 8, axes]):
        raise InputError(f"{path}: no idx file of unsigned bytes with {axes} axes")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise InputError(f"{path}: {len(data) - start} values, but its head says {' x '.join(map(str, shape))}")
    return path, np.frombuffer(data, np.uint8, offset=start).reshape(shape)
