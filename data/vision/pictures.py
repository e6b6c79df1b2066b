"""Sets of pictures in their published layouts, read into one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.vision import cifar, folder, mnist, scan, split
from data.vision.decode import decode
from data.vision.download import fetch
from fabric_trainer.errors import InputError

Arrays = tuple[np.ndarray, np.ndarray]

NAMED = 10  # corrupt files that are named; of the others the number


@dataclass(frozen=True)
class Pictures:
    """The pictures of one split, in memory or as files.

    labels: int64 (N,). names: file names relative to the root, or such as train/00017 for a set in arrays: the
    picture's place in the published split. pixels: uint8 (N, H, W, 3) of a set in arrays, gray ones three times the
    same; None for files, which lie under ``root``.
    """

    labels: np.ndarray
    names: Sequence[str]
    pixels: np.ndarray | None = None
    root: Path = Path()

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, i: int, least: int | None = None) -> Image.Image:
        """The ``i``-th as RGB. least: a JPEG file may come smaller than it is, with at least as many pixels on its
        shorter side (see :func:`data.vision.decode.decode`). InputError, with its name, for one that can't be decoded:
        it could be when the run began."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i])
        try:
            return decode(self.root / self.names[i], least)
        except Exception as error:  # a damaged file may raise nearly anything
            raise InputError(
                f"{self.root / self.names[i]}: can't be decoded any more; it could be when the run began ({error})"
            ) from error

    def take(self, places: np.ndarray) -> Pictures:
        """Those at ``places``, int64 (n,), in that order. A stretch without gaps shares the pixels' memory."""
        pixels = self.pixels
        if pixels is not None:
            stretch = len(places) > 0 and (np.diff(places) == 1).all()
            pixels = pixels[places[0] : places[-1] + 1] if stretch else pixels[places]
        return Pictures(self.labels[places], [self.names[i] for i in places], pixels, self.root)


@dataclass(frozen=True)
class PictureSets:
    """The splits of one set. classes: their names, by label."""

    name: str
    classes: list[str]
    train: Pictures
    val: Pictures | None
    test: Pictures | None


class _Published(NamedTuple):
    """A set in arrays: how to read it, what of it is absent, its folder under the root and torchvision's name."""

    read: Callable[[Path], tuple[list[str], dict[str, Arrays]]]
    absent: Callable[[Path], list[str]]
    folder: str
    cls_name: str


_PUBLISHED = {
    "cifar10": _Published(cifar.read_cifar10, cifar.absent_cifar10, "cifar-10-batches-py", "CIFAR10"),
    "cifar100": _Published(cifar.read_cifar100, cifar.absent_cifar100, "cifar-100-python", "CIFAR100"),
    **{
        name.lower(): _Published(
            partial(mnist.read_mnist, folder=name), partial(mnist.absent_mnist, folder=name), name, name
        )
        for name in mnist.CLASSES
    },
}
DATASETS = (*_PUBLISHED, "folder")


def read(
    dataset: str,
    root: Path,
    *,
    download: bool = False,
    val_split: float | None = None,
    split_seed: int = 0,
    corrupt_limit: int = 10,
    tell: Callable[[str], None] = print,
) -> PictureSets:
    """The set ``dataset``, one of DATASETS, under ``root``.

    download: fetch it where nothing of it is there. val_split: the share of train that becomes val, the same one for
    the same split_seed. corrupt_limit: files, over all splits, that may be left out because they can't be decoded;
    ``tell`` names them. InputError where something is missing, or not as it should be.
    """
    root = Path(root).expanduser()
    _check(dataset, download, val_split)
    if dataset == "folder":
        classes, splits = _read_folder(root, val_split, corrupt_limit, tell)
    else:
        classes, splits = _read_published(dataset, root, download)
    train, val = splits["train"], splits.get("val")
    if val_split is not None:
        train, val = map(train.take, split.draw(train.names, train.labels, classes, val_split, split_seed))
    return PictureSets(dataset, classes, train, val, splits.get("test"))


def missing(dataset: str, root: Path, *, download: bool = False, val_split: float | None = None) -> list[str]:
    """What would stop :func:`read`, one line each; reads names of files alone."""
    root = Path(root).expanduser()
    try:
        _check(dataset, download, val_split)
        if dataset == "folder":
            folder.read_listing(root, val_split)
        elif problem := _absent(dataset, root, download):
            return [problem]
    except InputError as error:
        return [str(error)]
    return []


def _check(dataset: str, download: bool, val_split: float | None) -> None:
    if dataset not in DATASETS:
        raise InputError(f"task.args.dataset: no set '{dataset}'; one of {', '.join(DATASETS)}")
    if download and dataset == "folder":
        raise InputError("data.download: nobody publishes a folder of your own; leave it false, or name another set")
    split.check(val_split)


def _absent(dataset: str, root: Path, download: bool) -> str:
    """What is to be said of the files that are not there, but would have to be."""
    published = _PUBLISHED[dataset]
    absent = published.absent(root)
    place = root / published.folder
    nothing = not (place.is_dir() and any(place.iterdir()))
    if not absent or (nothing and download):
        return ""
    if nothing:
        expected = f"expected {', '.join(absent)} in {root}"
        return f"data.root: {dataset} is not there: {expected}; data.download: true fetches it"
    return (
        f"data.root: {place} lacks {', '.join(absent)}; move the folder away and data.download: true fetches it whole"
    )


def _read_published(dataset: str, root: Path, download: bool) -> tuple[list[str], dict[str, Pictures]]:
    published = _PUBLISHED[dataset]
    if problem := _absent(dataset, root, download):
        raise InputError(problem)
    if published.absent(root):
        fetch(published.cls_name, published.folder, root)
    classes, arrays = published.read(root)
    return classes, {
        name: Pictures(labels, [f"{name}/{i:05}" for i in range(len(labels))], pixels)
        for name, (pixels, labels) in arrays.items()
    }


def _read_folder(
    root: Path, val_split: float | None, corrupt_limit: int, tell: Callable[[str], None]
) -> tuple[list[str], dict[str, Pictures]]:
    listing = folder.read_listing(root, val_split)
    names = [name for names in listing.names.values() for name in names]
    if found := scan.corrupt(root, names, tell):
        for name, reason in list(found.items())[:NAMED]:
            tell(f"corrupt, left out: {name} ({reason})")
        more = f"{len(found) - NAMED} more, " if len(found) > NAMED else ""
        tell(f"{more}{len(found)} of {len(names)} pictures corrupt; task.args.corrupt_limit is {corrupt_limit}")
    if len(found) > corrupt_limit:
        raise InputError(
            f"task.args.corrupt_limit: {len(found)} of {len(names)} pictures under {root} are corrupt, more than the "
            f"{corrupt_limit} to leave out; mend or delete them, or raise the limit"
        )
    listing.leave_out(found)
    return listing.classes, {
        name: Pictures(listing.labels[name], listing.names[name], root=root) for name in listing.names
    }
