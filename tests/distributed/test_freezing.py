"""Freezing under every strategy: what is frozen stands still, what is unfrozen trains as it does in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launches import CONTROLLED, results
from test_every_strategy import assert_same_state, checkpoint_of, tolerance
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
UNFROZEN = {"blocks.1": 4, "blocks.0": 7, "embed": 7, "head": 0}
LAST = 10


def of(tree: dict[str, Tensor], unit: str) -> dict[str, Tensor]:
    return {name: value for name, value in tree.items() if name.startswith(unit + ".")}


def saved(folder: Path, run: str = "freezing") -> dict[int, dict[str, Any]]:
    return {step: checkpoint_of(folder, step, run) for step in range(1, LAST + 1)}


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_what_is_frozen_stands_still_and_moves_after(trained, strategy):
    """Bit for bit, weights and BatchNorm statistics, with weight decay."""
    files = saved(trained(strategy, controls=True))
    for unit, start in UNFROZEN.items():
        for step in range(2, LAST + 1):
            before, after = of(files[step - 1]["model"], unit), of(files[step]["model"], unit)
            moved = {name: not torch.equal(before[name], after[name]) for name in before}
            assert set(moved.values()) == {step > start}, (unit, step, moved)
    assert "embed.1.running_var" in of(files[1]["model"], "embed")


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_an_unfreeze_leaves_all_else_as_it_was(trained, strategy):
    """The state right after it against that of a run without it: weights, averages and moments, bit for bit; and
    Adam counts the steps of the new ones from 0."""
    folder = trained(strategy, controls=True)
    with_it, without = checkpoint_of(folder, 4, "freezing"), checkpoint_of(folder, 4, "frozen")
    assert_same_state(with_it, without, 0)
    moments = checkpoint_of(folder, 6, "freezing")["optimizer"]["state"]
    assert float(moments["blocks.1.up.weight"]["step"]) == 2
    assert float(moments["head.weight"]["step"]) == 6
    assert "blocks.0.up.weight" not in moments


@pytest.mark.parametrize("strategy", CONTROLLED[1:])
def test_what_is_unfrozen_trains_as_in_one_process(trained, strategy):
    """Until the BatchNorm moves, whose statistics depend on the micro-batch."""
    for step in (3, 6, 7):
        one, here = (
            checkpoint_of(trained("single"), step, "freezing"),
            checkpoint_of(trained(strategy, controls=True), step, "freezing"),
        )
        assert_same_state(one, here, tolerance(strategy))


@pytest.mark.parametrize("strategy", CONTROLLED)
def test_a_resume_at_every_boundary_equals_the_uninterrupted_run(trained, strategy):
    """Before a change, at it, at the next, and after it; bit for bit."""
    folder = trained(strategy, controls=True)
    for step in (3, 4, 7, 8):
        assert_same_state(
            checkpoint_of(folder, LAST, "freezing"), checkpoint_of(folder, LAST, f"freezing from {step}"), 0
        )


@pytest.mark.parametrize("strategy", CONTROLLED[:-1])
def test_a_probe_reads_the_same_everywhere_and_leaves_no_trace(trained, strategy):
    """Gradients of frozen units; one process has other micro-batches, so that the ranks are compared with each other
    and, where they see the same rows, with one process."""
    ranks = results(trained(strategy, controls=True).parent, strategy, "probing")
    for rank in ranks:
        assert all(rank["same"])
        assert rank["readings"] == ranks[0]["readings"]
        assert rank["readings"][0].keys() == {"blocks.1", "blocks.0", "embed"}
        assert all(mean > 0 for each in rank["readings"] for mean in each["blocks.1"]["mean"])
    if strategy == "tensor_parallel":  # two processes that see the rows of one
        (one,) = results(trained("single").parent, "single", "probing")
        for a, b in zip(one["readings"], ranks[0]["readings"], strict=True):
            for unit in a:
                assert a[unit]["mean"] == pytest.approx(b[unit]["mean"], rel=1e-6)
                assert a[unit]["variance"] == pytest.approx(b[unit]["variance"], rel=1e-6)
