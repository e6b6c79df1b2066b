"""Where the values of updates and evaluations go: metrics.csv, TensorBoard, Weights & Biases. Rank 0 only.

A logger has five calls. ``log_updates(rows)`` takes one dict per applied update: "step" and names such as "epoch",
"samples", "train/loss", "lr/decay", "grad_norm"; all rows have the same keys. ``log_metrics(step, values)`` takes
evaluations and epoch means. ``cut_back(step)``, once and first on a resume, forgets all that came after ``step``.
``flush()`` puts on disk what was logged: call it before a checkpoint is saved, or a kill leaves a gap. ``close()``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fabric_trainer.errors import InputError
from fabric_trainer.files import write_atomically
from fabric_trainer.tfevents import drop_events_after

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fabric_trainer.config import Config, WandbConfig

Row = Mapping[str, float]


class Logger(Protocol):
    """What the loop asks of a logger; see the module's docstring."""

    def log_updates(self, rows: Sequence[Row]) -> None: ...
    def log_metrics(self, step: int, values: Row) -> None: ...
    def cut_back(self, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Loggers:
    """The active loggers, called as one."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = list(loggers)

    @classmethod
    def build(cls, folder: Path, config: Config, run_name: str) -> Loggers:
        """Those that ``config.loggers`` asks for, writing into the run's ``folder``, which must exist.

        Raises InputError where the package of one is not installed.
        """
        wanted, loggers = config.loggers, cls()
        if wanted.wandb is not None:  # first: it is the one that can be refused, before anything is written
            loggers.loggers.append(WandbLogger(folder, wanted.wandb, run_name, asdict(config)))
        if wanted.csv:
            loggers.loggers.append(CsvLogger(folder / "metrics.csv"))
        if wanted.tensorboard:
            loggers.loggers.append(TensorBoardLogger(folder / "tensorboard"))
        return loggers

    def log_updates(self, rows: Sequence[Row]) -> None:
        """One row per applied update, in order."""
        for logger in self.loggers:
            logger.log_updates(rows)

    def log_metrics(self, step: int, values: Row) -> None:
        """Evaluation metrics and exact epoch means, after the update rows of that step."""
        for logger in self.loggers:
            logger.log_metrics(step, values)

    def cut_back(self, step: int) -> None:
        """Forget everything after ``step``; on a resume, before anything is logged."""
        for logger in self.loggers:
            logger.cut_back(step)

    def flush(self) -> None:
        """Put on disk what was logged."""
        for logger in self.loggers:
            logger.flush()

    def close(self) -> None:
        """Flush and let go of the files."""
        for logger in self.loggers:
            logger.close()


class CsvLogger:
    """metrics.csv: a header and one row per update. Floats keep every digit (``float(cell)`` is exactly the value).

    Evaluations are in history.json, since their columns and their rate are others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.TextIOWrapper | None = None
        self._columns: list[str] = []  # of the file
        self._keys: frozenset[str] = frozenset()  # of this session's rows

    def log_updates(self, rows: Sequence[Row]) -> None:
        """Append rows. Raises ValueError, naming them, for keys that the first row didn't have or that lack."""
        if not rows:
            return
        file = self._file or self._open(list(rows[0]))
        lines = []
        for row in rows:
            if row.keys() != self._keys:
                raise ValueError(_other_keys(self.path, self._keys, row.keys()))
            lines.append(",".join([_cell(row[name]) if name in row else "" for name in self._columns]) + "\n")
        file.write("".join(lines))
        file.flush()  # to the kernel, in one write: a kill of this process loses nothing

    def log_metrics(self, step: int, values: Row) -> None:
        """Nothing: a row here is an update."""

    def cut_back(self, step: int) -> None:
        """Keep the rows up to ``step``; a last line that a kill cut short goes too."""
        if self.path.exists():
            header, lines = _read_csv(self.path)
            place = header.index("step") if header else 0
            _write_csv(self.path, header, [line for line in lines if int(line.split(",")[place]) <= step])

    def flush(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, keys: list[str]) -> io.TextIOWrapper:
        """Open for appending, with a header that has all of ``keys``."""
        header, lines = _read_csv(self.path) if self.path.exists() else ([], [])
        new = [key for key in keys if key not in header]
        if new:  # a fresh file, or a resume whose configuration logs more than before: old rows get empty cells
            header += new
            _write_csv(self.path, header, [line + "," * len(new) for line in lines])
        self._columns, self._keys = header, frozenset(keys)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        return self._file


class TensorBoardLogger:
    """Event files in ``folder``: each value of each update, and each metric, as a scalar."""

    def __init__(self, folder: Path) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401  (asked for now, so that its absence is known at the start)
        except ImportError as error:
            raise InputError(f"loggers.tensorboard needs 'pip install tensorboard', or false: {error}") from None
        self.folder = folder
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None

    def log_updates(self, rows: Sequence[Row]) -> None:
        """Every value of every row, at its step."""
        for row in rows:
            self._add(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def log_metrics(self, step: int, values: Row) -> None:
        """Each value, at ``step``."""
        self._add(step, values)

    def cut_back(self, step: int) -> None:
        """Drop the events after ``step`` from the files, and tell a TensorBoard that has read them to do the same.

        The marker alone would not do: readers take files in the order of their names, which say the second and the
        process id, and many readers ignore the marker.
        """
        for path in sorted(self.folder.glob("events.out.tfevents.*")):
            drop_events_after(path, step)
        self._purge_step = step + 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, step: int, values: Row) -> None:
        """One event for all values of a step: an eighth of the time of ``add_scalar`` for each of ten."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]


class WandbLogger:
    """Weights & Biases, with the training step as its step.

    ``folder``/wandb.json keeps the run's id and the last step sent. A resumed run is the same W&B run, and sends
    nothing at or below that step again: what was sent can't be taken back. The step is noted before it is sent, so
    that a kill between the two may lose a log point, but never doubles one.
    """

    def __init__(self, folder: Path, config: WandbConfig, run_name: str, resolved_config: dict[str, Any]) -> None:
        self._wandb = _import_wandb()
        self._note = folder / "wandb.json"
        note: dict[str, Any] = {"id": secrets.token_hex(4), "step": -1}
        if self._note.exists():
            note = json.loads(self._note.read_text())
        self.id: str = note["id"]
        self._sent: int = note["step"]
        self._fence = self._sent
        self._write_note()
        self._run = self._wandb.init(
            id=self.id,
            resume="allow",
            dir=str(folder),
            config=resolved_config,
            project=config.project,
            entity=config.entity,
            name=config.name or run_name,
            group=config.group,
            tags=config.tags or None,
            notes=config.notes,
            mode="offline" if config.mode == "offline" else None,  # None leaves WANDB_MODE its say; else online
            settings=self._wandb.Settings(console="off"),  # a progress bar makes no readable log
        )

    def log_updates(self, rows: Sequence[Row]) -> None:
        """The rows that no earlier session sent."""
        self._send([(int(row["step"]), {k: v for k, v in row.items() if k != "step"}) for row in rows])

    def log_metrics(self, step: int, values: Row) -> None:
        """The values, unless an earlier session got to ``step``. Call it after the update rows of that step."""
        self._send([(step, dict(values))])

    def cut_back(self, step: int) -> None:
        """Nothing: wandb.json says what is not to be sent again."""

    def flush(self) -> None:
        """Nothing: W&B's own process has what was sent."""

    def close(self) -> None:
        self._run.finish()

    def _send(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        steps = [(step, values) for step, values in steps if step > self._fence]
        if not steps:
            return
        if steps[-1][0] > self._sent:
            self._sent = steps[-1][0]
            self._write_note()
        for step, values in steps:
            self._run.log(values, step=step)

    def _write_note(self) -> None:
        write_atomically(self._note, json.dumps({"id": self.id, "step": self._sent}) + "\n")


def _import_wandb() -> Any:
    try:
        import wandb

        wandb.init  # noqa: B018  (the folder "wandb" that runs leave behind imports as a package too, an empty one)
    except (ImportError, AttributeError):
        message = "loggers.wandb needs the package wandb: pip install wandb, or set loggers.wandb to null"
        raise InputError(message) from None
    return wandb


def _cell(value: float) -> str:
    return str(int(value)) if isinstance(value, int) else repr(float(value))


def _other_keys(path: Path, expected: frozenset[str], got: Any) -> str:
    differing = [f"lacks {sorted(expected - got)}"] if expected - got else []
    differing += [f"adds {sorted(got - expected)}"] if got - expected else []
    return f"{path}: every row must have the keys of the first; this one {' and '.join(differing)}"


def _read_csv(path: Path) -> tuple[list[str], list[str]]:
    """Header and lines (of numbers, so not split yet), without a torn end: a line counts when it ended, and has as
    many cells as the header."""
    first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    header = next(csv.reader([first]), [])
    torn = next((i for i, line in enumerate(lines) if line.count(",") != len(header) - 1), len(lines))
    return header, lines[:torn]


def _write_csv(path: Path, header: list[str], lines: list[str]) -> None:
    first = io.StringIO()
    csv.writer(first, lineterminator="").writerow(header)
    write_atomically(path, "\n".join([first.getvalue(), *lines, ""]) if header else "")
