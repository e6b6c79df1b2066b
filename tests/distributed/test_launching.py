"""Real processes, by every launcher: the updates of one process, and a restarted job that continues its own run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from toys import Regression

from fabric_trainer import cli, slurm
from fabric_trainer.checkpoint import load
from fabric_trainer.config import FabricConfig
from fabric_trainer.errors import FINISHED, INPUT, INTERRUPTED, TRY_AGAIN, InputError
from fabric_trainer.launch import meet_again, resolve
from fabric_trainer.run import read_status

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = {
    "task": {"path": "toys.Regression", "args": {"samples": 47}},
    "batch": {"micro_batch_size": 4, "accumulate": 2},
    "optim": {"args": {"eps": 1e-6}},
    "clip": {"norm": 1.0},
    "ema": {"decay": 0.9},
    "run": {"max_epochs": 2},
    "fabric": {"accelerator": "cpu", "precision": "64-true"},
    "loggers": {"tensorboard": False},
}
SECONDS = 120  # for a launch, on a machine that is busy
BIN = Path(sys.executable).parent
TRAIN = [str(REPOSITORY / "train.py"), "--config", "toy.yaml"]
LAUNCHERS = ("LT_", "SLURM_", "TORCHELASTIC_", "KUBERNETES_", "MASTER_", "PET_")
COUNTS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")


class Struck(Regression):
    """On its first attempt, one rank sends itself a signal in the first forward of the fourth of six windows."""

    def __init__(self, samples: int, number: int, rank: int = 1) -> None:
        super().__init__(samples)
        self.number, self.rank, self.calls = number, rank, 0

    def loss(self, network, batch):
        self.calls += network.training
        value = os.environ.get
        attempt = value("TORCHELASTIC_RESTART_COUNT") or value("SLURM_RESTART_COUNT") or "0"
        rank = int(value("RANK") or value("SLURM_PROCID") or value("LOCAL_RANK") or 0)
        if network.training and (attempt, rank, self.calls) == ("0", self.rank, 7):
            os.kill(os.getpid(), self.number)
        return super().loss(network, batch)


def struck(number: int) -> list[str]:
    """The arguments that make it the task, with every update saved."""
    return ["--task.path=test_launching.Struck", f"--task.args.number={int(number)}", "--checkpoint.every=1 steps"]


class Process(NamedTuple):
    """One to be started, and what its environment says beside the machine's."""

    command: list[str]
    environment: dict[str, str] = {}


class Done(NamedTuple):
    codes: list[int]
    said: str


