"""``run``: as subprocess.run([python, script, ...]), in a process that has torch, lightning and deepspeed imported.

The imports take each process five to ten seconds of a core. Here a server does them once, without running anything,
and forks a process for every script; where Fabric starts further ranks, they are forked likewise. All else is real:
processes, signals, exit codes, ports. That the commands themselves start is test_launching.py's to show.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent


def run(
    command: Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """command: [sys.executable, script, argument, ...]. It has a session of its own; none of it is left after timeout
    seconds. env must ask for one thread: OMP_NUM_THREADS has been read."""
    assert command[0] == sys.executable, command
    asked = {"command": command[1:], "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
    assert asked["env"]["OMP_NUM_THREADS"] == "1"
    status, write = os.pipe()  # pid and exit code; closed when the last process of the session has ended
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        socket.send_fds(server(), [json.dumps(asked).encode()], [said.fileno(), wrong.fileno(), write])
        os.close(write)
        words, until = b"", time.monotonic() + timeout
        while select.select([status], [], [], max(until - time.monotonic(), 0))[0]:
            heard = os.read(status, 100)
            if not heard:
                break
            words += heard
        else:
            os.killpg(int(words.split()[0]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(command), timeout)
        os.close(status)
        for file in (said, wrong):
            file.seek(0)
        return subprocess.CompletedProcess(command, int(words.split()[1]), said.read(), wrong.read())


@cache
def server() -> socket.socket:
    """Started on the first call; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(HERE / "warm.py"), str(theirs.fileno())]
    subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    theirs.close()
    return ours


def serve(requests: socket.socket) -> dict[str, Any]:
    """Returns in every process that is to become a script; never in the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1_000_000, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    # between the server and the process, this one waits for its end
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    said, wrong, status = files
    pid = os.fork()
    if pid:
        os.write(status, f"{pid}\n".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
        os._exit(0)
    os.setsid()
    os.dup2(said, 1)
    os.dup2(wrong, 2)
    return dict(json.loads(message))


def become(command: Sequence[str], env: dict[str, str], cwd: str | None) -> NoReturn:
    """The script, from its beginning to its end; never back to what a process that was forked has on its stack."""
    os.environ.clear()
    os.environ.update(env)
    if cwd:
        os.chdir(cwd)
    sys.argv[:] = command
    # torch replaces a thread pool that a fork has broken when it is next asked for; asked by two threads of a backward
    # at once it aborts ("Invalid thread pool!"), so it is asked here
    sys.modules["torch"].set_num_threads(1)
    sys.path[:0] = [str(Path(command[0]).parent), *filter(None, env.get("PYTHONPATH", "").split(":"))]
    code: Any = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


class Forked:
    """In place of the Popen by which Fabric starts a rank: this process once more, from the script's beginning."""

    def __init__(self, command: Sequence[str], env: dict[str, str], cwd: str | None = None) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            atexit._clear()
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become(command[1:], env, cwd)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
    import deepspeed  # noqa: F401
    import lightning.fabric.strategies.launchers.subprocess_script as launcher
    import worker  # noqa: F401  (and with it all that a run imports)

    import fabric_trainer.jobs  # noqa: F401
    from fabric_trainer.command import load

    load(HERE.parent.parent / "configs" / "burgers.yaml")  # its parser is kept
    gc.collect()
    gc.freeze()
    launcher.subprocess = type("warm", (), {"Popen": Forked})  # type: ignore[attr-defined]
    asked = serve(requests)
    become(**asked)


if __name__ == "__main__":
    main()
