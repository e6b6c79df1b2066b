"""Runs of train.py that a tool starts: signals reach them, and no two tools work in one folder."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from fabric_trainer.errors import FINISHED, INTERRUPTED, TRY_AGAIN, InputError

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


class Stop(AbstractContextManager["Stop"]):
    """Keeps signals for the end of the run, which gets them too; ``signal`` is the last, or 0."""

    SIGNALS = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1}
    SIGNALS |= {signal.SIGHUP: signal.SIGTERM}

    def __init__(self) -> None:
        self.signal, self._process = 0, None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._came) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit code that the signal asks for."""
        return {0: FINISHED, signal.SIGINT: INTERRUPTED}.get(self.signal, TRY_AGAIN)

    @contextmanager
    def passed_on_to(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        self._process = process
        if self.signal:  # it came while the process began
            process.send_signal(self.SIGNALS[self.signal])
        try:
            yield
        finally:
            self._process = None

    def _came(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(self.SIGNALS[self.signal])


@contextmanager
def locked(folder: Path, taken: str, patience: float = 0.0) -> Iterator[IO[str]]:
    """Raises InputError, ``taken`` in it, where somebody else still has it after ``patience`` seconds."""
    with (folder / ".lock").open("w") as lock:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise InputError(f"{folder} is in use: {taken}") from None
                time.sleep(0.1)
        yield lock


_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def end_with(parent: int) -> None:
    """In a child that was just forked: SIGTERM, on which a run saves and leaves, should its parent be killed. Only
    Linux can; elsewhere it goes on, and holds the lock."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it is gone already
            os.kill(os.getpid(), signal.SIGTERM)
