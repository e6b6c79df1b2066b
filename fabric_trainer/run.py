"""A run's folder: which one, whether to start, continue or refuse, and what is written there beside the training."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fabric_trainer import checkpoint, memory
from fabric_trainer.command import Command
from fabric_trainer.config import Config, flatten, to_yaml
from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically

STATUS = "run.json"
STAYS = ("seed", "task.path", "optim.name", "optim.muon.matrices", "optim.others")  # over a resume
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """Where to run, and the checkpoint to continue from, if any."""

    folder: Path
    resume_from: Path | None = None


def choose(command: Command, config: Config, tell: Tell, restarted: bool = False) -> Choice:
    """Decide on rank 0. restarted: whether the scheduler has told any rank so. Raises InputError where the choice is
    the user's, offering what there is."""
    root = Path(config.run.root)
    job = _job()
    resume = command.resume
    name = config.name
    if restarted or was_restarted():
        resume = resume or "auto"
        name = name or _name_of_job(root, job)
    if resume in (None, "none"):
        choice = Choice(_fresh(root, name, command))
    elif resume == "auto":
        choice = _continued(root, name, command, tell)
    else:
        choice = _from_path(Path(resume), root, name, command)
    if job:
        _remember_job(root, job, choice.folder.name)
    return choice


def open_folder(choice: Choice, command: Command, config: Config, environment: dict[str, Any]) -> None:
    """Make the folder and write config.yaml, environment.json and the status; on rank 0."""
    choice.folder.mkdir(parents=True, exist_ok=True)
    write_config(choice.folder, config)
    path = choice.folder / "environment.json"
    if path.is_file():  # a resume: what the run began with stays on record
        before = json.loads(path.read_text())
        environment = environment | {"earlier": [*before.pop("earlier", []), before]}
    write_atomically(path, json.dumps(environment, indent=1))
    set_status(choice.folder, "running", command.config_name)


def write_config(folder: Path, config: Config) -> None:
    """config.yaml: every key of the run."""
    write_atomically(folder / "config.yaml", to_yaml(config))


def set_status(folder: Path, status: str, config_name: str | None = None) -> None:
    """running, stopped, failed or finished."""
    before = read_status(folder)
    created = before.get("created") or datetime.now().isoformat(timespec="microseconds")
    entry = {"status": status, "config": config_name or before.get("config"), "created": created}
    write_atomically(folder / STATUS, json.dumps(entry, indent=1))


def read_status(folder: Path) -> dict[str, Any]:
    """{"status", "config", "created"}; empty where the folder is no run's."""
    path = folder / STATUS
    return json.loads(path.read_text()) if path.is_file() else {}


def find_checkpoint(which: str, command: Command, config: Config) -> Path:
    """The file that ``best``, ``last`` or a path means. Raises InputError."""
    if which not in ("best", "last"):
        return Path(which)
    root = Path(config.run.root)
    folders = [root / config.name] if config.name else _runs_of(root, command.config_name)
    for folder in folders:
        if path := checkpoint.linked(folder / "checkpoints", which):
            return path
    where = f"run {config.name}" if config.name else f"any run of {command.config_name}"
    raise InputError(f"{which}: {where} in {root}/ has no {which}.pt; give a path, or --name")


def compare_configs(saved: dict[str, Any], config: Config, tell: Tell) -> None:
    """Print each key that differs from the run's. Raises InputError for one that would change order or shapes."""
    before, now = flatten(saved), flatten(asdict(config))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or key == "name":
            continue
        if key in STAYS and key in before and _settled(key, old) != _settled(key, new):
            raise InputError(f"{key} is {new}, the run began with {old}: a resume can't change it")
        tell(f"resumed with another {key}: {new} (was {old})")


def _settled(key: str, value: Any) -> Any:
    """Of several optimizers, who steps what: their rates may change."""
    return [(other["match"], other["name"]) for other in value] if key == "optim.others" else value


def _fresh(root: Path, name: str | None, command: Command) -> Path:
    if name is None:
        stamp = f"{command.config_name}-{datetime.now():%Y%m%d-%H%M%S}"
        taken = sum(path.name.startswith(stamp) for path in root.glob(f"{stamp}*"))
        return root / (f"{stamp}-{taken + 1}" if taken else stamp)
    folder = root / name
    if folder.exists():
        if not command.overwrite:
            raise InputError(f"run {folder} exists: continue it with --resume auto, or replace it with --overwrite")
        if not read_status(folder):
            raise InputError(f"--overwrite: {folder} is not a run's folder (it has no {STATUS}); delete it by hand")
        shutil.rmtree(folder)
    return folder


def _continued(root: Path, name: str | None, command: Command, tell: Tell) -> Choice:
    if name is not None:
        folder = root / name
    else:
        unfinished = (f for f in _runs_of(root, command.config_name) if read_status(f)["status"] != "finished")
        found = next(unfinished, None)
        if found is None:
            return Choice(_fresh(root, None, command))
        folder = found
    path = checkpoint.newest(folder / "checkpoints", tell)
    if path is None and folder.exists():
        tell(f"run {folder.name} has no checkpoint to continue from: it starts again")
        _clear(folder)
    return Choice(folder, path)


def _clear(folder: Path) -> None:
    """Nothing stays but what the run has found out about memory."""
    note = folder / memory.NOTE
    found = note.read_text() if note.is_file() else None
    shutil.rmtree(folder)
    if found is not None:
        folder.mkdir()
        write_atomically(note, found)


def _from_path(path: Path, root: Path, name: str | None, command: Command) -> Choice:
    if not checkpoint.is_checkpoint(path):
        raise InputError(f"--resume {path}: there is no such checkpoint; auto finds the newest by itself")
    own = path.absolute().parent.parent
    if name is None and read_status(own):
        return Choice(own, path)
    return Choice(_fresh(root, name, command), path)


def _runs_of(root: Path, config_name: str) -> list[Path]:
    """The folders of this configuration's runs, newest first."""
    runs = {path.parent: read_status(path.parent) for path in root.glob(f"*/{STATUS}")}
    mine = [folder for folder, status in runs.items() if status["config"] == config_name]
    return sorted(mine, key=lambda folder: runs[folder]["created"], reverse=True)


def was_restarted() -> bool:
    """Whether a scheduler says so to this process; torchrun does to those of the machine where one failed."""
    restarts = (os.environ.get(f"{who}_RESTART_COUNT") or "0" for who in ("TORCHELASTIC", "SLURM"))
    return any(int(count) > 0 for count in restarts)


def _job() -> str | None:
    """The id under which a scheduler restarts this job."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    return os.environ.get("SLURM_JOB_ID") or (elastic if elastic != "none" else None)


def refuse_nameless_restart(config: Config) -> None:
    """Raise InputError where a launcher may restart this job and could not find its run again."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0 and config.name is None and _job() is None:
        raise InputError("this launch may be restarted (--max-restarts): give --name, or the launcher's --rdzv-id")


def _job_file(root: Path, job: str) -> Path:
    return root / ".jobs" / f"{job.replace(os.sep, '_')}.json"


def _remember_job(root: Path, job: str, name: str) -> None:
    path = _job_file(root, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"name": name}))


def _name_of_job(root: Path, job: str | None) -> str | None:
    path = _job_file(root, job) if job else None
    return json.loads(path.read_text())["name"] if path and path.is_file() else None
