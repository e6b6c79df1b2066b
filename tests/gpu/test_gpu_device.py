"""On one GPU: what stays on the device, what is left out there, and what does not fit."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import math

import pytest
import torch
from gpus import needs
from lightning.fabric import Fabric
from test_guard import Marked, plain_loop, settings
from torch import Tensor, nn
from toys import Regression, config

from fabric_trainer import fit
from fabric_trainer.clip import clip_gradients
from fabric_trainer.config import FaultsConfig
from fabric_trainer.faults import Guard
from fabric_trainer.state import State

pytestmark = [pytest.mark.gpu, needs(1), pytest.mark.timeout(600)]


@pytest.fixture
def fabric() -> Fabric:
    """One GPU."""
    made = Fabric(accelerator="cuda", devices=1)
    made.launch()
    return made


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = [value for values in optimizer.state.values() for value in values.values()]
    return {str(i): value.clone() for i, value in enumerate([*network.state_dict().values(), *state])}


# ---- a gradient that is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_kernel_leaves_out_a_bad_gradient(name, bad):
    """Weights, moments and step counters, bit for bit; the host hears of it afterwards."""
    network = nn.Linear(8, 4).cuda()
    keys = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(network.parameters(), lr=0.1, fused=True, **keys)
    guard = Guard(optimizer, network, FaultsConfig())
    assert guard.on_device
    for spoilt in (False, True, False):
        network(torch.ones(3, 8, device="cuda")).square().sum().backward()
        if spoilt:
            network.weight.grad[0, 0] = bad
        before = everything(network, optimizer)
        guard.step(clip_gradients(network.parameters()))
        assert guard.settle().applied is not spoilt
        after = everything(network, optimizer)
        unchanged = len(before) == len(after) and all(torch.equal(before[key], after[key]) for key in before)
        assert unchanged is spoilt
        optimizer.zero_grad()


def test_a_window_with_nan_is_left_out_of_everything(fabric):
    """The run is that of the good windows alone: weights, running statistics, averages and counters."""
    changes = settings()
    state = State(fabric, Marked("nan"), changes)
    assert state.guard.on_device
    fit(fabric, state.task, changes, state=state)
    assert (state.counters.window, state.counters.step, state.counters.skipped) == (8, 6, 2)
    weights, averages = plain_loop()  # on the CPU
    for name, value in state.module.state_dict().items():
        torch.testing.assert_close(value.cpu(), weights[name], rtol=0, atol=1e-5)
    for name, value in averages.items():
        torch.testing.assert_close(state.ema.state_dict()[name].cpu(), value, rtol=0, atol=1e-5)
    steps = {float(values["step"]) for values in state.engine.bare_optimizer.state.values()}
    assert steps == {6.0}


# ---- waiting --------------------------------------------------------------------------------------------------------


class Strict:
    """A callback: from one window to another, whatever makes the host wait for the device is an error."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.checked = first, last, 0

    def on_update_end(self, state: State, metrics: object) -> None:
        window = state.counters.window
        self.checked += self.first < window <= self.last
        if window in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("error" if window == self.first else "default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_updates_that_log_nothing_never_wait(precision):
    strict = Strict(3, 9)
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision, callbacks=[strict])
    fabric.launch()
    changes = config(**{"batch.accumulate": 2, "clip.norm": 0.5, "ema.decay": 0.9})
    changes.run.max_epochs, changes.run.max_steps, changes.run.log_every_n_steps = None, 12, 100
    changes.evaluate.every = changes.checkpoint.every = "100 steps"
    try:
        fit(fabric, Regression(200), changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.checked == 6


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_device():
    """A function that leaves this process so many bytes of the device."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(size: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    yield limit
    limit(total)


def test_a_micro_batch_that_does_not_fit_is_split(fabric, full_device):
    """In a forward of 2048 rows of 16384, some 128 MB each time; what it needs, less a quarter, has room for half."""
    changes = config(**{"batch.micro_batch_size": 2048, "optim.args": {"eps": 1e-6}})
    changes.run.max_epochs, changes.run.max_steps = None, 2
    # the validation split is small, and evaluated in small batches
    changes.evaluate.micro_batch_size = 16
    task = Regression(2048, width=16384)

    def weights() -> tuple[dict[str, Tensor], State]:
        state = fit(fabric, task, changes)
        return {name: value.cpu().clone() for name, value in state.module.state_dict().items()}, state

    torch.cuda.reset_peak_memory_stats()
    whole, state = weights()
    assert state.memory.halvings == 0
    peak = torch.cuda.max_memory_allocated()
    assert peak > 200e6
    del state
    full_device(0.75 * peak)
    split, state = weights()
    assert state.memory.rows <= 1024 and state.counters.step == 2
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=2e-5)


def test_peak_memory_is_logged(fabric, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    fit(fabric, Regression(), config(), tmp_path)
    header, *lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    peaks = [float(line[header.index("memory/peak")]) for line in lines if line[header.index("memory/peak")]]
    assert 0 < max(peaks) <= torch.cuda.max_memory_allocated()


def test_the_memory_in_use_is_logged_and_given_back(fabric, tmp_path, capsys):
    keys = {"run.log_memory": True, "run.log_every_n_steps": 2, "run.cleanup_every": "5 steps"}
    fit(fabric, Regression(), config(**keys), tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        assert 0 < row["memory/allocated"] <= row["memory/peak_since_log"] <= row["memory/peak"]
        assert row["memory/allocated"] <= row["memory/reserved"] and row["memory/host"] > 0
    peaks = [row["memory/peak"] for row in rows]
    assert peaks == sorted(peaks), "since the start, though the allocator has counted anew since"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clean-up")]
    assert len(lines) == 5 and all(" · reserved " in line for line in lines)


def test_a_trace_has_the_kernels(fabric, tmp_path):
    fit(fabric, Regression(), config(**{"profiler.name": "pytorch"}), tmp_path)
    with gzip.open(tmp_path / "trace-rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum(event["name"] == "forward" and event.get("cat") == "user_annotation" for event in events) == 3
    assert "Self CUDA" in (tmp_path / "profile-rank0.txt").read_text()
