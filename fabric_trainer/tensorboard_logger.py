"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fabric_trainer.errors import InputError
from fabric_trainer.loggers import Logger, Row
from fabric_trainer.tfevents import drop_events_after

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
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

    def close(self, code: int = 0) -> None:
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
