"""metrics.csv, a row per update."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabric_trainer.files import write_atomically
from fabric_trainer.loggers import Logger, Row


class CsvLogger(Logger):
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

    def cut_back(self, step: int) -> None:
        """Keep the rows up to ``step``; a last line that a kill cut short goes too."""
        if self.path.exists():
            header, lines = _read_csv(self.path)
            place = header.index("step") if header else 0
            _write_csv(self.path, header, [line for line in lines if int(line.split(",")[place]) <= step])

    def flush(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self, code: int = 0) -> None:
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
