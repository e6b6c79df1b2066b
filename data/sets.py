"""A task's splits: files in the Universal Physics Stack's layout, or sets that our own generators make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data import pdebench, ups
from data.advection import Advection
from data.burgers import Burgers
from data.darcy import Darcy
from data.fields import Fields
from data.generated import GeneratedSet, ensure
from data.reaction_diffusion import ReactionDiffusion
from fabric_trainer.errors import InputError

GENERATORS: dict[str, type[Any]] = {
    "burgers1d": Burgers,
    "advection1d": Advection,
    "reaction_diffusion2d": ReactionDiffusion,
    "darcy2d": Darcy,
}
SEEDS = {
    split: seed for seed, split in enumerate(ups.SPLITS)
}  # of made sets: no split shares a trajectory with another


@dataclass(frozen=True)
class Source:
    """Where a task's trajectories come from.

    task: one of ``data.ups.TASKS``. made: the parameters of its generator, samples and seed left out; None reads
    ``<root>/<task>_<split>.h5``. samples: trajectories of each split that is made. Raises InputError for a task that
    there is none of, or a parameter that its generator hasn't.
    """

    task: str
    made: Mapping[str, Any] | None = None
    samples: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ups.check_task(self.task, "task.args.tasks")
        if self.made is None:
            return
        if self.task not in GENERATORS:
            raise InputError(f"task.args.made: {self.task} has no generator, only {', '.join(GENERATORS)} have")
        known = {each.name for each in fields(GENERATORS[self.task])} - {"samples", "seed"}
        if unknown := set(self.made) - known:
            raise InputError(f"task.args.made.{self.task}: no {', '.join(sorted(unknown))}, only {', '.join(known)}")
        if unknown := set(self.samples) - set(ups.SPLITS):
            raise InputError(f"task.args.samples: {', '.join(sorted(unknown))} is none of {', '.join(ups.SPLITS)}")

    def read(self, root: Path, split: str) -> Fields | None:
        """A split, made first where it is ours; None for a test split that there is no file of, or no samples.

        Raises InputError for a train or val split that isn't there: nothing takes its place.
        """
        if self.made is None:
            absent = split == "test" and not any(Path(root).glob(f"{self.task}_{split}*.h5"))
            return None if absent else ups.read(root, self.task, split)
        if split == "test" and not self.samples.get(split):
            return None
        path = ensure(Path(root) / self.task, self.generated(split))
        read = pdebench.fields(path, given="nu" if self.task in ups.STEADY else None)
        return replace(read, name=f"{self.task}_{split}")

    def generated(self, split: str) -> GeneratedSet:
        """The set that is made for a split. InputError where its parameters make no sense."""
        if not self.samples.get(split):
            raise InputError(f"task.args.samples: needs a number of {split} trajectories, such as {{{split}: 16}}")
        try:
            made: GeneratedSet = GENERATORS[self.task](
                **(self.made or {}), samples=self.samples[split], seed=SEEDS[split]
            )
        except ValueError as error:
            raise InputError(f"task.args.made.{self.task}: {error}") from None
        return made

    def missing(self, root: Path) -> list[str]:
        """What would stop a run here, a line each."""
        if self.made is not None:
            return []
        return [line for split in ("train", "val") for line in ups.missing(root, self.task, split)]
