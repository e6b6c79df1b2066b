"""PDEBench files to the UPS layout: ``python -m tools.convert_dataset FILE --task burgers1d --dataset tensor -o DIR``.

Trajectories, not files, are shared out over train, val and test (80/10/10), by a seed: every split has some of every
file, and so of every viscosity. What the files say about themselves (``Nu``, ``beta``) is kept: as an attribute where
they agree, else as a dataset with one number per trajectory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from data import pdebench, ups
from data.fields import Fields, opened
from fabric_trainer.errors import INPUT, InputError
from fabric_trainer.files import sync_folder

SHARES = {"val": 10, "test": 10}  # per cent of the trajectories, at least one; train has the rest


def convert(
    paths: Sequence[Path],
    task: str,
    out: Path,
    datasets: Sequence[str] = (),
    given: str = "nu",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write ``<out>/<task>_<split>.h5`` and return where they are.

    datasets: the field in the files, or one for each channel; it may be left out where there is only one. given: of a
    steady task, the dataset of what is given. The files are read once, a few trajectories at a time, and the three
    that are written appear together at the end. Raises InputError.
    """
    ups.check_task(task, "--task")
    targets = {split: Path(out) / f"{task}_{split}.h5" for split in ups.SPLITS}
    if not overwrite and (there := [str(path) for path in targets.values() if path.exists()]):
        raise InputError(f"{', '.join(there)} exists: give --overwrite, or another folder")
    names = tuple(datasets) or _only(Path(paths[0]), given if task in ups.STEADY else None)
    sources = [pdebench.fields(path, names, given if task in ups.STEADY else None) for path in paths]
    _fit_together(sources, task)
    split_of = shared_out(sum(len(source) for source in sources), seed)
    Path(out).mkdir(parents=True, exist_ok=True)
    beside = {split: path.with_name(f".{path.name}.{os.getpid()}") for split, path in targets.items()}
    try:
        with ExitStack() as stack:
            files = {split: stack.enter_context(h5py.File(path, "w")) for split, path in beside.items()}
            _write(files, sources, split_of, task)
            for file in files.values():
                file.attrs.update({"from_dataset": ", ".join(names), "split_seed": seed})
                file.attrs["from_files"] = ", ".join(Path(path).name for path in paths)
        for path in beside.values():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for split, path in beside.items():
            os.replace(path, targets[split])
        sync_folder(out)
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    return targets


def shared_out(trajectories: int, seed: int) -> NDArray[np.str_]:
    """The split of every trajectory: 80/10/10 by a seed; a function of the two alone. Raises InputError for fewer than
    three."""
    if trajectories < 3:
        raise InputError(f"{trajectories} trajectories are too few for train, val and test")
    order, split_of = np.random.default_rng(seed).permutation(trajectories), np.full(trajectories, "train")
    first = 0
    for split, share in SHARES.items():
        count = max(1, trajectories * share // 100)
        split_of[order[first : first + count]] = split
        first += count
    return split_of


def _only(path: Path, given: str | None) -> tuple[str, ...]:
    """The one dataset of a file that can be meant. Raises InputError, with all that can."""
    found: dict[str, tuple[int, ...]] = {}

    def look(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 3 and item.dtype.kind == "f" and name != given:
            group, slash, rest = name.partition("/")
            found.setdefault(f"*/{rest}" if slash and group.isdigit() else name, item.shape)

    with opened(path) as file:
        file.visititems(look)
    if len(found) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in found.items())
        raise InputError(f"{path}: name the dataset with --dataset: {listed or 'none holds trajectories'}")
    return tuple(found)


def _fit_together(sources: Sequence[Fields], task: str) -> None:
    kind = "line" if task in ups.LINE else "plane"
    for source in sources:
        if (kind == "line") != (source.shape[3] == 1):
            raise InputError(f"{source.paths[0]}: {task} is on a {kind}, not on {source.shape[3:]} points")
        if source.shape[1:] != sources[0].shape[1:]:
            raise InputError(
                f"{source.paths[0]}: trajectories of {source.shape[1:]}, but {sources[0].shape[1:]} (T, C, H, W) in "
                f"{sources[0].paths[0].name}"
            )


def _write(files: dict[str, h5py.File], sources: Sequence[Fields], split_of: NDArray[np.str_], task: str) -> None:
    _, t, c, h, w = sources[0].shape
    line = task in ups.LINE
    shape = (t, w, c) if line else (t, h, w, c)
    same, different = _attributes(sources)
    for split, file in files.items():
        mine = np.flatnonzero(split_of == split)
        file.create_dataset("data", (len(mine), *shape), np.float32)
        file["x-coordinate"] = sources[0].x
        if not line:
            file["y-coordinate"] = sources[0].y
        if sources[0].t is not None:
            file["t-coordinate"] = sources[0].t
        file["trajectory"] = mine  # its number in the source
        for name, values in different.items():
            file[name] = values[mine]
        file.attrs.update(same)
    first, written = 0, dict.fromkeys(files, 0)
    for source in sources:
        for chunk in source.chunks():
            rows = np.moveaxis(chunk, 2, 4)
            rows = rows[:, :, 0] if line else rows
            where = split_of[first : first + len(rows)]
            for split, file in files.items():
                mine = rows[where == split]
                file["data"][written[split] : written[split] + len(mine)] = mine
                written[split] += len(mine)
            first += len(rows)


def _attributes(sources: Sequence[Fields]) -> tuple[dict[str, object], dict[str, NDArray[np.float64]]]:
    """What all files say alike, and the numbers in which they differ, one per trajectory."""
    # a checksum of the source's is none of ours
    every = [{k: v for k, v in source.attributes.items() if k != "sha256"} for source in sources]
    same = {name: value for name, value in every[0].items() if all(np.array_equal(e.get(name), value) for e in every)}
    different = {}
    for name in {name for own in every for name in own} - set(same):
        values = [np.asarray(own.get(name, np.nan)) for own in every]
        if all(value.ndim == 0 and value.dtype.kind in "fiu" for value in values):
            different[name] = np.repeat([float(value) for value in values], [len(source) for source in sources])
    return same, different


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write PDEBench's HDF5 files in the UPS layout, shared out over train, val and test.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="PDEBench HDF5 files of one grid")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for <task>_<split>.h5")
    parser.add_argument("--task", required=True, help=f"one of {', '.join(ups.TASKS)}")
    parser.add_argument("--dataset", nargs="+", default=[], help="the field, such as tensor, or one for each channel")
    parser.add_argument("--given", default="nu", help="of a steady task: the dataset of what is given")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    try:
        made = convert(args.files, args.task, args.out, args.dataset, args.given, args.seed, args.overwrite)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT
    for split, path in made.items():
        print(f"{path}: {len(ups.read(args.out, args.task, split))} trajectories")
    return 0


if __name__ == "__main__":
    sys.exit(main())
