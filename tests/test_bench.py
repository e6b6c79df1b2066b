"""The loops that ``make bench`` compares do the same work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

pytest.importorskip("accelerate")

from tools.bench.cases import CASES, Work
from tools.bench.loops import LOOPS, difference, hand_written


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_makes_the_updates_of_the_hand_written_one(name, case):
    assert difference(LOOPS[name], case) <= 1e-6


def doubled_loss(work: Work) -> None:
    loss = work.loss
    work.loss = lambda *arguments: 2 * loss(*arguments)
    hand_written(work)


def other_order(work: Work) -> None:
    batches = list(work.batches())
    work.batches = lambda: reversed(batches)
    hand_written(work)


def no_clipping(work: Work) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        hand_written(work)


@pytest.mark.parametrize("loop", [doubled_loss, other_order, no_clipping])
def test_other_work_is_seen(loop):
    assert max(difference(loop, case) for case in CASES) > 1e-2


def test_seconds_leave_the_first_updates_out():
    work = Work(CASES[0])
    work.times = [0.0] * work.case.warmup + [100.0 + 2 * step for step in range(work.case.updates + 1)]
    assert work.seconds == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_also_on_two_ranks():
    """Without a measurement the benchmark only checks."""
    program = [sys.executable, "-c", "from tools.bench.overhead import on_two_ranks; on_two_ranks(pairs=0)"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
