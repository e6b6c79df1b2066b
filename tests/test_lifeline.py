"""Real processes: whichever rank dies or raises, and wherever its peers hang, all leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import REPOSITORY

from fabric_trainer.lifeline import Lifeline

# One import of torch, then one process per rank, each of which ends as any interpreter does. The peers ignore SIGTERM,
# as a rank does in a collective: its handler in Python never runs.
RANKS = """
import json, os, signal, socket, sys, threading, time
import torch
import torch.distributed as dist
from fabric_trainer import lifeline
from fabric_trainer.lifeline import Lifeline

world, options, folder = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
children = {}
for rank in range(world):
    pid = os.fork()
    if pid == 0:
        children = None
        err = os.open(f"{folder}/{rank}.err", os.O_CREAT | os.O_WRONLY)
        out = os.open(f"{folder}/{rank}.out", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(err, 2)
        break
    children[pid] = rank
if children:
    started, codes, seconds = time.monotonic(), {}, {}
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        codes[rank], seconds[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - started
    print(json.dumps([[codes[r] for r in range(world)], [seconds[r] for r in range(world)]]))
    sys.exit()

def broadcast(thing):
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]

def hang(where):
    if where == "all_reduce":  # fails when a rank goes, before the others have their news
        dist.all_reduce(torch.ones(3))
    elif where == "recv":  # of the survivors, each from the other
        dist.recv(torch.ones(3), 3 - rank - options["who"])
    time.sleep(60)

def descriptors():
    return sorted(os.listdir("/proc/self/fd")), threading.active_count()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
dist.barrier()
"""
HANGS = "\nwith Lifeline(rank, world, broadcast):\n    dist.barrier()\n    if rank == options['who']:\n        {deed}\n"
HANGS += "    hang(options['where'])\n"


class Job(NamedTuple):
    codes: list[int]
    seconds: list[float]
    out: list[str]
    err: list[str]


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that leads a group of its own; at the end what is left of the group is killed."""
    with subprocess.Popen(command, start_new_session=True, **options) as job:
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


def run(folder: Path, world: int, body: str, **options: object) -> Job:
    """Start ``world`` ranks that run ``body`` and wait for them, at most 40 s."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", RANKS + body, str(world), json.dumps(options), str(folder)]
    with started(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        codes, seconds = json.loads(job.communicate(timeout=40)[0])
    out, err = ([(folder / f"{rank}.{end}").read_text() for rank in range(world)] for end in ("out", "err"))
    return Job(codes, seconds, out, err)


distributed = pytest.mark.distributed
slow = pytest.mark.slow
everywhere = pytest.mark.parametrize(
    ("who", "where"),
    [(1, "recv"), (0, "sleep"), pytest.param(1, "all_reduce", marks=slow), pytest.param(0, "recv", marks=slow)],
)


@distributed
@everywhere
def test_a_rank_that_raises_ends_all(tmp_path, who, where):
    job = run(tmp_path, 3, HANGS.format(deed="raise ValueError('no such\\n  thing')"), who=who, where=where)
    assert job.codes == [1, 1, 1]
    assert max(job.seconds) < 10
    assert job.err[who].count("Traceback") == job.err[who].count("ValueError: no such\n  thing") == 1
    for rank in {0, 1, 2} - {who}:
        assert f"rank {who} failed: ValueError: no such; this rank leaves too\n" in job.err[rank]


@distributed
@everywhere
def test_a_rank_that_dies_ends_all(tmp_path, who, where):
    number = signal.SIGSEGV if where == "sleep" else signal.SIGKILL
    job = run(tmp_path, 3, HANGS.format(deed=f"os.kill(os.getpid(), {number})"), who=who, where=where)
    assert job.codes[who] == -number
    assert max(job.seconds) < 10
    for rank in {0, 1, 2} - {who}:
        assert job.codes[rank] == 1
        assert f"rank {who} died without a word; this rank leaves too\n" in job.err[rank]


@distributed
def test_a_worker_does_not_hold_the_line_of_its_dead_rank(tmp_path):
    deed = "os.fork() == 0 and time.sleep(60); os.kill(os.getpid(), signal.SIGKILL)"
    job = run(tmp_path, 2, HANGS.format(deed=deed), who=1, where="sleep")
    assert job.codes == [1, -signal.SIGKILL]
    assert job.seconds[0] < 10


@distributed
@everywhere
def test_leave_ends_all_with_its_code(tmp_path, who, where):
    """In all_reduce the others raise at once, and would end with code 1."""
    deed = "print('last words', end=''); line.leave(76, 'out of memory')"
    job = run(tmp_path, 3, HANGS.format(deed=deed).replace("):", ") as line:", 1), who=who, where=where)
    assert job.codes == [76, 76, 76]
    assert max(job.seconds) < 10
    assert job.out[who] == "last words"
    assert job.err[who] == f"rank {who}: out of memory\n"
    for rank in {0, 1, 2} - {who}:
        assert f"rank {who}: out of memory; this rank leaves too\n" in job.err[rank]


@distributed
@pytest.mark.slow
def test_an_echo_that_comes_before_the_news_ends_with_its_code(tmp_path):
    body = """
lifeline.SETTLE = 3
with Lifeline(rank, world, broadcast) as line:
    dist.barrier()
    if rank == 0:
        raise RuntimeError("connection closed by peer")
    time.sleep(1)
    line.leave(76, "out of memory")
"""
    job = run(tmp_path, 2, body)
    assert job.codes == [76, 76]
    assert "RuntimeError: connection closed by peer" in job.err[0]


@distributed
@pytest.mark.slow
def test_ranks_that_raise_together_print_their_own(tmp_path):
    body = """
with Lifeline(rank, world, broadcast):
    dist.barrier()
    raise ValueError(f"mine is {rank}")
"""
    job = run(tmp_path, 2, body)
    assert job.codes == [1, 1]
    for rank in (0, 1):
        assert job.err[rank].count("Traceback") == job.err[rank].count(f"ValueError: mine is {rank}") == 1


@distributed
@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [("SystemExit(3)", 3), ("SystemExit('no')", 1), ("ValueError('no')", 2)])
def test_codes_and_errors_that_the_caller_prints(tmp_path, error, code):
    body = """
try:
    with Lifeline(rank, world, broadcast, lambda error: 2 if isinstance(error, ValueError) else 1, (ValueError,)):
        if rank == 1:
            raise ERROR
        time.sleep(60)
except ValueError as error:
    sys.exit(2)
"""
    job = run(tmp_path, 2, body.replace("ERROR", error))
    assert job.codes == [code, code]
    assert "Traceback" not in "".join(job.err)
    assert f"rank 1 failed: {error.partition('(')[0]}: {'3' if code == 3 else 'no'}; this" in job.err[0]


@distributed
def test_a_normal_end_is_silent_quick_and_leaves_nothing(tmp_path):
    """Five in a row: strangers at the port, rank 0 ends first, and errors that are no failures."""
    body = r"""
def beset(thing):  # rank 0 sends the address; before the others know it, strangers are there
    for said in (b"", b"GET / HTTP/1.1", b'\0\0\0\6["",1]', b'\0\0\0\14["\\u00e9",1]'):
        stranger = socket.create_connection(thing[:2])
        stranger.sendall(said)
        strangers.append(stranger)
    return broadcast(thing)

strangers = []
broadcast(None), dist.barrier()
before = descriptors()
with Lifeline(rank, world, broadcast if rank else beset) as first:
    dist.barrier()
    started = time.monotonic()
print(time.monotonic() - started)
assert len(strangers) == (0 if rank else 4)
for stranger in strangers:
    stranger.settimeout(5)
    with stranger:
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
assert descriptors() == before, (descriptors(), before)
with Lifeline(rank, world, broadcast) as second:
    time.sleep(rank)
assert descriptors() == before, (descriptors(), before)
for error in (SystemExit(0), SystemExit(None), KeyboardInterrupt()):
    try:
        with Lifeline(rank, world, broadcast):
            dist.barrier()
            raise error
    except BaseException as caught:
        assert caught is error
    dist.barrier()
"""
    job = run(tmp_path, 3, body)
    assert job.err == ["", "", ""]
    assert job.codes == [0, 0, 0]
    assert max(float(seconds) for seconds in job.out) < 0.1


@distributed
@pytest.mark.slow
def test_rank_zero_that_has_ended_still_hears_of_a_death(tmp_path):
    job = run(tmp_path, 2, "with Lifeline(rank, world, broadcast):\n    rank and time.sleep(1), rank and os._exit(5)\n")
    assert job.codes == [1, 5]
    assert "rank 1 died without a word" in job.err[0]


@distributed
@pytest.mark.slow
def test_nothing_holds_up_the_end(tmp_path):
    """Rank 0's stderr is a pipe that nobody reads; rank 1 hangs while it ends."""
    body = """
lifeline.FORCE = 5
end, full = os.pipe()
os.set_blocking(full, False)
try:
    while os.write(full, b"." * 4096):
        pass
except BlockingIOError:
    os.set_blocking(full, True)
if rank == 0:
    os.dup2(full, 2)
try:
    with Lifeline(rank, world, broadcast, lambda error: 7):
        rank or time.sleep(60)
        raise ValueError
finally:
    time.sleep(60)
"""
    job = run(tmp_path, 2, body)
    assert job.codes == [7, 7]
    assert max(job.seconds) < 12


@distributed
def test_the_code_survives_a_launcher_that_kills_itself(tmp_path):
    """``python script.py``: Fabric starts the other ranks from rank 0, and rank 0 kills itself on seeing one fail."""
    (tmp_path / "script.py").write_text("""
import os, time
from lightning.fabric import Fabric
from lightning.fabric.strategies.launchers import subprocess_script as launcher
from fabric_trainer.lifeline import Lifeline

def observe(children):  # as it does, but every 0.1 s instead of 5 s
    launcher._ChildProcessObserver(os.getpid(), children, sleep_period=0.1).start()

launcher._launch_process_observer = observe
fabric = Fabric(accelerator="cpu", devices=3, strategy="ddp")
fabric.launch()
with Lifeline(fabric.global_rank, fabric.world_size, fabric.broadcast) as line:
    fabric.barrier()
    if fabric.global_rank == 1:
        line.leave(76, "out of memory")
    time.sleep(60)
""")
    command = [sys.executable, "script.py"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with started(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as job:
        err = job.communicate(timeout=60)[1]
    assert job.returncode == 76
    assert err.count("rank 1: out of memory; this rank leaves too\n") == 2


def test_one_process_opens_nothing(capfd):
    def broadcast(thing: object) -> object:
        raise AssertionError("there is nobody to talk to")

    before, hook = (os.listdir("/proc/self/fd"), threading.active_count()), sys.excepthook
    with Lifeline(0, 1, broadcast):
        assert (os.listdir("/proc/self/fd"), threading.active_count()) == before
    with pytest.raises(ValueError, match="through"), Lifeline(0, 1, broadcast):
        raise ValueError("through")
    assert sys.excepthook is hook
    assert capfd.readouterr() == ("", "")


def test_one_process_leaves():
    code = (
        "from fabric_trainer.lifeline import Lifeline\nwith Lifeline(0, 1, None) as line: line.leave(76, 'no memory')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (76, "rank 0: no memory\n")
