"""NRMSE from sums by task, beside numpy's over all values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.physics.figures import nrmses

NAMES = ("error", "persistence", "operator")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**31))
def test_nrmse_is_of_exact_sums(counts: list[int], seed: int) -> None:
    """counts: samples of each task. Latents count alike; of fields, which have other sizes, tasks do."""
    random = np.random.default_rng(seed)
    tasks = [f"task{number}" for number in range(len(counts))]
    sums: dict[str, float] = {}
    values: dict[str, dict[str, np.ndarray]] = {}
    for task, count in zip(tasks, counts, strict=True):
        sums[f"{task}/weight"] = count
        for space, size in (("latent", 6), ("field", 4 + count)):
            own = {name: random.normal(size=(count, size)) for name in ("", *NAMES, *(["floor"] * (space == "field")))}
            values[f"{task}/{space}"] = own
            for name, value in own.items():
                sums[f"{task}/{space}{'_' * bool(name)}{name}"] = float((value**2).mean(1).sum())

    def nrmse(error: np.ndarray, truth: np.ndarray) -> float:
        return float(np.sqrt((error**2).mean()) / (np.sqrt((truth**2).mean()) + 1e-8))

    got = nrmses(sums, tasks, ("operator",))
    latent = {name: np.concatenate([values[f"{t}/latent"][name] for t in tasks]) for name in ("", *NAMES)}
    fields = [
        {name: nrmse(values[f"{t}/field"][name], values[f"{t}/field"][""]) for name in (*NAMES, "floor")} for t in tasks
    ]
    for name, suffix in (("error", ""), ("persistence", "_persistence"), ("operator", "_operator")):
        assert got[f"nrmse{suffix}"] == pytest.approx(nrmse(latent[name], latent[""]), rel=1e-9)
        assert got[f"nrmse_physical{suffix}"] == pytest.approx(np.mean([own[name] for own in fields]), rel=1e-9)
    assert got["nrmse_physical_floor"] == pytest.approx(np.mean([own["floor"] for own in fields]), rel=1e-9)
    assert got["nrmse_ratio"] == pytest.approx(got["nrmse"] / got["nrmse_persistence"], rel=1e-6)
    for task, own in zip(tasks, fields, strict=True) if len(tasks) > 1 else ():
        assert got[f"{task}/nrmse_physical"] == pytest.approx(own["error"], rel=1e-9)


def test_a_task_without_samples_is_not_a_number() -> None:
    sums = dict.fromkeys(("latent", "latent_error", "latent_persistence", "field", "field_error"), 0.0)
    sums |= {"field_persistence": 0.0, "field_floor": 0.0, "weight": 0.0}
    assert all(map(math.isnan, nrmses({f"a/{name}": value for name, value in sums.items()}, ["a"]).values()))
