"""tools.pipeline, in a process that warm.py has forked; its stages are forked from it in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from warm import Forked, become

from tools import pipeline


class Stage(Forked):
    """In place of the Popen by which the pipeline starts a stage."""

    def __init__(self, command: Sequence[str], stderr: IO[bytes], preexec_fn: Callable[[], None], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            preexec_fn()
            os.dup2(stderr.fileno(), 2)
            become(command[1:], dict(os.environ), None)

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("the stage", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        while self.poll() is None:
            time.sleep(0.01)


if __name__ == "__main__":
    pipeline.Popen = Stage  # type: ignore[misc, assignment]
    sys.exit(pipeline.main())
