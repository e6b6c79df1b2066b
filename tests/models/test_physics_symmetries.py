"""Symmetries of training samples: solutions stay solutions, each sample's draws are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from data import burgers, reaction_diffusion
from fabric_trainer.errors import InputError
from fabric_trainer.order import Rows
from fabric_trainer.random import SampleRandom
from fabric_trainer.window import MicroBatches
from models.physics.operator_stage import OperatorStage
from models.physics.symmetries import turned

SMALL: dict[str, Any] = {
    "tasks": ["burgers1d", "reaction_diffusion2d"],
    "made": {"burgers1d": {"nx": 32, "frames": 9}, "reaction_diffusion2d": {"nx": 8, "frames": 5}},
    "samples": {"train": 6, "val": 2},
    "rollout_horizon": 2,
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
}
SYMMETRIES = {"burgers1d": ["shift", "mirror"], "reaction_diffusion2d": ["flip", "transpose"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def made(root, **more: Any) -> OperatorStage:
    task = OperatorStage(**SMALL | more)
    task.prepare(root)
    return task


def batch_of(task: OperatorStage, rows: list[int], split: str = "train", epoch: int = 0) -> dict[str, Any]:
    micro_batches = MicroBatches(task, task.dataset(split), seed=0, training=split == "train")
    return micro_batches[Rows(epoch, np.array(rows), np.ones(len(rows), np.float32))]


def images(u: Tensor, name: str) -> list[Tensor]:
    """All that a symmetry may make of (C, H, W)."""
    height, width = u.shape[1:]
    return {
        "shift": [u.roll((y, x), (1, 2)) for y in range(height) for x in range(width)],
        "mirror": [u, -u.flip(2)],
        "negate": [u, -u],
        "flip": [u, u.flip(1), u.flip(2), u.flip(1, 2)],
        "transpose": [u, u.mT],
    }[name]


@pytest.mark.parametrize("name", ["shift", "mirror", "negate", "flip", "transpose"])
def test_all_images_come_up_and_states_turn_together(name):
    random = SampleRandom(1, 0, torch.arange(200))
    states = {"u0": torch.randn(200, 2, 4, 4), "u1": torch.randn(200, 2, 4, 4)}
    found = turned(states, random, [name])
    seen = []
    for row in range(200):
        matches = [
            {place for place, image in enumerate(images(states[key][row], name)) if torch.equal(image, found[key][row])}
            for key in states
        ]
        assert len(matches[0]) == 1 and matches[0] == matches[1]
        seen.append(matches[0].pop())
    assert set(seen) == set(range(len(images(states["u0"][0], name))))
    alone = turned({"u0": states["u0"][7:8]}, random[7:8], [name])
    assert torch.equal(alone["u0"][0], found["u0"][7])


def test_a_turned_solution_is_a_solution():
    """Of the turned start, the solver makes the turned trajectory."""
    random = SampleRandom(2, 0, torch.arange(6))
    u = burgers.generate(burgers.Burgers(nx=32, frames=9, samples=6))
    after = turned({"u": torch.from_numpy(u)[:, :, None]}, random, ["shift", "mirror"])["u"][:, :, 0].numpy()
    assert not (after == u).all((1, 2)).any()
    assert_allclose(burgers.solve(after[:, 0], 0.01 / np.pi, 9), after, atol=1e-5)

    made = reaction_diffusion.ReactionDiffusion(nx=8, frames=3, samples=6)
    fields = np.moveaxis(reaction_diffusion.generate(made), -1, 2)
    after = turned({"u": torch.from_numpy(fields)}, random, ["flip", "transpose"])["u"].numpy()
    for before, trajectory in zip(fields, after, strict=True):
        solved = reaction_diffusion.solve(trajectory[0].astype(np.float64), (made.Du, made.Dv), made.k, 3)
        assert_allclose(solved, trajectory, atol=1e-5)
        assert before.shape == trajectory.shape


def test_a_batch_of_two_tasks(root):
    """Each task's rows turn by its own symmetries, in every frame, and by the sample's own draws."""
    plain, task = made(root), made(root, symmetries=SYMMETRIES)
    first = plain.dataset("train").sizes[0]
    rows = [0, first, 3, first + 2, 5]
    before, after = batch_of(plain, rows), batch_of(task, rows)
    for row, index in enumerate(rows):
        line = index < first
        grid, names = task.grids[not line], task.symmetries[not line]
        size = grid.channels * grid.points

        def all_images(u: Tensor, grid: Any = grid, names: list[str] = names, size: int = size) -> list[Tensor]:
            found = [u[:size].view(grid.channels, grid.height, grid.width)]
            for name in names:
                found = [image for each in found for image in images(each, name)]
            return found

        hits = [
            {
                k
                for k, image in enumerate(all_images(before[key][row]))
                if torch.equal(image.flatten(), after[key][row][:size])
            }
            for key in ("u0", "u1", "u_future")
        ]
        assert hits[0] & hits[1] & hits[2] and not after["u0"][row][size:].any()
        alone = batch_of(task, [index])
        assert torch.equal(alone["u0"][0], after["u0"][row])
    assert not torch.equal(before["u0"], after["u0"])
    assert not torch.equal(batch_of(task, rows, epoch=1)["u0"], after["u0"])
    assert "z0" in before and "z0" not in after  # what is turned is encoded in the network
    assert "z0" not in batch_of(task, [0], "val")


def test_encoded_in_the_network_is_what_the_cache_holds(root):
    plain, task = made(root), made(root, symmetries={"burgers1d": []})
    network = plain.network()
    batch = batch_of(plain, [0, 9, plain.dataset("train").sizes[0] + 1])
    bare = {key: value for key, value in batch.items() if key[0] != "z"}
    for key in ("z0", "z1", "z_future"):
        encoded = network.latents(bare, key)
        assert not encoded.requires_grad
        torch.testing.assert_close(encoded, batch[key], rtol=1e-5, atol=1e-6)
    assert "z0" in batch_of(task, [0])


@pytest.mark.parametrize(
    ("symmetries", "said"),
    [
        ({"burgers1d": ["turn"]}, "task.args.symmetries.burgers1d: turn is none of shift, mirror"),
        ({"burgers1d": "shift"}, "task.args.symmetries.burgers1d: must be a list of shift, mirror"),
        ({"heat": ["shift"]}, "task.args.symmetries: heat is none of tasks, burgers1d"),
        ({"reaction_diffusion2d": ["mirror"]}, "mirror is a line's, and the grid is 8 x 8"),
        ({"burgers1d": ["transpose"]}, "transpose is a square's, and the grid is 1 x 32"),
    ],
)
def test_wrong_symmetries_are_one_line(root, symmetries, said):
    with pytest.raises(InputError) as caught:
        made(root, symmetries=symmetries)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_darcys_two_frames_never_change_sign():
    with pytest.raises(InputError, match=r"symmetries.darcy2d: what is given and its solution"):
        OperatorStage(tasks=["darcy2d"], made={"darcy2d": {"nx": 8}}, symmetries={"darcy2d": ["negate"]})
