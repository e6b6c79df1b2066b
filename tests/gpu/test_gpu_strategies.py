"""On one, two and four GPUs: every strategy in every precision that it takes, against one GPU in float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import STRATEGIES, Launches, configured, needs, takes
from launches import results
from test_every_strategy import assert_same_log, assert_same_state, checkpoint_of, logged

from fabric_trainer.checkpoint import load

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
# float32: largest difference of any weight, average or moment. Else: relative difference of the logged losses, and mean
# difference of the weights, which ten updates of AdamW at a rate of at most 0.01 move by up to 0.1
EXACT = 2e-5
ROUGH = {"16-mixed": (0.02, 2e-3), "bf16-mixed": (0.05, 5e-3), "bf16-true": (0.1, 1e-2)}
DEEPSPEED = ("deepspeed1", "deepspeed2", "deepspeed3")
# a scale that overflows nowhere (torch's name for it, and DeepSpeed's): else the first windows would be left out
SCALE = {
    "scale": 256.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
    "cur_scale": 256.0,
}


def cases(*precisions: str) -> list[Any]:
    """(GPUs, strategy, precision), each skipped where the machine has fewer; four GPUs in float32 alone."""
    return [
        pytest.param(count, strategy, precision, marks=needs(count), id=f"{count}-{strategy}-{precision}")
        for count in (1, 2, 4)
        for strategy in STRATEGIES
        for precision in precisions
        if takes(strategy, precision) and (strategy != "single" or count == 1) and (count < 4 or precision == "32-true")
    ]


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("gpus"))


@pytest.fixture(autouse=True)
def deepspeed(request: pytest.FixtureRequest) -> None:
    if "deepspeed" in request.node.name:
        pytest.importorskip("deepspeed", reason="needs the package deepspeed: make install-deepspeed")


def assert_close(one: Path, here: Path, precision: str, run: str = "run", since: int = 0) -> None:
    """The losses of the updates after ``since``, and the last weights and averages."""
    relative, mean = ROUGH[precision]
    rows = [[row for row in logged(folder, of) if row["step"] > since] for folder, of in ((one, "run"), (here, run))]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=relative)
    whole, other = checkpoint_of(one), checkpoint_of(here, run=run)
    for tree in ("model", "ema"):
        differences = [(whole[tree][name].double() - other[tree][name].double()).abs() for name in whole[tree]]
        assert torch.cat([difference.flatten() for difference in differences]).mean() < mean


@pytest.mark.parametrize("count, strategy, precision", cases("32-true"))
def test_ten_updates_are_those_of_one_gpu(gpus: Launches, count, strategy, precision):
    one, here = gpus.trained(1, "single", "32-true"), gpus.trained(count, strategy, precision)
    assert checkpoint_of(here)["counters"]["step"] == 10
    assert_same_state(checkpoint_of(one), checkpoint_of(here), EXACT)
    assert_same_log(logged(one), logged(here), 10 * EXACT)


@pytest.mark.parametrize("count, strategy, precision", cases("bf16-mixed", "bf16-true"))
def test_ten_updates_in_bfloat16_are_close(gpus: Launches, count, strategy, precision):
    one, here = gpus.trained(1, "single", "32-true"), gpus.trained(count, strategy, precision)
    assert checkpoint_of(here)["counters"]["step"] == 10
    assert_close(one, here, precision)


@pytest.mark.parametrize("count, strategy, precision", cases("16-mixed"))
def test_five_updates_in_float16_are_close(gpus: Launches, count, strategy, precision):
    """From what one GPU saved after five in float32, with a scale that is known to fit."""
    one = gpus.trained(1, "single", "32-true")
    scaled = gpus.folder / "scaled.pt"
    saved = load(one / "run/checkpoints/step-00000005.pt")
    saved["states"]["scaler"] = SCALE
    torch.save(saved, scaled)
    name = f"{count} x {strategy} {precision}, from float32"
    here = gpus.launch(name, configured(count, strategy, precision), {"resume": {"sources": {"one": str(scaled)}}})
    last = checkpoint_of(here, run="from one")
    assert (last["counters"]["step"], last["counters"]["skipped"]) == (10, 0)
    assert_close(one, here, precision, "from one", since=5)


@pytest.mark.parametrize("count, strategy, precision", cases("16-mixed"))
def test_a_scale_that_overflows_is_lowered_by_all_ranks_alike(gpus: Launches, count, strategy, precision):
    """Torch starts at 65536: the updates that overflow are left out, and ten are made all the same."""
    here = gpus.trained(count, strategy, precision)
    last = checkpoint_of(here)
    assert last["counters"]["step"] == 10
    assert all(value.isfinite().all() for tree in ("model", "ema") for value in last[tree].values())
    losses = [row["train/loss"] for row in logged(here)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("count, strategy, precision", cases("32-true", "16-mixed", "bf16-mixed", "bf16-true"))
def test_one_gpu_continues_what_it_saved(gpus: Launches, count, strategy, precision):
    """The state is the same at that moment. Weights are float32 in the file, but those of bf16-true; DeepSpeed has
    float32 ones there too."""
    path = gpus.trained(count, strategy, precision) / "run/checkpoints/step-00000005.pt"
    reader = "bf16-true" if precision == "bf16-true" and strategy not in DEEPSPEED else "32-true"
    name = f"single {reader} after {count} x {strategy} {precision}"
    here = gpus.launch(name, configured(1, "single", reader), {"resume": {"sources": {"it": str(path)}}})
    (rank,) = results(gpus.folder, name, "resume")
    assert_same_state(load(path), rank["it"]["taken"], 0.0)
    last = checkpoint_of(here, run="from it")
    assert last["counters"]["step"] == 10
    if precision == "32-true":
        assert_same_state(checkpoint_of(gpus.trained(1, "single", "32-true")), last, EXACT)


@pytest.mark.parametrize("count, strategy, precision", cases("32-true", "bf16-mixed"))
def test_activation_checkpointing_changes_nothing(gpus: Launches, count, strategy, precision):
    """With dropout on. Kernels are the same, but their sums over ranks need not be in one order on GPUs."""
    here = gpus.trained(count, strategy, precision)
    for rank in results(gpus.folder, here.name, "recompute"):
        for name, value in rank[0].items():
            torch.testing.assert_close(value, rank[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count, strategy, precision", cases("32-true"))
def test_peak_memory_is_the_devices(gpus: Launches, count, strategy, precision):
    """Of the allocator: a process with torch has more than that. DeepSpeed's buckets alone have gigabytes."""
    lines = (gpus.trained(count, strategy, precision) / "run/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("memory/peak")
    peaks = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert peaks and min(peaks) > 0
    assert strategy in DEEPSPEED or max(peaks) < 300e6
