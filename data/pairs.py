"""Pairs of states from trajectories, and several tasks as one dataset."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch


class States(Protocol):
    """Trajectories (N, T, …) that give single states: a tensor, ``Fields`` on disk, or cached ``Latents``."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, key: tuple[Any, Any]) -> Tensor: ...


class Pairs(Dataset[Batch]):
    """A state and what follows it, ``time_stride`` frames apart, from every trajectory.

    Of a trajectory's every ``time_stride``-th frame, L in all, pairs start at 0 .. L - 1 - horizon. ``states`` by name:
    {"z": latents, "u": fields} gives z0, z1, u0, u1, each (B, …), and with a horizon above 1 z_future and u_future
    (B, horizon - 1, …), the states after z1. All have the same trajectories and frames. A steady task's two frames are
    one pair, whatever the stride. last: the second state of every pair is the trajectory's last frame instead.

    Raises InputError where a trajectory is too short, naming the keys.
    """

    def __init__(
        self,
        states: Mapping[str, States],
        time_stride: int = 1,
        horizon: int = 1,
        steady: bool = False,
        name: str = "",
        last: bool = False,
    ) -> None:
        if time_stride < 1 or horizon < 1:
            raise InputError(f"task.args: needs {time_stride=} and {horizon=} of at least 1")
        lengths = {tuple(values.shape[:2]) for values in states.values()}
        if len(lengths) != 1:
            raise ValueError(f"states of different trajectories and frames: {sorted(lengths)}")
        ((trajectories, frames),) = lengths
        self.states, self.horizon = dict(states), horizon
        self.stride = 1 if steady else time_stride
        seen = -(-frames // self.stride)
        self.starts = seen - horizon  # of one trajectory
        if self.starts < 1:
            steps = f"time_stride {self.stride} and rollout_horizon {horizon}"
            raise InputError(
                f"{name or 'the data'}: {frames} frames are {seen} states at {steps}; a pair needs {horizon + 1}"
            )
        self.last = frames - 1 if last else None
        self.length = trajectories * self.starts

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = np.asarray(indices, np.int64)
        trajectory, frame = index // self.starts, index % self.starts * self.stride
        then = frame + self.stride if self.last is None else np.full_like(frame, self.last)
        batch: Batch = {}
        for name, values in self.states.items():
            batch[f"{name}0"] = values[trajectory, frame]
            batch[f"{name}1"] = values[trajectory, then]
            if self.horizon > 1:
                later = frame[:, None] + self.stride * np.arange(2, self.horizon + 1)
                batch[f"{name}_future"] = values[trajectory[:, None], later]
        return batch


class Several(Dataset[Batch]):
    """Datasets of several tasks, one after the other, that give ready batches; every row keeps its task.

    names: of the tasks; ``task`` in a batch is int64 (B,), places in them. Rows of a key that all tasks give in one
    shape, such as latents, are stacked. Where grids differ, each row is flat, with zeros behind it up to the longest;
    ``cut`` gives a task's rows their shape again. Every row is thus a row of every tensor, so that a batch may be
    split anywhere.
    """

    def __init__(self, names: Sequence[str], datasets: Sequence[Dataset[Batch]]) -> None:
        if len(names) != len(datasets) or len(set(names)) < len(names) or not names:
            raise ValueError(f"needs a dataset for each task, every task once, not {len(datasets)} for {names}")
        self.names, self.datasets = list(names), list(datasets)
        self.sizes = [len(dataset) for dataset in datasets]  # type: ignore[arg-type]
        self.ends = list(accumulate(self.sizes))
        first = [dataset[0] for dataset in datasets]
        if len({frozenset(sample) for sample in first}) > 1:
            raise ValueError(f"the tasks' samples have different keys: {[sorted(sample) for sample in first]}")
        self.shapes = {key: [tuple(sample[key].shape) for sample in first] for key in first[0]}

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        task = np.array([bisect_right(self.ends, index) for index in indices], np.int64)
        place = np.asarray(indices, np.int64) - np.array([0, *self.ends])[task]
        batch: Batch = {"task": torch.from_numpy(task)}
        for number in np.unique(task):
            rows = np.flatnonzero(task == number)
            part = self.datasets[number].__getitems__(place[rows].tolist())  # type: ignore[attr-defined]
            for key, values in part.items():
                if not self.alike(key):
                    values = values.flatten(1)
                if key not in batch:
                    longest = max(math.prod(shape) for shape in self.shapes[key])
                    shape = values.shape[1:] if self.alike(key) else (longest,)
                    batch[key] = values.new_zeros(len(task), *shape)
                into = batch[key] if self.alike(key) else batch[key][:, : values.shape[1]]
                into[torch.from_numpy(rows)] = values
        return batch

    def alike(self, key: str) -> bool:
        """Whether all tasks give this key in one shape."""
        return len(set(self.shapes[key])) == 1

    def cut(self, key: str, rows: Tensor, task: int) -> Tensor:
        """Rows of one task out of ``batch[key]`` in their own shape: (B, …)."""
        shape = self.shapes[key][task]
        return rows if self.alike(key) else rows[:, : math.prod(shape)].unflatten(1, shape)
