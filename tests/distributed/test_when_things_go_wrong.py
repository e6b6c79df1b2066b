"""What goes wrong on one rank is answered by all: skipped, split, saved, or left together, and nothing hangs.

Updates have three micro-batches of two samples on each of two ranks: forwards 6 to 8 of a process are its window 2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
import yaml
from launches import HERE, results, run_worker
from systems import document
from test_every_strategy import assert_same_state, checkpoint_of, tolerance

from fabric_trainer.checkpoint import load

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
PLACES = {f"{kind} {place}": {"fault": kind, "at": at} for kind in ("oom forward", "oom backward")
          for place, at in (("first", 6), ("last", 8))}  # fmt: skip


def slow(*arguments: Any) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow)


def start(folder: Path, strategy: str, *flags: str, **fault: Any) -> tuple[int, str, float]:
    """A run of its own name ``run`` through the command line: exit code, what it printed, and its seconds."""
    made = document(strategy, task={"path": "systems.Faulty", "args": fault})
    (folder / f"{strategy}.yaml").write_text(yaml.safe_dump(made))
    command = [sys.executable, str(HERE / "train_cpu.py"), "--config", f"{strategy}.yaml", "--name", "run", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    done = warm.run(command, cwd=folder, env=environment, timeout=120)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def finished(folder: Path) -> dict[str, Any]:
    return checkpoint_of(folder / "runs")


# ---- all ranks skip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fsdp", slow("ddp"), *map(slow, ("deepspeed2", "tensor_parallel", "deepspeed3"))])
def test_a_nan_on_one_rank_is_skipped_by_all(trained, strategy):
    one, here = trained("single"), trained(strategy)
    forward = 12 if strategy == "tensor_parallel" else 6  # window 2: one data-parallel rank has six micro-batches
    rank = -1 if strategy == "tensor_parallel" else 1  # its ranks compute the same
    if not (one / "nan").exists():
        run_worker(one.parent, "single", {"faulty": {"cases": {"nan": {"fault": "nan", "at": 12, "rank": 0}}}})
    run_worker(here.parent, strategy, {"faulty": {"cases": {"nan": {"fault": "nan", "at": forward, "rank": rank}}}})
    for found in results(here.parent, strategy, "faulty"):
        assert found["nan"]["skipped"] == 1 and found["nan"]["step"] == 10
    assert_same_state(checkpoint_of(one, run="nan"), checkpoint_of(here, run="nan"), tolerance(strategy))


# ---- out of memory --------------------------------------------------------------------------------------------------


def test_one_process_splits_what_does_not_fit(trained):
    one = trained("single")
    cases = {name: case | {"rank": 0, "at": {6: 12, 8: 17}[case["at"]]} for name, case in PLACES.items()}
    run_worker(one.parent, "single", {"faulty": {"cases": cases}})
    (found,) = results(one.parent, "single", "faulty")
    for name in cases:
        assert found[name] == {"rows": 1, "skipped": 0, "step": 10}
        assert_same_state(checkpoint_of(one), checkpoint_of(one, run=name), 1e-10)


def test_ddp_splits_on_the_rank_that_runs_out(trained):
    """Every rank runs its micro-batches unsynced, so that one can begin its window again."""
    one = trained("single")
    jobs: dict[str, Any] = {"train": {}, "faulty": {"cases": PLACES}}
    run_worker(one.parent, "ddp", jobs, name="ddp split", faults={"oom": "split"})
    here = one.parent / "ddp split"
    assert_same_state(checkpoint_of(one), checkpoint_of(here), 1e-10)
    for found in results(one.parent, "ddp split", "faulty"):
        for name in PLACES:
            assert found[name] == {"rows": 1, "skipped": 0, "step": 10}, "both go on with the smaller size"
    for name in PLACES:
        assert_same_state(checkpoint_of(one), checkpoint_of(here, run=name), 1e-10)


SOME = ["oom forward first", "oom backward last"]


@pytest.mark.parametrize(
    "strategy, places",
    [slow("deepspeed2", SOME), slow("fsdp", list(PLACES)), slow("ddp", SOME)],
)
def test_where_a_rank_cannot_split_the_job_starts_again_with_less(trained, tmp_path, strategy, places):
    for place in places:
        code, output, seconds = start(tmp_path, strategy, "--overwrite", **PLACES[place])
        assert code == 76 and seconds < 60, output
        assert "error: out of memory with micro-batches of 2 (out of memory, as injected)" in output
        assert "rank 1 failed: OutOfMemoryRestart" in output, "the other rank says why it leaves"
    code, output, _ = start(tmp_path, strategy, "--resume", "auto")
    assert code == 0, output
    assert "micro-batches of 1 instead of 2: the run has run out of memory" in output
    assert_same_state(checkpoint_of(trained("single")), finished(tmp_path), tolerance(strategy))


def test_out_of_memory_before_the_first_checkpoint(tmp_path):
    """The next attempt has nothing to continue, and takes smaller micro-batches all the same."""
    code, output, _ = start(tmp_path, "single", "--faults.oom", "restart", fault="oom forward", at=0, rank=0)
    assert code == 76, output
    code, output, _ = start(tmp_path, "single", "--faults.oom", "restart", "--resume", "auto", at=-1)
    assert code == 0 and "it starts again" in output and "micro-batches of 1 instead of 2" in output, output


@pytest.mark.slow
def test_a_search_for_the_micro_batch_goes_on_in_the_next_job(trained, tmp_path):
    """Weights are sharded, and more than 3 rows do not fit on rank 1: 2 fit, 4 do not, which ends the job, 3 do."""
    tight = ("--task.path", "systems.Tight", "--task.args", "{limit: 3}")
    code, output, seconds = start(tmp_path, "fsdp", *tight, "--tune", "batch_size")
    assert code == 76 and seconds < 60 and "micro-batches of 4 do not fit (4 rows, as injected)" in output, output
    code, output, _ = start(tmp_path, "fsdp", *tight, "--tune", "batch_size")
    assert code == 0 and "batch.micro_batch_size 3" in output, output
    auto = (*tight, "--batch.micro_batch_size", "auto")
    code, output, _ = start(tmp_path, "fsdp", *auto)
    assert code == 76 and "micro-batches of 6 do not fit" in output, output
    code, output, _ = start(tmp_path, "fsdp", *auto, "--resume", "auto")
    assert code == 0 and "3 micro x 2 accumulate x 2 ranks = 12" in output, output
    assert_same_state(checkpoint_of(trained("single")), finished(tmp_path), tolerance("fsdp"))


# ---- killed, stopped, failed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", slow("fsdp"), slow("deepspeed2")])
def test_killed_three_times_it_ends_bit_equal(trained, tmp_path, strategy):
    """All ranks killed, one rank killed, and one rank asked to stop: both then save the same update."""
    code, output, _ = start(tmp_path, strategy, fault="SIGKILL", at=7, rank=-1)
    assert code != 0, output
    code, output, seconds = start(tmp_path, strategy, "--resume", "auto", fault="SIGKILL", at=7, rank=1)
    assert code != 0 and seconds < 60, output
    code, output, _ = start(tmp_path, strategy, "--resume", "auto", fault="SIGTERM", at=4, rank=1)
    assert code == 75, output
    stopped = finished(tmp_path)["counters"]["step"]
    assert 0 < stopped < 10
    code, output, _ = start(tmp_path, strategy, "--resume", "auto")
    assert code == 0 and f"step-{stopped:08d}.pt" in output, output
    whole, ended = checkpoint_of(trained(strategy)), finished(tmp_path)
    for tree in ("model", "ema"):
        assert all(torch.equal(value, ended[tree][name]) for name, value in whole[tree].items())
    for name, moments in whole["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ended["optimizer"]["state"][name][key]))


@pytest.mark.parametrize("fault, line", [
    ("raise", "ZeroDivisionError: a mistake in the task"),
    slow("data", "OSError: a file of the data set can't be read"),
    slow("save", "OSError: the disk is gone"),
])  # fmt: skip
def test_a_rank_that_raises_ends_the_job_with_its_own_traceback(tmp_path, fault, line):
    flags = ("--callbacks", "[systems.FailsToSave]") if fault == "save" else ()
    code, output, seconds = start(tmp_path, "fsdp", *flags, fault=fault, at=7)
    assert code != 0 and seconds < 45, output
    assert line in output and "Traceback" in output and "this rank leaves too" in output
    assert output.count(line) <= 3, "no echo from the other rank"


@pytest.mark.slow
def test_the_stop_of_one_rank_saves_one_state(tmp_path):
    """SIGTERM at rank 1 alone: the file is whole, and of an update that both had finished."""
    code, output, _ = start(tmp_path, "fsdp", fault="SIGTERM", at=4, rank=1)
    assert code == 75, output
    saved = load(tmp_path / "runs/run/checkpoints/last.pt")
    assert saved["counters"]["window"] == saved["counters"]["step"] == 3, "asked in window 1, known in window 2"
