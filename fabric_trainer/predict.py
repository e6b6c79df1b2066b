"""Predictions for a whole split: a row per sample, in the dataset's order, however many ranks; and their file."""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluating
from fabric_trainer.files import write_atomically
from fabric_trainer.portable import whole
from fabric_trainer.random import seed_torch
from fabric_trainer.task import Batch, Task
from fabric_trainer.window import to_device

Table = dict[str, np.ndarray]
"""``index`` int64 (N,), the samples' places in the dataset, and each name's values (N, ...); strings are objects."""


@torch.no_grad()
def predict(fabric: Fabric, task: Task, network: nn.Module, split: Split) -> Table:
    """What the task predicts for each sample, in the dataset's order, on rank 0; empty on the others, which hold one
    batch at a time. Raises InputError where the task's answer is not a row per sample.

    The network's training flags are as before afterwards; torch's generators are seeded anew.
    """
    tables: list[Table] = []
    with evaluating(network), _gathering(fabric) as gather:
        seed_torch(fabric.device, split.seed, split.ranks.rank)
        for batch in split.batches:
            table = rows(task, network, to_device(batch, fabric.device))
            tables += gather(table if split.ranks.speaks else {})
    return join(tables) if tables else {}


def rows(task: Task, network: nn.Module, batch: Batch) -> Table:
    """The predictions for one batch, rows that only pad included. Raises InputError."""
    size = len(batch["index"])
    table = {"index": batch["index"].cpu().numpy()}
    for name, value in task.predict(network, batch).items():
        if name in table:
            raise InputError(f"{type(task).__name__}.predict: index is the samples' places; choose another name")
        array = _array(value)
        if array is None or array.shape[:1] != (size,):
            found = type(value).__name__ if array is None else f"{type(value).__name__} of shape {array.shape}"
            wanted = f"a tensor of {size} rows or a list of {size} strings, for {size} samples"
            raise InputError(f"{type(task).__name__}.predict: {name} must be {wanted}, not a {found}")
        table[name] = array
    return table


def join(tables: list[Table]) -> Table:
    """One table, by index, without padding: a padding row repeats a sample of an earlier row. Its weight of 0 would
    not tell, since a dataset may give samples that weight. Raises InputError where the tables differ in kind."""
    kinds = [{name: f"{values.dtype}{values.shape[1:]}" for name, values in table.items()} for table in tables]
    for kind in kinds:
        if kind != kinds[0]:
            raise InputError(f"predict: all batches must have the same names and row shapes, not {kinds[0]} and {kind}")
    _, first = np.unique(np.concatenate([table["index"] for table in tables]), return_index=True)
    return {name: np.concatenate([table[name] for table in tables])[first] for name in tables[0]}


def _array(value: Any) -> np.ndarray | None:
    """None for what can't be written."""
    if isinstance(value, Tensor):
        wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return whole(value).detach().to(wide).cpu().numpy()  # NumPy has no bfloat16
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return np.array(value, dtype=object)
    return None


@contextmanager
def _gathering(fabric: Fabric) -> Iterator[Callable[[Table], list[Table]]]:
    """A collective that gives rank 0 the tables of all ranks that have one, in their order, and the others none."""
    if fabric.world_size == 1:
        yield lambda own: [own]
        return
    # as objects over gloo: strings and ragged batches need no care, and no device has to hold what all ranks send
    group = torch.distributed.new_group(backend="gloo")

    def gather(own: Table) -> list[Table]:
        everyone: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
        torch.distributed.gather_object(own, everyone, group=group)  # type: ignore[arg-type]
        return [table for table in everyone or [] if table]

    yield gather
    torch.distributed.destroy_process_group(group)  # not after an error: nobody may be there to wait for


# ---- the file -----------------------------------------------------------------------------------------------------


def check_output(task: Task, out: str) -> None:
    """Raise InputError, before any work is done, where the task predicts nothing or ``out`` can't be written."""
    path = Path(out)
    if type(task).predict is Task.predict:
        raise InputError(f"--predict: {type(task).__name__} has no predict(network, batch)")
    if path.suffix not in _FORMATS:
        raise InputError(f"--out {out}: predictions are written as {', '.join(_FORMATS)}, by the file's suffix")
    if not path.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"--out {out}: this is a folder")


def write(out: str, table: Table) -> None:
    """Write the table whole or not at all, in the format that the suffix says."""
    write_atomically(out, _FORMATS[Path(out).suffix](table))


def _csv(table: Table) -> str:
    """A column for each value of a sample: ``y``, or ``y_0``, ``y_1``, ... where there are several."""
    columns: list[tuple[str, np.ndarray]] = []
    for name, values in table.items():
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        several = flat.shape[1] > 1
        columns += [(f"{name}_{i}" if several else name, column) for i, column in enumerate(flat.T)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name for name, _ in columns])
    writer.writerows(zip(*(column for _, column in columns), strict=True))
    return text.getvalue()


def _npz(table: Table) -> bytes:
    """As np.savez would, which can't take an array named "file"."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in table.items():
            array = values.astype(str) if values.dtype == object else values  # objects would be pickled
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return file.getvalue()


def _hdf5(table: Table) -> bytes:
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w") as archive:
        for name, values in table.items():
            archive.create_dataset(name, data=values, dtype=h5py.string_dtype() if values.dtype == object else None)
    return file.getvalue()


_FORMATS: dict[str, Callable[[Table], bytes | str]] = {".csv": _csv, ".npz": _npz, ".h5": _hdf5}
