"""Pairs by trajectory, several tasks as one dataset, and the order of their samples."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ups
from data.pairs import Pairs, Several
from data.plans import Balanced, plan
from fabric_trainer.errors import InputError

# ---- pairs --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 4), frames=st.integers(2, 12), stride=st.integers(1, 4), horizon=st.integers(1, 4))
def test_pairs_are_those_of_a_loop(n: int, frames: int, stride: int, horizon: int) -> None:
    z = torch.arange(n * frames).view(n, frames, 1).float()
    expected = []
    for trajectory in z:
        seen = trajectory[::stride]
        for i in range(len(seen) - horizon):
            expected.append((seen[i], seen[i + 1], seen[i + 2 : i + 1 + horizon]))
    if not expected:
        with pytest.raises(InputError, match=f"{frames} frames are .* a pair needs {horizon + 1}"):
            Pairs({"z": z}, stride, horizon)
        return
    pairs = Pairs({"z": z}, stride, horizon)
    assert len(pairs) == len(expected)
    batch = pairs.__getitems__(list(range(len(pairs))))
    assert torch.equal(batch["z0"], torch.stack([e[0] for e in expected]))
    assert torch.equal(batch["z1"], torch.stack([e[1] for e in expected]))
    assert ("z_future" in batch) == (horizon > 1)
    if horizon > 1:
        assert torch.equal(batch["z_future"], torch.stack([e[2] for e in expected]))
    assert torch.equal(pairs[len(pairs) - 1]["z1"], expected[-1][1])


def test_golden_has_a_hundred_pairs_per_trajectory() -> None:
    assert len(Pairs({"z": torch.zeros(12, 201, 1)}, time_stride=2)) == 1200


def write(path: Path, *shape: int) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_pairs_from_disk_are_those_from_memory(tmp_path: Path) -> None:
    write(tmp_path / "burgers1d_train_0.h5", 3, 9, 4)
    write(tmp_path / "burgers1d_train_1.h5", 2, 9, 4)
    fields = ups.read(tmp_path, "burgers1d", "train")
    lazy, whole = Pairs({"u": fields}, 2, 3), Pairs({"u": fields.tensor(), "z": fields.tensor()}, 2, 3)
    order = [7, 0, len(whole) - 1, 3]
    a, b = lazy.__getitems__(order), whole.__getitems__(order)
    assert set(a) == {"u0", "u1", "u_future"} and len(lazy) == len(whole) == 10
    assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], b["z" + key[1:]]) for key in a)


def test_a_steady_task_is_one_pair(tmp_path: Path) -> None:
    u = torch.randn(4, 2, 1, 3, 3)
    pairs = Pairs({"u": u}, time_stride=2, steady=True)
    assert len(pairs) == 4 and torch.equal(pairs[3]["u0"], u[3, 0]) and torch.equal(pairs[3]["u1"], u[3, 1])
    with pytest.raises(InputError, match="darcy2d: 2 frames are 2 states at time_stride 1 and rollout_horizon 2"):
        Pairs({"u": u}, horizon=2, steady=True, name="darcy2d")


def test_states_must_agree() -> None:
    with pytest.raises(ValueError, match="different"):
        Pairs({"z": torch.zeros(2, 5, 1), "u": torch.zeros(2, 4, 1)})


# ---- several tasks ------------------------------------------------------------------------------------------------


def test_tasks_of_different_grids() -> None:
    line, plane = torch.randn(3, 5, 1, 1, 6), torch.randn(4, 2, 1, 4, 4)
    tokens = [torch.randn(3, 5, 2, 3), torch.randn(4, 2, 2, 3)]
    several = Several(
        ["advection1d", "darcy2d"],
        [Pairs({"u": line, "z": tokens[0]}), Pairs({"u": plane, "z": tokens[1]}, steady=True)],
    )
    assert len(several) == 12 + 4 and several.sizes == [12, 4]
    order = [13, 0, 15, 11, 12]
    batch = several.__getitems__(order)
    assert batch["task"].tolist() == [1, 0, 1, 0, 1]
    assert batch["u0"].shape == (5, 16) and batch["z1"].shape == (5, 2, 3)
    lines, planes = batch["task"] == 0, batch["task"] == 1
    assert torch.equal(several.cut("u1", batch["u1"][lines], 0), torch.stack((line[0, 1], line[2, 4])))
    assert torch.equal(several.cut("u1", batch["u1"][planes], 1), plane[[1, 3, 0], 1])
    assert not batch["u0"][lines, 6:].any()
    assert torch.equal(several.cut("z0", batch["z0"][planes], 1), tokens[1][[1, 3, 0], 0])
    for row, index in enumerate(order):  # a row is the same alone
        assert all(torch.equal(value, batch[key][row]) for key, value in several[index].items())


def test_one_shape_is_stacked() -> None:
    u, v = torch.randn(2, 3, 1, 1, 4), torch.randn(1, 3, 1, 1, 4)
    batch = Several(["burgers1d", "advection1d"], [Pairs({"u": u}), Pairs({"u": v})]).__getitems__([4, 1, 5])
    assert torch.equal(batch["u0"], torch.stack((v[0, 0], u[0, 1], v[0, 1])))


def test_different_keys() -> None:
    with pytest.raises(ValueError, match="different keys"):
        Several(["a", "b"], [Pairs({"u": torch.zeros(1, 3, 1)}), Pairs({"z": torch.zeros(1, 3, 1)})])


# ---- plans --------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def tasks_of(order: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), order, side="right")


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9), epoch=st.integers(0, 9), data=st.data())
def test_balanced(sizes: list[int], seed: int, epoch: int, data: st.DataObject) -> None:
    balanced = plan("balanced", sizes, seed)
    order = balanced(epoch)
    assert order.dtype == np.int64 and len(order) == balanced.length(epoch) == len(sizes) * max(sizes)
    counts = np.bincount(order, minlength=sum(sizes))
    assert len(counts) == sum(sizes) and counts.min() >= 1  # nothing is left out
    for own in np.split(counts, np.cumsum(sizes)[:-1]):
        assert own.sum() == max(sizes) and own.max() - own.min() <= 1
    cut = data.draw(st.integers(0, len(order)))
    came = np.bincount(tasks_of(order[:cut], sizes), minlength=len(sizes))
    assert came.max() - came.min() <= 1
    np.testing.assert_array_equal(order, Balanced(sizes, seed)(epoch))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_proportional(sizes: list[int], seed: int, epoch: int) -> None:
    proportional = plan("proportional", sizes, seed)
    order = proportional(epoch)
    assert len(order) == proportional.length(epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    np.testing.assert_array_equal(order, plan("proportional", sizes, seed)(epoch))


@pytest.mark.parametrize("strategy", ["proportional", "balanced"])
def test_other_seeds_and_epochs_have_other_orders(strategy: str) -> None:
    orders = [plan(strategy, [100, 10], seed)(epoch) for seed in range(3) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    tasks = [tasks_of(order, [100, 10]) for order in orders]
    assert len({order.tobytes() for order in tasks}) == 9  # the tasks' turns differ too


def test_a_small_task_comes_in_fresh_permutations() -> None:
    order = Balanced([100, 10], 0)(0)
    passes = (order[order >= 100] - 100).reshape(10, 10)
    assert all(sorted(one) == list(range(10)) for one in passes.tolist())
    assert len({one.tobytes() for one in passes}) == 10


def test_an_unknown_strategy() -> None:
    with pytest.raises(InputError, match="'even' is none of proportional, balanced"):
        plan("even", [1, 2], 0)
