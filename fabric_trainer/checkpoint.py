"""Checkpoint files: one plain dict each, written in the background, verified by hash, rotated.

A file is written beside, synced, entered into ``index.json`` with its sha256, and renamed; ``last.pt`` and
``best.pt`` are links. Killed at any point, the folder holds the older files and an index that knows them. A sharded
checkpoint (``sharded``) is a folder instead, and its links are ``last`` and ``best``; all else holds for it too.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_trainer import sharded
from fabric_trainer.config import CheckpointConfig
from fabric_trainer.errors import CheckpointError, InputError
from fabric_trainer.files import HashingFile, hidden, remove, sync_folder, write_atomically
from fabric_trainer.portable import Leaf, local, whole
from fabric_trainer.sharded import disk_error, sha256

INDEX = "index.json"
Written = Callable[[Path, dict[str, Any]], None]


class Checkpoints:
    """The checkpoint folder of a run; on rank 0 alone.

    written: called with the path and the index entry of each file once it is complete, in the thread that wrote it.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, written: Written = lambda path, entry: None) -> None:
        self.folder, self.config, self.written = folder, config, written
        folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, dict[str, Any]] = read_index(folder)
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        for leftover in folder.glob(".*.tmp"):
            remove(leftover)

    def save(self, state: dict[str, Any], counters: dict[str, Any], metrics: dict[str, float], keep: bool) -> Path:
        """Copy ``state`` now and write it in the background; returns the file's path-to-be.

        Where the state is in pieces, the other ranks must call :func:`take_part` with theirs. counters must have
        ``window`` and ``step``; metrics are of an evaluation of exactly these weights, or empty.
        keep: never rotate it away. Raises CheckpointError for the write before this one.
        """
        self.wait()
        path = self.folder / file_name(self.config.name, counters, metrics)
        snapshot = self._snapshot.take(state)
        arguments = (path, snapshot, make_entry(counters, metrics, keep))
        self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._writer.start()
        return path

    def check(self) -> None:
        """Raise CheckpointError where the write in the background failed."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Until the file is on disk. Raises CheckpointError where it could not be written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def forget_after(self, window: int) -> None:
        """Drop from the index what lies after ``window``: a resumed run will write its own."""
        self.index = {name: entry for name, entry in self.index.items() if entry["window"] <= window}
        self._write_index()

    def is_best(self, value: float) -> bool:
        """Whether ``value`` of the monitored metric beats all that are on disk or under way."""
        self.wait()
        ranked = self._ranked()
        return bool(self.config.top_k) and (not ranked or self._order(value) < self._order_of(ranked[0]))

    def best(self) -> tuple[Path, dict[str, Any]] | None:
        """The best by the monitored metric, and its entry in the index."""
        ranked = self._ranked()
        return (self.folder / ranked[0], self.index[ranked[0]]) if ranked else None

    # ---- in the background --------------------------------------------------------------------------------------

    def _write(self, path: Path, state: dict[str, Any], entry: dict[str, Any]) -> None:
        try:
            with HashingFile(hidden(path)) as file:
                torch.save(state, file)  # type: ignore[arg-type]
            entry |= {"sha256": file.sha256, "bytes": file.bytes}
            self.enter(path, entry)
        except Exception as error:  # raised again in the training thread, by wait()
            cause = disk_error(error)
            self._error = error if cause is None else not_written(path, cause)
            return
        try:
            self.written(path, entry)
        except Exception as error:  # likewise
            self._error = error

    def enter(self, path: Path, entry: dict[str, Any]) -> None:
        """Give what was written beside its name, and drop what is no longer to be kept."""
        self.index[path.name] = entry
        self._write_index()  # before the rename: a file that has its name is always in the index
        if path.is_dir():  # of the same step, from before a resume: nothing can replace a folder
            remove(path)
        os.replace(hidden(path), path)
        sync_folder(self.folder)
        self._link("last", path.name)
        ranked = self._ranked()
        if ranked:
            self._link("best", ranked[0])
        self._rotate()

    def _rotate(self) -> None:
        newest = sorted(self.index, key=lambda name: self.index[name]["window"])[-self.config.keep_last :]
        kept = {*newest, *self._ranked()[: self.config.top_k], *(n for n, e in self.index.items() if e["keep"])}
        gone = [name for name in self.index if name not in kept]
        for name in gone:
            remove(self.folder / name)
            del self.index[name]
        if gone:
            self._write_index()

    def _ranked(self) -> list[str]:
        """Files that have the monitored metric, best first; of equals the older."""
        monitored = [name for name, entry in self.index.items() if self._monitored(entry) is not None]
        return sorted(monitored, key=lambda name: (self._order_of(name), self.index[name]["window"]))

    def _monitored(self, entry: dict[str, Any]) -> float | None:
        value = entry["metrics"].get(self.config.monitor)
        return value if value is not None and math.isfinite(value) else None

    def _order_of(self, name: str) -> float:
        return self._order(self.index[name]["metrics"][self.config.monitor])

    def _order(self, value: float) -> float:
        return value if self.config.mode == "min" else -value

    def _link(self, which: str, target: str) -> None:
        """``last.pt`` to a file or ``last`` to a folder; of the two there is one, where a run has saved both kinds."""
        link, other = self.folder / f"{which}.pt", self.folder / which
        if not target.endswith(".pt"):
            link, other = other, link
        temporary = hidden(link)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
        other.unlink(missing_ok=True)

    def _write_index(self) -> None:
        write_atomically(self.folder / INDEX, json.dumps(self.index, indent=1))


def not_written(path: Path, cause: OSError) -> CheckpointError:
    return CheckpointError(
        f"could not write {path}: {cause.strerror or cause}; the checkpoints before it are as they were"
    )


def make_entry(counters: dict[str, Any], metrics: dict[str, float], keep: bool) -> dict[str, Any]:
    return {"window": counters["window"], "step": counters["step"], "metrics": metrics, "keep": keep}


class Snapshot:
    """Copies a state to host memory that it reuses: allocating it anew costs twenty times the copy.

    What is in pieces is gathered one tensor at a time: the copy is the only whole state there is.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: Any) -> Any:
        """The same tree with every tensor copied to the host. Valid until the next ``take``."""
        copy = self._copy(state, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._copy(item, (*path, i)) for i, item in enumerate(value)]
        if not isinstance(value, Leaf):
            return value
        value = whole(value)
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[path] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


