"""Pictures in a folder for each class, in the order of torchvision's ImageFolder: sorted classes, then sorted paths."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.vision.decode import EXTENSIONS
from fabric_trainer.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass
class Listing:
    """Names relative to the root, and their classes' numbers; by split."""

    classes: list[str]
    names: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    def leave_out(self, names: Container[str]) -> None:
        for split, listed in self.names.items():
            keep = [i for i, name in enumerate(listed) if name not in names]
            self.names[split], self.labels[split] = [listed[i] for i in keep], self.labels[split][keep]

    def check(self) -> None:
        """InputError for a class without a picture in train or val."""
        for split in self.names.keys() & {"train", "val"}:
            there = np.bincount(self.labels[split], minlength=len(self.classes))
            if absent := [name for name, count in zip(self.classes, there) if not count]:
                raise InputError(f"data.root: {split} has no picture of class {_listed(absent)}, which train has")


def read_listing(root: Path, val_split: float | None) -> Listing:
    """Files of ``root``/train/<class>, with val and test where they are; of ``root``/<class>, all in ``train``, where
    there is no folder train. Hidden files and folders are left out. InputError where classes don't fit."""
    if not root.is_dir():
        raise InputError(
            f"data.root: no folder {root}; expected {root}/train/<class>/<picture>, or {root}/<class>/<picture>"
        )
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if "train" not in folders:
        if astray := [name for name, folder in folders.items() if _folders(folder)]:
            raise InputError(f"data.root: {root} has {_listed(astray)}, but no folder train")
        folders = {"train": root}
    problem = _split_problem(root, "val" in folders, folders["train"] == root, val_split)
    if problem:
        raise InputError(f"data.val_split: {problem}")
    listing = Listing(_classes(root, folders["train"]))
    for split, folder in folders.items():
        listing.names[split], listing.labels[split] = _listed_files(root, folder, split, listing.classes)
    listing.check()
    return listing


def _split_problem(root: Path, val: bool, single: bool, val_split: float | None) -> str:
    if val_split is None and single:
        return f"{root} is one folder of classes: say what share is for validation, such as 0.1"
    if val_split is None and not val:
        return f"{root} has train but no val: make a folder val, or say what share of train it is, such as 0.1"
    if val_split is not None and val:
        return f"{root} has a folder val already: leave {val_split} out, or move the folder away"
    return ""


def _classes(root: Path, train: Path) -> list[str]:
    classes = _folders(train)
    if len(classes) < 2:
        found = f"one class only ('{classes[0]}')" if classes else "no folder of a class"
        raise InputError(f"data.root: {found} in {train}; expected {train}/<class>/<picture> for two classes or more")
    return classes


def _listed_files(root: Path, folder: Path, split: str, classes: list[str]) -> tuple[list[str], np.ndarray]:
    found = _folders(folder)
    if strange := [name for name in found if name not in set(classes)]:
        raise InputError(f"data.root: {split} has class {_listed(strange)}, which train lacks")
    files = {name: _pictures(folder / name) for name in found}
    if empty := [name for name in found if not files[name]]:
        kinds = ", ".join(EXTENSIONS)
        raise InputError(f"data.root: no picture in {folder}/{empty[0]}{_more(empty)}; pictures end in {kinds}")
    paths = [os.path.relpath(path, root).replace(os.sep, "/") for name in found for path in files[name]]
    numbers = {name: number for number, name in enumerate(classes)}
    return paths, np.repeat([numbers[name] for name in found], [len(files[name]) for name in found]).astype(np.int64)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[str]:
    """The picture files in it and in folders of it, in ImageFolder's order."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found.append((place, sorted(pictures)))
    return [os.path.join(place, name) for place, files in sorted(found) for name in files]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _more(names: list[str]) -> str:
    return f" and in {len(names) - 1} other classes" if len(names) > 1 else ""