def launch(folder: Path, *processes: Process) -> Done:
    """Start all, wait for all; none is left, whatever happens."""
    path = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "distributed"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) and name not in COUNTS}
    clean |= {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen] = []
    with (folder / "said.txt").open("w+") as said:
        try:
            for command, environment in processes:
                own = clean | environment
                running.append(
                    subprocess.Popen(
                        command, cwd=folder, env=own, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            codes = [process.wait(SECONDS) for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        return Done(codes, said.read())


def free(port: int = 0) -> int | None:
    """The port if nobody has it; one of the system's choice for 0."""
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return None
        return tried.getsockname()[1]


def train(*arguments: str, by: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*by, *TRAIN, "--name", "two", *arguments]


def torchrun(*flags: str) -> tuple[str, ...]:
    return (str(BIN / "torchrun"), *flags)


def python() -> list[Process]:
    return [Process(train("--fabric.devices", "2"))]


def torchrun_here() -> list[Process]:
    return [Process(train(by=torchrun("--standalone", "--nproc-per-node", "2")))]


def fabric_run() -> list[Process]:
    return [Process(train(by=(str(BIN / "fabric"), "run", "--devices", "2", "--accelerator", "cpu")))]


def srun(*arguments: str, **job: str) -> list[Process]:
    """Two tasks on one node. Lightning makes the port of the job id's last four digits."""
    number = next(number for number in count(1000 + os.getpid() % 8000) if free(15000 + number))
    shared = {
        "SLURM_JOB_ID": f"7{number}",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        **job,
    }
    return [
        Process([sys.executable, *TRAIN, *arguments], shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]


def srun_named() -> list[Process]:
    return srun("--name", "two")


def addresses_by_hand() -> list[Process]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free())}
    command = train("--fabric.num_nodes", "2", "--fabric.devices", "1")
    return [Process(command, shared | {"NODE_RANK": rank}) for rank in ("0", "1")]


def kubeflow() -> list[Process]:
    """Two pods of a PyTorchJob, without torchrun in them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free()), "WORLD_SIZE": "2"}
    shared |= {"KUBERNETES_PORT": "tcp://10.0.0.1:443"}
    return [Process(train(), shared | {"RANK": rank}) for rank in ("0", "1")]


def two_agents(*flags: str) -> list[Process]:
    common = ("--nnodes", "2", "--nproc-per-node", "1", *flags)
    return [Process(train(by=torchrun(*common, "--node-rank", rank))) for rank in ("0", "1")]


def two_agents_static() -> list[Process]:
    return two_agents("--master-addr", "127.0.0.1", "--master-port", str(free()))


def two_agents_c10d() -> list[Process]:
    return two_agents("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free()}", "--rdzv-id", "pair")


def spawn() -> list[Process]:
    return [Process(train("--fabric.strategy", "ddp_spawn", "--fabric.devices", "2"))]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The last checkpoint of one process, at the global batch of two."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    where = ["--config", str(folder / "toy.yaml"), "--run.root", str(folder / "runs")]
    assert cli.main([*where, "--name", "one", "--batch.accumulate", "4"]) == FINISHED
    return load(folder / "runs" / "one" / "checkpoints" / "last.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def assert_same(reference: dict, run: Path) -> None:
    """Weights, their average and moments; and two ranks have made them."""
    found = load(run / "checkpoints" / "last.pt")
    assert found["batch"]["world_size"] == 2
    assert (found["counters"]["step"], found["counters"]["samples"]) == (6, 94)
    torch.testing.assert_close(found["model"], reference["model"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["ema"], reference["ema"], rtol=1e-10, atol=1e-10)
    for name, moments in reference["optimizer"]["state"].items():
        torch.testing.assert_close(found["optimizer"]["state"][name], moments, rtol=1e-10, atol=1e-10)


# ---- every launcher -------------------------------------------------------------------------------------------------

WAYS = (
    *(python, fabric_run, srun_named),
    *(
        pytest.param(way, marks=pytest.mark.slow)
        for way in (torchrun_here, addresses_by_hand, two_agents_static, spawn, kubeflow, two_agents_c10d)
    ),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_two_processes_make_the_updates_of_one(folder, reference, way: Callable[[], list[Process]]):
    processes = way()
    done = launch(folder, *processes)
    assert done.codes == [FINISHED] * len(processes), done.said
    assert done.said.count("updates  ") == 1, "one summary, by one rank 0"
    assert_same(reference, folder / "runs" / "two")


NOTEBOOK = """
from fabric_trainer import cli

def run(*arguments):
    return cli.main(["--config", "toy.yaml", "--fabric.strategy", "ddp_notebook", "--fabric.devices", "2", *arguments])

codes = [run("--name", "first"), run("--name", "second"), run("--name", "second")]
codes += [run("--name", "third", "--task.path", "test_launching.Struck", "--task.args.number", "9")]
print("codes", codes)
"""


@pytest.mark.parametrize(
    "variables, world",
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 2),  # one pod: its devices are the configuration's to say
        ({"RANK": "0", "WORLD_SIZE": "4", "NODE_RANK": "0"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "4", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, 2),
    ],
)
def test_whose_rank_it_is(monkeypatch, variables, world):
    """RANK counts machines where nothing else counts processes."""
    for name in os.environ:
        if name.startswith(LAUNCHERS) or name in COUNTS:
            monkeypatch.delenv(name)
    for name, value in {"MASTER_ADDR": "a", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    devices = "auto" if world == 4 else 2
    assert resolve(FabricConfig(accelerator="cpu", devices=devices)).world_size == world


@pytest.mark.slow
def test_a_notebook_trains_twice_and_hears_of_errors(folder, reference):
    """In one process that forks: the cell goes on after an error."""
    (folder / "notebook.py").write_text(NOTEBOOK)
    done = launch(folder, Process([sys.executable, "notebook.py"]))
    assert "codes [0, 0, 2, 1]" in done.said, done.said
    assert "error: run runs/second exists: continue it with --resume auto" in done.said
    assert "terminated with signal SIGKILL" in done.said
    for name in ("first", "second"):
        assert_same(reference, folder / "runs" / name)


@pytest.mark.slow
def test_an_error_in_a_spawned_process_is_one_line(folder):
    (process,) = spawn()
    done = launch(folder, Process([*process.command, "--resume", "nowhere.pt"]))
    assert done.codes == [INPUT]
    assert "error: --resume nowhere.pt: there is no such checkpoint" in done.said
    assert "Traceback" not in done.said


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_torchrun_restarts_a_run_that_then_continues(folder, reference):
    """A rank is killed. The second attempt finds the run of the first by the launch's id, without --name."""
    elastic = torchrun("--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-backend", "c10d")
    elastic += ("--rdzv-endpoint", f"127.0.0.1:{free()}", "--rdzv-id", "job 17")
    done = launch(folder, Process([*elastic, *TRAIN, *struck(signal.SIGKILL)]))
    assert done.codes == [FINISHED], done.said
    (run,) = (path.parent for path in folder.glob("runs/*/run.json"))
    assert "resumed from" in done.said
    assert len(json.loads((run / "environment.json").read_text())["earlier"]) == 1
    assert_same(reference, run)


@pytest.mark.slow
def test_a_restart_on_two_nodes(folder, reference):
    """The rank that is killed is on the second, so that the first, with rank 0, has not counted a restart."""
    flags = ("--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free()}")
    command = torchrun("--nnodes", "2", "--nproc-per-node", "1", *flags, "--rdzv-id", "pair")
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = launch(folder, *[Process([*command, *TRAIN, *struck(signal.SIGKILL)], own_store)] * 2)
    assert done.codes == [FINISHED, FINISHED] and "resumed from" in done.said, done.said
    (run,) = (path.parent for path in folder.glob("runs/*/run.json"))
    assert_same(reference, run)


@pytest.mark.slow
def test_standalone_torchrun_brings_an_id_of_its_own(folder, reference):
    elastic = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--rdzv-id", "X")
    done = launch(folder, Process([*elastic, *TRAIN, *struck(signal.SIGKILL)]))
    assert done.codes == [FINISHED] and "resumed from" in done.said, done.said
    (run,) = (path.parent for path in folder.glob("runs/*/run.json"))
    assert_same(reference, run)


@pytest.mark.slow
def test_a_restartable_launch_without_id_or_name_is_refused(folder):
    elastic = torchrun("--nproc-per-node", "1", "--max-restarts", "1", "--master-port", str(free()))
    done = launch(folder, Process([*elastic, *TRAIN]))
    assert done.codes == [1]
    assert "error: this launch may be restarted (--max-restarts): give --name, or the launcher's --rdzv-id" in done.said
    assert 'train.py", line' not in done.said, "a traceback of ours"
    assert not (folder / "runs").exists()


def test_several_nodes_that_may_be_restarted_need_a_store_of_their_own(monkeypatch):
    for name, value in {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(InputError, match="on several nodes needs --rdzv-backend c10d, and TORCH_DISABLE_SHARE"):
        meet_again()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    meet_again()


SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
cat {folder}/runs/*/run.json > {folder}/status_then
{then}
"""


def stub(folder: Path, then: str = "exit 0") -> str:
    """A scontrol that notes its arguments and what was on disk; returns the PATH on which it is first."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    (place / "scontrol").write_text(SCONTROL.format(folder=folder, then=then))
    (place / "scontrol").chmod(0o755)
    return f"{place}:{os.environ['PATH']}"


def test_a_job_whose_time_runs_out_is_requeued_and_finishes(folder, reference):
    """SIGUSR1 meets one rank only, not the one that calls scontrol."""
    arguments = ("--fabric.requeue", "true", *struck(signal.SIGUSR1))
    tasks = srun(*arguments, PATH=stub(folder))
    job = tasks[0].environment["SLURM_JOB_ID"]
    done = launch(folder, *tasks)
    assert done.codes == [TRY_AGAIN, TRY_AGAIN], done.said
    assert (folder / "calls").read_text() == f"requeue {job}\n"
    assert json.loads((folder / "status_then").read_text())["status"] == "stopped"
    assert done.said.count(f"job {job} is requeued: it will continue this run") == 1
    (run,) = (path.parent for path in folder.glob("runs/*/run.json"))
    assert load(run / "checkpoints" / "last.pt")["counters"]["step"] == 5

    done = launch(folder, *srun(*arguments, PATH=stub(folder), SLURM_JOB_ID=job, SLURM_RESTART_COUNT="1"))
    assert done.codes == [FINISHED, FINISHED], done.said
    assert "resumed from" in done.said and read_status(run)["status"] == "finished"
    assert len((folder / "calls").read_text().splitlines()) == 1
    assert_same(reference, run)


def stopped(folder: Path, number: int, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and what is said of a run in this process that gets a signal."""
    arguments = ["--config", str(folder / "toy.yaml"), "--run.root", str(folder / "runs"), "--name", "one"]
    arguments += ["--fabric.requeue", "true", *struck(number), "--task.args.rank", "0"]
    code = cli.main(arguments)
    return code, capfd.readouterr().out


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is in a SLURM job, whose task it is not."""
    for name in os.environ:
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return monkeypatch


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, TRY_AGAIN), (signal.SIGINT, INTERRUPTED)])
def test_only_a_job_whose_time_runs_out_is_requeued(folder, job, capfd, number, code):
    job.setenv("PATH", stub(folder))
    assert stopped(folder, number, capfd)[0] == code
    assert not (folder / "calls").exists()


def test_a_task_of_an_array_is_requeued_as_such(folder, job, capfd):
    job.setenv("PATH", stub(folder))
    job.setenv("SLURM_ARRAY_JOB_ID", "4700")
    job.setenv("SLURM_ARRAY_TASK_ID", "3")
    code, said = stopped(folder, signal.SIGUSR1, capfd)
    assert code == TRY_AGAIN and "job 4700_3 is requeued" in said
    assert (folder / "calls").read_text() == "requeue 4700_3\n"


@pytest.mark.parametrize(
    "then, problem",
    [
        (None, "No such file or directory: 'scontrol'"),
        ("echo 'slurm_requeue error:\n  Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("exit 3", "exit code 3"),
        ("exec sleep 9", "timed out"),
    ],
)
def test_a_requeue_that_fails_is_one_line_and_loses_nothing(folder, job, capfd, then, problem):
    job.setenv("PATH", stub(folder, then) if then else str(folder))
    job.setattr(slurm, "PATIENCE", 1)
    code, said = stopped(folder, signal.SIGUSR1, capfd)
    assert code == TRY_AGAIN
    (line,) = (line for line in said.splitlines() if "scontrol" in line)
    assert line.startswith("scontrol requeue 4711 failed (") and problem in line and "--resume auto" in line
    assert (folder / "runs" / "one" / "checkpoints" / "last.pt").exists()


def test_outside_slurm_it_says_so_and_goes_on(folder, job, capfd):
    job.delenv("SLURM_JOB_ID")
    job.setenv("PATH", stub(folder))
    code, said = stopped(folder, signal.SIGUSR1, capfd)
    assert code == TRY_AGAIN and "fabric.requeue: this is no SLURM job, nothing will be requeued" in said
    assert not (folder / "calls").exists()
