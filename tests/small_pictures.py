"""Small sets of pictures in the published layouts, with classes that a network can learn.

A class is a number of stripes, upright or level, in a colour of its own, at a random place under noise: flips and
shifts keep it, and gray pictures show it too. All writers return ``root``.
"""

from __future__ import annotations

import colorsys
import gzip
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(labels: np.ndarray, size: tuple[int, int], classes: int, seed: int = 0) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) of the classes ``labels`` (N,); size: (H, W)."""
    random = np.random.default_rng(seed)
    labels = np.asarray(labels)
    y, x = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
    along = np.where((labels % 2 == 0)[:, None, None], x, y)
    stripes = (1 + labels % 10 // 2)[:, None, None] * along + random.random((len(labels), 1, 1))
    colours = np.array([colorsys.hsv_to_rgb(label / classes, 0.8, 1.0) for label in labels]).reshape(-1, 1, 1, 3)
    light = 0.5 + 0.4 * np.sin(2 * np.pi * stripes)
    pictures = light[..., None] * colours + random.normal(0, 0.06, (len(labels), *size, 3))
    return (255 * pictures.clip(0, 1)).astype(np.uint8)


def labels_of(count: int, classes: int, seed: int) -> np.ndarray:
    """As many of each class as can be, shuffled; int64 (count,)."""
    return np.random.default_rng(seed).permutation(np.arange(count) % classes)


def write_cifar10(root: Path, train: int = 100, test: int = 40, batches: int = 2) -> Path:
    """``train`` pictures over as many data_batch files, and ``test``; 32x32, 10 classes, all about equally often."""
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.array_split(_cifar_rows(train, 10, seed=1), batches)
    for number, (pixels, label) in enumerate(((rows[:, 1:], rows[:, 0]) for rows in rows), 1):
        _pickle(folder / f"data_batch_{number}", data=pixels, labels=label.tolist(), batch_label=f"batch {number}")
    rows = _cifar_rows(test, 10, seed=2)
    _pickle(folder / "test_batch", data=rows[:, 1:], labels=rows[:, 0].tolist(), batch_label="testing batch 1 of 1")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    _pickle(folder / "batches.meta", label_names=names, num_cases_per_batch=train // batches, num_vis=3072)
    return root


def write_cifar100(root: Path, train: int = 200, test: int = 100) -> Path:
    """32x32, 100 classes named class_00 to class_99; as many pictures as there are classes show each once."""
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate({"train": train, "test": test}.items(), 3):
        rows = _cifar_rows(count, 100, seed)
        fine, coarse = rows[:, 0].tolist(), (rows[:, 0] // 5).tolist()
        _pickle(folder / name, data=rows[:, 1:], fine_labels=fine, coarse_labels=coarse)
    fine, coarse = ([f"{kind}_{i:02}" for i in range(n)] for kind, n in (("class", 100), ("group", 20)))
    _pickle(folder / "meta", fine_label_names=fine, coarse_label_names=coarse)
    return root


def write_mnist(root: Path, train: int = 100, test: int = 40, *, zipped: bool = False, folder: str = "MNIST") -> Path:
    """28x28, gray, 10 classes; ``zipped``: as .gz files."""
    raw = Path(root) / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate({"train": train, "t10k": test}.items(), 5):
        labels = labels_of(count, 10, seed)
        pixels = drawn(labels, (28, 28), 10, seed).max(axis=3)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            path = raw / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return root


def write_fashionmnist(root: Path, train: int = 100, test: int = 40, *, zipped: bool = False) -> Path:
    return write_mnist(root, train, test, zipped=zipped, folder="FashionMNIST")


def write_folder(
    root: Path,
    classes: Sequence[str] = ("apple", "pear", "plum"),
    per_class: int = 8,
    size: int = 32,
    splits: Sequence[str] = ("train", "val"),
) -> Path:
    """``per_class`` pictures of each class in each split, or in ``root`` itself where splits is empty; JPEG and PNG,
    each side between ``size`` and one and a half times that."""
    for seed, split in enumerate(splits or ("",), 7):
        random = np.random.default_rng(seed)
        for label, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                height, width = random.integers(size, size * 3 // 2 + 1, 2)
                pixels = drawn(np.array([label]), (height, width), len(classes), seed=int(random.integers(1 << 31)))[0]
                Image.fromarray(pixels).save(folder / f"{i:03}{('.jpg', '.png', '.JPG')[i % 3]}")
    return root


def _cifar_rows(count: int, classes: int, seed: int) -> np.ndarray:
    """uint8 (count, 1 + 3072): a label, then red, green and blue planes, as the binary version has it."""
    labels = labels_of(count, classes, seed)
    planes = drawn(labels, (32, 32), classes, seed).transpose(0, 3, 1, 2).reshape(count, 3072)
    return np.concatenate((labels[:, None].astype(np.uint8), planes), axis=1)


def _pickle(path: Path, **content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))
