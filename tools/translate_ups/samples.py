"""How many samples, pairs of states, the trajectories of the original's batches are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data import ups
from fabric_trainer.errors import InputError


class Trajectories(NamedTuple):
    """A task's training split. frames: of a trajectory. count: how many, where the files are there."""

    task: str
    frames: int
    count: int | None


class Samples(NamedTuple):
    """The training splits of all tasks, cut into pairs ``stride`` frames apart with ``horizon`` states after the first.
    balanced: as many of each task; else by their sizes, where they are known."""

    tasks: Sequence[Trajectories]
    stride: int
    horizon: int
    balanced: bool

    def pairs(self, task: Trajectories) -> int:
        """Of one trajectory. InputError where it is too short."""
        if task.task in ups.STEADY:
            return 1
        pairs = -(-task.frames // self.stride) - self.horizon
        if pairs < 1:
            raise InputError(
                f"training.rollout_horizon: {task.task} has {task.frames} frames, every {self.stride} of which are too "
                f"few for a horizon of {self.horizon}"
            )
        return pairs

    @property
    def mean(self) -> float:
        """Pairs of a trajectory, over the tasks."""
        weights = [1 if self.balanced or not self.known else task.count or 0 for task in self.tasks]
        return sum(w * self.pairs(task) for w, task in zip(weights, self.tasks, strict=True)) / sum(weights)

    @property
    def known(self) -> bool:
        return all(task.count is not None for task in self.tasks)

    def of(self, trajectories: int) -> tuple[int, str]:
        """Samples of so many trajectories, and how that comes about."""
        size = max(1, round(trajectories * self.mean))
        found = [
            f"{task.task} {self.pairs(task)} of {task.frames} frames{'' if task.count is not None else ' (assumed)'}"
            for task in self.tasks
        ]
        return size, f"{trajectories} trajectories x {self.mean:g} pairs each: {', '.join(found)}"

    def updates(self, trajectories: int, accumulate: int, devices: int) -> int | None:
        """Of an epoch, where the files are there."""
        if not self.known:
            return None
        sizes = [(task.count or 0) * self.pairs(task) for task in self.tasks]
        samples = len(sizes) * max(sizes) if self.balanced else sum(sizes)
        return -(-samples // (self.of(trajectories)[0] * accumulate * devices))


def look(tasks: Sequence[str], root: Path, frames: int) -> list[Trajectories]:
    """The training splits of tasks in ``root``; ``frames`` are assumed of one that isn't there. InputError for a name
    that is no task's, or a file that can't be read."""
    found = []
    for task in tasks:
        ups.check_task(task, "data.task")
        if any(root.glob(f"{task}_train*.h5")):
            shape = ups.read(root, task, "train").shape
            found.append(Trajectories(task, shape[1], shape[0]))
        else:
            found.append(Trajectories(task, 2 if task in ups.STEADY else frames, None))
    return found
