"""A task's splits: files in the Universal Physics Stack's layout, PDEBench's own, or sets that our generators make."""

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
    ``<root>/<task>_<split>.h5``. samples: trajectories of each split that is made. files: PDEBench's own instead,
    {train: PATH, val: PATH} and test where there is one; dataset: the name of the field in them, ``tensor`` where it
    is left out, or a list of one per channel; given: of a steady task, ``nu`` where it is left out. Raises InputError
    for a task that there is none of, or a parameter that its generator hasn't.
    """

    task: str
    made: Mapping[str, Any] | None = None
    samples: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        ups.check_task(self.task, "task.args.tasks")
        if self.files is not None:
            self._check_files(self.files)
        if self.made is None:
            return
        if self.task not in GENERATORS:
            raise InputError(f"task.args.made: {self.task} has no generator, only {', '.join(GENERATORS)} have")
        known = {each.name for each in fields(GENERATORS[self.task])} - {"samples", "seed"}
        if unknown := set(self.made) - known:
            raise InputError(f"task.args.made.{self.task}: no {', '.join(sorted(unknown))}, only {', '.join(known)}")
        if unknown := set(self.samples) - set(ups.SPLITS):
            raise InputError(f"task.args.samples: {', '.join(sorted(unknown))} is none of {', '.join(ups.SPLITS)}")

    def _check_files(self, files: Mapping[str, Any]) -> None:
        key, known = f"task.args.files.{self.task}", (*ups.SPLITS, "dataset", "given")
        if self.made is not None:
            raise InputError(f"{key}: is in task.args.made too; only one of them can be meant")
        if absent := [split for split in ("train", "val") if not files.get(split)]:
            raise InputError(f"{key}: needs a file for {' and '.join(absent)}")
        if unknown := set(files) - set(known):
            raise InputError(f"{key}: no {', '.join(sorted(unknown))}, only {', '.join(known)}")
        if files.get("given") and self.task not in ups.STEADY:
            raise InputError(f"{key}.given: {self.task} is not steady, only {', '.join(sorted(ups.STEADY))} is")

    def read(self, root: Path, split: str) -> Fields | None:
        """A split, made first where it is ours; None for a test split that there is no file of, or no samples.

        Raises InputError for a train or val split that isn't there: nothing takes its place.
        """
        if self.files is not None:
            if not self.files.get(split):
                return None
            return self._fields(Path(self.files[split]), split)
        if self.made is None:
            absent = split == "test" and not any(Path(root).glob(f"{self.task}_{split}*.h5"))
            return None if absent else ups.read(root, self.task, split)
        if split == "test" and not self.samples.get(split):
            return None
        path = ensure(Path(root) / self.task, self.generated(split))
        return self._fields(path, split)

    def _fields(self, path: Path, split: str) -> Fields:
        files = self.files or {}
        given = files.get("given", "nu") if self.task in ups.STEADY else None
        read = pdebench.fields(path, files.get("dataset", "tensor"), given)
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
        if self.files is not None:
            paths = {split: Path(self.files[split]) for split in ups.SPLITS if self.files.get(split)}
            return [
                f"task.args.files.{self.task}.{split}: there is no file {path}"
                for split, path in paths.items()
                if not path.is_file()
            ]
        if self.made is not None:
            return []
        return [line for split in ("train", "val") for line in ups.missing(root, self.task, split)]
