"""How far the run is: a bar where a person looks, plain lines where a file does."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

# what is known by name; anything else is shown as "name 0.1234"
FORMATS: dict[str, str] = {
    "epoch": "epoch {:.0f}",
    "loss": "loss {:.4g}",
    "lr": "lr {:.1e}",
    "grad_norm": "grad_norm {:.2g}",
    "samples_per_second": "{:.0f} samples/s",
}


class Progress(AbstractContextManager["Progress"]):
    """The progress of a run from update ``start`` to ``total`` (None: open-ended), on rank 0.

    stream: a terminal gets a bar that is redrawn, at log points only; anything else gets one plain line for each
    ``update``, without control codes and flushed at once, such as::

        step 150/1000 · epoch 2 · loss 0.0312 · lr 1.0e-03 · grad_norm 0.41 · 1243 samples/s · 0:01:12 left

    The time left follows from the pace since this object was made. clock: seconds, rising.
    """

    def __init__(
        self,
        total: int | None,
        start: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.start = total, start
        self.stream = stream or sys.stdout
        self._clock, self._began = clock, clock()
        self._bar: RichProgress | None = None
        self._closed = False
        if self.stream.isatty():
            self._bar = _bar(self.stream, total)
            self._task = self._bar.add_task("", total=total, completed=start, text="", left="")

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that ``step`` updates are done, with what was logged: epoch, loss, lr, grad_norm,
        samples_per_second, and whatever else."""
        parts, left = [_text(name, value) for name, value in values.items()], self._left(step)
        if self._bar is None:
            of = "" if self.total is None else f"/{self.total}"
            self._write(" · ".join([f"step {step}{of}", *parts, *([f"{left} left"] if left else [])]))
        elif not self._closed:
            self._bar.start()  # the first time; a started bar stays as it is
            self._bar.update(self._task, completed=step, text=" · ".join(parts), left=left and f"{left} left")
            self._bar.refresh()

    def print(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            self._write(line)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is and the cursor below it. May be called twice."""
        if self._bar is not None and not self._closed and self._bar.live.is_started:
            self._bar.stop()
        self._closed = True

    def _left(self, step: int) -> str:
        """ "0:01:12", or "" where it can't be known."""
        if self.total is None or step <= self.start:
            return ""
        pace = (self._clock() - self._began) / (step - self.start)
        return duration(pace * max(0, self.total - step))

    def _write(self, line: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        line = line.encode(encoding, "replace").decode(encoding)  # a "·" must not end a run under LANG=C
        self.stream.write(line + "\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """ "0:01:12", "26:03:00": hours, minutes, seconds, rounded up."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _text(name: str, value: float) -> str:
    return FORMATS.get(name, name + " {:.4g}").format(value)


def _bar(stream: TextIO, total: int | None) -> RichProgress:
    """Counter, bar, values, time left. Where the terminal is narrow the bar goes first, then the last values."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column

    console = Console(file=stream, force_terminal=True)
    counter, left = 2 * len(str(total or 0)) + 1, len("00:00:00 left")
    bar = 20 if console.width >= 110 else 0
    values = max(1, console.width - counter - left - bar - 4)  # else rich would shorten each column alike
    columns: list[ProgressColumn] = [
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar, complete_style="cyan", finished_style="green"),
        TextColumn(
            "{task.fields[text]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", max_width=values),
        ),
        TextColumn("{task.fields[left]}", style="dim", table_column=Column(no_wrap=True)),
    ]
    if not bar:
        del columns[1]
    # no thread beside the training: it is drawn when there is something new
    return Progress(*columns, console=console, auto_refresh=False)
