"""stage_status.json: how far each stage of a pipeline is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically

FILE, SCHEMA = "stage_status.json", 1


@dataclass
class Entry:
    """One stage's.

    status: not_started, in_progress, completed or failed. epoch: epochs done, of total_epochs (null: not known
    beforehand). seconds: that its process ran, over all attempts. checkpoint: what it hands over. config_sha256: of
    its configuration as it began, where it starts left out: start, and that file's hash. A stage that another file
    stands in for is completed, with a checkpoint, and has no configuration.
    """

    status: str = "not_started"
    started_at: str | None = None
    completed_at: str | None = None
    epoch: int = 0
    total_epochs: int | None = None
    seconds: float = 0.0
    error_message: str | None = None
    checkpoint: str | None = None
    config_sha256: str | None = None
    start: str | None = None
    start_sha256: str | None = None


class Status:
    """The entries of a pipeline's stages, in memory and on disk; raises InputError for a file of another schema."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.path = folder / FILE
        self.entries = {name: Entry() for name in names}
        if self.path.is_file():
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            if tree.get("schema_version") != SCHEMA:
                raise InputError(f"{self.path} has schema_version {tree.get('schema_version')}, not {SCHEMA}")
            known = {field.name for field in fields(Entry)}
            for name, entry in tree["stages"].items():
                self.entries[name] = Entry(**{key: value for key, value in entry.items() if key in known})

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def change(self, name: str, **values: Any) -> None:
        """Set some of an entry's values, and write the file, whole or not at all."""
        for key, value in values.items():
            setattr(self.entries[name], key, value)
        self.write()

    def forget(self, name: str) -> None:
        """As if the stage had never been."""
        self.entries[name] = Entry()
        self.write()

    def write(self) -> None:
        tree = {"schema_version": SCHEMA, "stages": {name: asdict(entry) for name, entry in self.entries.items()}}
        write_atomically(self.path, json.dumps(tree, indent=1) + "\n")


def now() -> str:
    """ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
