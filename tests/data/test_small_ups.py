"""The small files that the physics tests train on, as their reader sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_ups import CHANNELS, SAMPLES, write_ups

from data import ups


@pytest.mark.parametrize("task", ups.TASKS)
def test_every_task_is_read(task: str, tmp_path: Path) -> None:
    write_ups(tmp_path, task)
    for split, count in SAMPLES.items():
        fields = ups.read(tmp_path, task, split)
        steady, plane = task in ups.STEADY, task in ups.PLANE
        assert fields.shape == (count, 2 if steady else 9, CHANNELS.get(task, 1), 8 if plane else 1, 32)
        values = fields.read()
        assert np.isfinite(values).all() and (values.std((0, 1, 3, 4)) > 0).all()
        changes = np.abs(np.diff(values, axis=1)).max((1, 2, 3, 4))
        assert (changes > 0).all()  # none stands still


def test_the_same_again_and_other_values_in_each_split(tmp_path: Path) -> None:
    first, second = (write_ups(tmp_path / name, "burgers1d", samples={"train": 3, "val": 3}) for name in "ab")
    read = [ups.read(root, "burgers1d", split).read() for root in (first, second) for split in ("train", "val")]
    np.testing.assert_array_equal(read[0], read[2])
    assert not np.array_equal(read[0], read[1])
