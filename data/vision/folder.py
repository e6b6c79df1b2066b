"""Pictures in a folder for each class, in the order of torchvision's ImageFolder: sorted classes, then sorted paths."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.vision.decode import EXTENSIONS
from fabric_trainer.errors import InputError

SPLITS = ("train", "val", "test")


@dataclass
class Listing:
    """Files by split: their names relative to the root, and int64 labels (N,), places in ``classes``."""

    classes: list[str]
    names: dict[str, list[str]]
    labels: dict[str, np.ndarray]

    def leave_out(self, names: Container[str]) -> None:
        """InputError where a split is then without a class; test may lack one, but not all."""
        for split, listed in self.names.items():
            keep = [i for i, name in enumerate(listed) if name not in names]
            self.names[split], self.labels[split] = [listed[i] for i in keep], self.labels[split][keep]
            there = set(self.labels[split].tolist())
            absent = [name for label, name in enumerate(self.classes) if label not in there]
            if absent and (split != "test" or not there):
                raise InputError(f"data.root: {split} has no picture of class {_listed(absent)}")


def read_listing(root: Path, val_split: float | None) -> Listing:
    """Files of ``root``/train/<class>, with val and test where they are; of ``root``/<class>, all in ``train``, where
    there is no folder train. Hidden files and folders are left out. InputError where the classes of splits don't fit
    one another, and where nothing, or both of a folder and ``val_split``, says what is for validation."""
    try:
        folders = _split_folders(root)
        _check_val(root, folders, val_split)
        classes = _folders(root / folders["train"])
        if len(classes) < 2:
            found = f"one class only ('{classes[0]}')" if classes else "no folder of a class"
            place = root / folders["train"]
            raise InputError(f"data.root: {found} in {place}; expected {place}/<class>/<picture>, two classes or more")
        files = {split: _files(root, split, folder, classes) for split, folder in folders.items()}
    except OSError as error:
        raise InputError(f"data.root: {error.filename} can't be read ({error.strerror})") from None
    names = {split: [name for of_class in found for name in of_class] for split, found in files.items()}
    labels = {
        split: np.repeat(np.arange(len(classes)), [len(of_class) for of_class in files[split]]) for split in files
    }
    listing = Listing(classes, names, labels)
    listing.leave_out(())
    return listing


def _split_folders(root: Path) -> dict[str, str]:
    """The folders of the splits that are there, relative to ``root``."""
    if not root.is_dir():
        raise InputError(f"data.root: no folder {root}; expected {root}/train/<class>/<picture>, or {root}/<class>/…")
    folders = {split: split for split in SPLITS if (root / split).is_dir()}
    if "train" in folders:
        return folders
    if astray := [split for split in folders if _folders(root / split)]:
        raise InputError(f"data.root: {root} has {_listed(astray)}, but no folder train")
    return {"train": ""}


def _check_val(root: Path, folders: dict[str, str], val_split: float | None) -> None:
    if "val" in folders and val_split is not None:
        raise InputError(f"data.val_split: {root} has a folder val: leave {val_split} out, or move the folder away")
    if "val" not in folders and val_split is None:
        found = "has train but no val" if folders["train"] else "is one folder of classes"
        raise InputError(f"data.val_split: {root} {found}; say what share is for validation, such as 0.1")


def _files(root: Path, split: str, folder: str, classes: list[str]) -> list[list[str]]:
    """Names relative to ``root``, by class."""
    found = _folders(root / folder)
    if strange := [name for name in found if name not in set(classes)]:
        raise InputError(f"data.root: {split} has class {_listed(strange)}, which train lacks")
    files = [_pictures(root, f"{folder}/{name}".lstrip("/")) if name in found else [] for name in classes]
    if empty := [name for name, of_class in zip(classes, files) if name in found and not of_class]:
        kinds = ", ".join(EXTENSIONS)
        raise InputError(
            f"data.root: no picture of class {_listed(empty)} in {root / folder}; expected files of {kinds}"
        )
    return files


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(root: Path, folder: str) -> list[str]:
    """The picture files in it and in folders of it, relative to ``root``."""

    def stop(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(root / folder, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = sorted(name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        found.append((place, os.path.relpath(place, root).replace(os.sep, "/"), pictures))
    return [f"{place}/{name}" for _, place, pictures in sorted(found) for name in pictures]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
