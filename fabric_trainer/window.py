"""The micro-batches of one update, on the host, with their weight known before the first forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, tee
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fabric_trainer.order import Order, Rows, Span
from fabric_trainer.random import SampleRandom
from fabric_trainer.task import Batch, Task


@dataclass(frozen=True, slots=True)
class Window:
    """One update's share of one rank."""

    span: Span
    micro_batches: list[Batch]
    weight: float  # what Task.weight counts, summed over this rank's micro-batches

    def on(self, device: torch.device, rows: int | None = None) -> Iterator[tuple[Batch, bool]]:
        """(micro-batch on the device, whether it is the last), each copied while the one before it is computed; in
        pieces of at most ``rows`` rows."""
        batches = self.micro_batches
        if rows is not None and len(batches[0]["index"]) > rows:  # the first is the largest
            batches = [piece for batch in batches for piece in cut(batch, rows)]
        following = to_device(batches[0], device)
        for batch in batches[1:]:
            current, following = following, to_device(batch, device)
            yield current, False
        yield following, True


def cut(batch: Batch, rows: int) -> list[Batch]:
    """The batch in pieces of at most ``rows`` rows: what has a row per sample is cut, the rest goes along."""
    size = len(batch["index"])
    if size <= rows:
        return [batch]
    return [{k: _rows(v, slice(i, i + rows), size) for k, v in batch.items()} for i in range(0, size, rows)]


def _rows(value: Any, rows: slice, size: int) -> Any:
    if isinstance(value, dict):
        return {key: _rows(item, rows, size) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value
    return value[rows] if hasattr(value, "__len__") and not isinstance(value, str) and len(value) == size else value


EMPTY = Window(Span(-1, -1, 0, 0, False), [], 0.0)  # after the last


class MicroBatches(Dataset[Batch]):
    """Turns Rows into a batch; runs in the loader's workers."""

    def __init__(self, task: Task, dataset: Dataset[Any], seed: int, training: bool) -> None:
        self.task, self.dataset, self.seed, self.training = task, dataset, seed, training
        self.fetch = getattr(dataset, "__getitems__", None)

    def __getitem__(self, rows: Rows) -> Batch:
        index = rows.index.tolist()
        samples = self.fetch(index) if self.fetch else [self.dataset[i] for i in index]
        batch = samples if isinstance(samples, dict) else self.task.collate(samples)
        if not isinstance(batch, dict):
            raise TypeError(f"a batch must be a dict of tensors; {type(self.dataset).__name__} gave {type(batch)}")
        weight = torch.from_numpy(rows.weight)
        batch["weight"] = batch["weight"] * weight if "weight" in batch else weight
        batch["index"] = torch.from_numpy(rows.index)
        batch["random"] = SampleRandom(self.seed, rows.epoch, batch["index"])
        return self.task.augment(batch) if self.training else self.task.preprocess(batch)


def windows(
    task: Task,
    dataset: Dataset[Any],
    order: Order,
    seed: int = 0,
    numbers: range | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Window]:
    """This rank's windows of these numbers, or all without end: epochs follow one another without a pause."""
    ahead, spans = tee(map(order.span, count() if numbers is None else numbers))  # workers run ahead
    rows = (rows for span in ahead for rows in order.micro_batches(span))
    batches = iter(loader(MicroBatches(task, dataset, seed, training=True), rows, num_workers, pin_memory))
    for span in spans:
        micro_batches = [next(batches) for _ in range(order.micro_batch_count(span))]
        yield Window(span, micro_batches, sum(float(task.weight(batch)) for batch in micro_batches))


def loader(micro_batches: MicroBatches, rows: Iterable[Rows], num_workers: int, pin_memory: bool) -> Iterable[Batch]:
    """The batches of ``rows``, in order, prepared in worker processes where there are any; the workers stay for the
    next pass."""
    if num_workers == 0 and not pin_memory:
        return Mapped(micro_batches, rows)
    return DataLoader(
        micro_batches,
        batch_size=None,
        sampler=rows,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it would draw from the global one
    )


@dataclass(frozen=True)
class Mapped:
    """What a DataLoader without workers does, without its bookkeeping."""

    micro_batches: MicroBatches
    rows: Iterable[Rows]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.micro_batches.__getitem__, self.rows)


def to_device(data: Any, device: torch.device) -> Any:
    """Everything in dicts, lists and tuples that has ``.to``, on the device; from pinned memory without waiting."""
    if device.type == "cpu":
        return data
    if isinstance(data, dict):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device) for value in data)
    return data.to(device, non_blocking=True) if hasattr(data, "to") else data


def _as_it_is(batch: Any) -> Any:
    return batch
