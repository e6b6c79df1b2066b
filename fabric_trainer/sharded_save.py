"""Saving a sharded checkpoint: what all ranks do together around the files of ``sharded``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fabric_trainer import sharded
from fabric_trainer.checkpoint import Checkpoints, file_name, make_entry, not_written
from fabric_trainer.errors import InputError
from fabric_trainer.files import hidden, remove
from fabric_trainer.sharded import CheckpointException, disk_error


def save_shards(
    checkpoints: Checkpoints | None,
    state: dict[str, Any],
    counters: dict[str, Any],
    metrics: dict[str, float],
    keep: bool,
) -> Path:
    """Every rank writes its own part of ``state`` into one folder, whose path this returns: ``Checkpoints.save`` of
    all ranks together, and done when it returns. checkpoints: rank 0's, None elsewhere. Raises CheckpointError on all
    ranks alike."""

    with _together() as (group, each):
        path = each(lambda: checkpoints and _folder(checkpoints, counters, metrics))[0]
        try:
            parts = each(lambda: sharded.write(hidden(path), state, group))
            files = {name: found for part in parts for name, found in part.items()}
            entry = make_entry(counters, metrics, keep) | {
                "sha256": sharded.sha256_of({name: digest for name, (digest, _) in files.items()}),
                "bytes": sum(size for _, size in files.values()),
            }
            each(lambda: checkpoints.enter(path, entry) if checkpoints else None)
        except OSError as error:
            if checkpoints:
                remove(hidden(path))
            raise not_written(path, error) from None
    return path  # type: ignore[no-any-return]


def _folder(checkpoints: Checkpoints, counters: dict[str, Any], metrics: dict[str, float]) -> Path:
    return checkpoints.folder / file_name(checkpoints.config.name, counters, metrics, suffix="")


@contextmanager
def _together() -> Iterator[tuple[Any, Callable[[Callable[[], Any]], list[Any]]]]:
    """(a group of all ranks, on the host; a call that each makes, and whose results, by rank, all get when the last is
    through). What is wrong with the disk or the input of one is raised on all."""
    several = torch.distributed.is_initialized()
    group: Any = torch.distributed.new_group(backend="gloo") if several else None

    def each(call: Callable[[], Any]) -> list[Any]:
        found: list[Any] = [_attempt(call)]
        if several:
            found = found * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, found[0], group=group)
        for error in found:
            if isinstance(error, Exception):
                raise error
        return found

    try:
        yield group, each
    finally:
        if several:
            torch.distributed.destroy_process_group(group)


def _attempt(call: Callable[[], Any]) -> Any:
    """What it returns, or its error with the disk or the input."""
    try:
        return call()
    except InputError as error:
        return error
    except (Exception, CheckpointException) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        return cause
