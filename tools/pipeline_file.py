"""A pipeline's YAML file: stages that share keys, each of them a configuration of its own for train.py."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from fabric_trainer import cli
from fabric_trainer.command import from_checkpoint, load
from fabric_trainer.config import Config, flatten, to_yaml
from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically

STAGES = ("operator", "diff_residual", "consistency_distill", "steady_prior", "evaluation")
MEASURED = "evaluation"  # the stage that trains nothing
KEYS = ("name", "common", "stages")


@dataclass(frozen=True)
class Stage:
    """config: every key, but where it starts, which is not known yet. root: folder of the pipeline."""

    name: str
    config: Config
    root: Path

    @property
    def folder(self) -> Path:
        """Of its run."""
        return self.root / self.name

    @property
    def file(self) -> Path:
        """Its configuration."""
        return self.root / f"{self.name}.yaml"

    @property
    def errors(self) -> Path:
        """What its process wrote to standard error."""
        return self.root / f"{self.name}.err"

    @property
    def metrics(self) -> Path:
        """What the evaluation found."""
        return self.folder / "metrics.json"

    @property
    def sha256(self) -> str:
        """Of its configuration."""
        return hashlib.sha256(to_yaml(self.config).encode()).hexdigest()

    def starting_from(self, start: Path | str | None) -> Config:
        """The configuration with ``task.args.start``."""
        config = copy.deepcopy(self.config)
        if start is not None:
            config.task.args["start"] = str(start)
        return config

    def write(self, start: Path | None) -> None:
        """Its file, and the folder that it may write to."""
        self.root.mkdir(parents=True, exist_ok=True)
        if self.name == MEASURED:
            self.folder.mkdir(exist_ok=True)
        write_atomically(self.file, to_yaml(self.starting_from(start)))

    def changes(self) -> list[str]:
        """The keys that are not as in its file, but where it starts, such as "optim.lr: 0.1 and not 0.01"."""
        if not self.file.is_file():
            return []
        written = load(self.file)
        before, here = flatten(asdict(written)), flatten(asdict(self.starting_from(written.task.args.get("start"))))
        return [
            f"{key}: {here.get(key)} and not {before.get(key)}"
            for key in sorted(before.keys() | here.keys())
            if before.get(key) != here.get(key)
        ]

    def is_finished(self, start: Path | None) -> bool:
        """Whether its run has ended well, with this very file, whoever started it."""
        from fabric_trainer.run import read_status

        done = self.name != MEASURED and read_status(self.folder).get("status") == "finished"
        return done and self.file.is_file() and load(self.file) == self.starting_from(start)

    def checkpoint(self) -> Path:
        """The one that it hands over: best.pt, else last.pt; before there is any, the one that there should be."""
        from fabric_trainer.checkpoint import linked

        folder, settings = self.folder / "checkpoints", self.config.checkpoint
        expected = "best" if settings.monitor and settings.top_k else "last"
        suffix = "" if settings.sharded else ".pt"
        return linked(folder, "best") or linked(folder, "last") or folder / f"{expected}{suffix}"


def read(path: Path, name: str | None, keys: Sequence[str] = ()) -> tuple[Path, list[Stage]]:
    """The pipeline's folder, <run.root>/<name>, and its stages, in order. keys: as on train.py's command line, for all
    stages. Raises InputError."""
    tree = _mapping(_loaded(path), str(path))
    if unknown := [key for key in tree if key not in KEYS]:
        raise InputError(f"{path}: unknown key {unknown[0]}; a pipeline has {', '.join(KEYS)}")
    common, own = _mapping(tree.get("common"), "common"), _mapping(tree.get("stages"), "stages")
    if unknown := [stage for stage in own if stage not in STAGES]:
        raise InputError(f"stages: unknown stage {unknown[0]}; there are {', '.join(STAGES)}")
    if not own or list(own) != [stage for stage in STAGES if stage in own]:
        raise InputError(f"stages: in this order: {', '.join(STAGES)}; not {', '.join(own) or 'none'}")
    trees = {stage: merged(common, _mapping(changes, f"stages.{stage}")) for stage, changes in own.items()}
    stages, folders = [], {}
    for number, (stage, merged_tree) in enumerate(trees.items()):
        try:
            config = _resolved(stage, merged_tree, keys, first=number == 0)
        except InputError as error:
            raise InputError(f"stages.{stage}: {error}") from None
        folders[config.run.root] = stage
        root = Path(config.run.root) / str(name or tree.get("name") or path.stem)
        config.name, config.run.root = stage, str(root)
        stages.append(Stage(stage, config, root))
    if len(folders) > 1:
        raise InputError(f"run.root: one for all stages, under common, not {', '.join(folders)}")
    return root, stages


def merged(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over ``common``: mappings key by key, anything else replaced."""
    tree = copy.deepcopy(common)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        tree[key] = merged(tree[key], value) if both else copy.deepcopy(value)
    return tree


def examine(stages: Sequence[Stage]) -> dict[str, str]:
    """Of stages that this machine could not run, the first reason. Raises InputError for what no machine could: all
    that train.py --dry_run does."""
    problems = {}
    for number, stage in enumerate(stages):
        first = number == 0
        try:
            lines = cli.examine(stage.starting_from(None if first else "the checkpoint of the stage before"))
        except InputError as error:
            raise InputError(f"stages.{stage.name}: {error}") from None
        if lines := [line for line in lines if first or not line.startswith("task.args.start")]:
            problems[stage.name] = lines[0]
    return problems


def _resolved(stage: str, tree: dict[str, Any], keys: Sequence[str], first: bool) -> Config:
    """The whole configuration."""
    if not _mapping(tree.get("task"), "task").get("path"):
        raise InputError("task.path is missing")
    run = tree.setdefault("run", {})
    if stage == MEASURED and isinstance(run, dict) and not {"max_epochs", "max_steps"} & run.keys():
        run["max_epochs"] = 1  # a number that it makes no use of
    config = from_checkpoint(tree, keys)
    if config.name is not None or (not first and "start" in config.task.args):
        raise InputError(f"{'task.args.start' if config.name is None else 'name'}: the pipeline itself sets it")
    return config


def _loaded(path: Path) -> Any:
    try:
        return jsonargparse.get_loader("yaml")(path.read_text(encoding="utf-8"))  # as train.py: 1e-3 is a number
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: is a mapping of keys, not {value!r}")
    return value