def take_part(state: Any) -> None:
    """Help rank 0 gather its copy, tensor by tensor; what arrives is dropped at once."""
    if isinstance(state, dict):
        for value in state.values():
            take_part(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            take_part(value)
    elif isinstance(state, Leaf):
        whole(state)


def write(path: Path, state: dict[str, Any]) -> None:
    """A file that is no run's, whole or not at all. Raises OSError for a full disk."""
    try:
        with HashingFile(hidden(path)) as file:
            torch.save(state, file)  # type: ignore[arg-type]
        hidden(path).replace(path)
    except Exception as error:
        raise disk_error(error) or error from None


# ---- reading ------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The dict in a checkpoint file, on the host; of a sharded one the tensors are on the meta device, and ``State``
    reads them in place (``sharded.whole`` brings them here). Raises CheckpointError where the file is damaged, is not
    listed as what it is, or holds anything but tensors and plain values (a pickle that would run code is never run).
    """
    if not is_checkpoint(path):
        raise InputError(f"there is no checkpoint {path}")
    state = read(path)
    if not isinstance(state, dict) or "model" not in state:
        raise InputError(f"{path} has no 'model': it is no checkpoint of fabric_trainer")
    return sharded.promised(state, path) if path.is_dir() else state


def read(path: Path) -> Any:
    """What is in a file, or in ``plain.pt`` of a folder of shards: verified, where the index knows it. Raises
    CheckpointError, as ``load`` does."""
    entry = read_index(path.parent).get(path.resolve().name)
    if entry is not None and sha256(path) != entry["sha256"]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {INDEX}")
    file = path / sharded.PLAIN if path.is_dir() else path
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file} is refused: it is no file of tensors and plain values alone") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged: {(str(error) or 'it is cut short').splitlines()[0]}") from None


def is_checkpoint(path: Path) -> bool:
    """Whether there is a file, or a folder of shards."""
    return path.is_file() or (path / sharded.PLAIN).is_file()


def linked(folder: Path, which: str) -> Path | None:
    """What ``best`` or ``last`` means in a checkpoint folder."""
    return next((path for path in (folder / f"{which}.pt", folder / which) if path.exists()), None)


def newest(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; ``tell`` gets a line for each one skipped."""
    index = read_index(folder)
    for name in sorted(index, key=lambda name: index[name]["window"], reverse=True):
        path = folder / name
        if not path.exists():
            tell(f"skipped {path}: its write was not finished")
        elif sha256(path) != index[name]["sha256"]:
            tell(f"skipped {path}: damaged, its sha256 is not the one in {INDEX}")
        else:
            return path
    return None


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"window", "step", "metrics", "keep", "sha256", "bytes"}}; empty where there is no index."""
    path = folder / INDEX
    return json.loads(path.read_text()) if path.is_file() else {}


def file_name(template: str, counters: dict[str, Any], metrics: dict[str, float], suffix: str = ".pt") -> str:
    """The template filled in; a slash of a metric's name becomes an underscore. A metric that is known but was not
    measured at this very step reads nan."""
    values = _Values(counters | metrics)
    try:
        return template.format_map(values).replace("/", "_") + suffix
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"checkpoint.name: {template!r} can't be filled in: {error}") from None


class _Values(dict[str, Any]):
    def __missing__(self, key: str) -> float:
        return math.nan


def check_finite(trees: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the first, where a floating tensor in the trees isn't finite, as far as it lies on
    this rank. One device sync."""
    named = list(_floating(trees, ""))
    if not named:
        return
    norms = torch.stack([norm.double() for norm in torch._foreach_norm([t for _, t in named], math.inf)])
    bad = (~norms.isfinite()).nonzero()
    if len(bad):
        raise CheckpointError(f"not saved: {named[int(bad[0])][0]} isn't finite; the checkpoints before it are good")


def _floating(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _floating(item, f"{path}.{key}" if path else key)]
    if not isinstance(value, Leaf):
        return []
    piece = local(value)
    return [(path, piece)] if piece.is_floating_point() and piece.numel() else []
