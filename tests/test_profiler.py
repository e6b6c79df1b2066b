"""Profiles of runs whose times are known, and of one rank that is slower than the other."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import mmap
import pstats
import re
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Points, Regression, config

from fabric_trainer import Batch, Loss, fit, memory, profiler
from fabric_trainer.boundary import Boundary
from fabric_trainer.checks import check
from fabric_trainer.errors import InputError
from fabric_trainer.profiler import Profiler, section_table
from fabric_trainer.state import State

SAMPLE, LOSS, METRIC = 0.002, 0.01, 0.02  # seconds that a sample, a loss and an evaluation batch take


class SlowPoints(Points):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(SAMPLE)
        return super().__getitem__(index)


class Slow(Regression):
    """Three epochs' worth of nothing but sleep; ``calls`` are the times of its losses."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.calls: list[float] = []

    def dataset(self, split: str) -> Points | None:
        return {"train": SlowPoints(self.samples, 0), "val": Points(4, 1)}.get(split)

    def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
        self.calls.append(time.perf_counter())
        time.sleep(LOSS if network.training else METRIC)
        return super().loss(network, batch)


def profiled(fabric: Any, folder: Path | None, task: Any = None, **changes: Any) -> State:
    """10 updates of 2 micro-batches of 4 samples, with an average, evaluated and saved after 5 and 10."""
    keys = {"batch.accumulate": 2, "ema.decay": 0.9, "run.log_every_n_steps": 2, **changes}
    return fit(fabric, task or Slow(40), config(**keys), folder)


def sections(path: Path) -> dict[str, tuple[float, int]]:
    """Of one rank: section -> (seconds, calls)."""
    (rank,) = json.loads(path.read_text())["ranks"]
    return {name: (seconds, rank["calls"].get(name, 0)) for name, seconds in rank["seconds"].items()}


# ---- simple ---------------------------------------------------------------------------------------------------------


def test_sections_have_the_times_that_were_slept_and_add_up(fabric, tmp_path, capsys):
    began, task = time.perf_counter(), Slow(40)
    profiled(fabric, tmp_path, task, **{"profiler.name": "simple"})
    took = time.perf_counter() - began
    found = sections(tmp_path / "profile.json")
    slept = {"data": 80 * SAMPLE, "forward": 20 * LOSS, "evaluate": 4 * METRIC}  # twice raw, twice averaged
    for name, seconds in slept.items():
        assert seconds <= found[name][0] < seconds + 0.5 * took, name
    whole = sum(seconds for seconds, _ in found.values())
    assert sum(slept.values()) < whole <= took
    assert whole > 0.9 * (task.calls[-1] - task.calls[0]), "between the first loss and the last it is all the loop's"
    text = (tmp_path / "profile.txt").read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"^forward +20 +\d+\.\d{3} +\d+\.\d{3} +\d+\.\d%$", text, flags=re.MULTILINE)
    assert re.search(rf"^the whole loop +{whole:.3f}$", text, flags=re.MULTILINE)


def test_every_section_counts_its_calls(fabric, tmp_path):
    profiled(fabric, tmp_path, Regression(40), **{"profiler.name": "simple", "run.cleanup_every": "3 steps"})
    calls = {name: count for name, (_, count) in sections(tmp_path / "profile.json").items()}
    assert calls == {
        "data": 11,  # ten windows, and a look at the end
        "agree": 10,
        "gradients": 10,
        "forward": 20,
        "backward": 20,
        "clip": 10,
        "settle": 10 + 8,  # before each step, and before what is due: log at 2, 4, …; clean-up at 3, 6, 9; the ends
        "step": 10,
        "ema": 10,
        "log": 8,
        "evaluate": 2,
        "save": 2,
        "clean up": 3,
        "wait for disk": 1,
        "other": 0,
    }


def test_a_section_inside_another_is_charged_once(monkeypatch, fabric):
    """By a clock of whole seconds: 1 in the outer, 2 in the inner, 4 in the outer again, 8 in none."""
    now = iter([0, 0, 1, 3, 7, 15])
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: next(now))
    made = profiler.Simple(config().profiler, profiler.Files(fabric, None, ""))
    with made as simple, simple("outer"), simple("inner"):
        pass
    assert dict(simple.seconds) == {"other": 8, "outer": 5, "inner": 2}
    assert dict(simple.calls) == {"outer": 1, "inner": 1}


def test_the_table_of_several_ranks_names_the_slowest():
    ranks = [
        {"rank": 0, "seconds": {"data": 1.0, "backward": 5.0}, "calls": {"data": 4, "backward": 2}},
        {"rank": 1, "seconds": {"data": 3.0, "backward": 3.0}, "calls": {"data": 4, "backward": 2}},
        {"rank": 2, "seconds": {"data": 2.0, "backward": 4.0}, "calls": {"data": 4, "backward": 2}},
    ]
    lines = [line.split() for line in profiler._as_text(section_table(ranks)).splitlines()]
    assert lines[0] == ["section", "calls", "ms", "a", "call", "seconds", "share", "min", "max", "by", "rank"]
    assert lines[1] == ["backward", "2", "2500.000", "4.000", "66.7%", "3.000", "5.000", "0"]
    assert lines[2] == ["data", "4", "250.000", "2.000", "33.3%", "1.000", "3.000", "1"]
    assert lines[3] == ["the", "whole", "loop", "6.000"]


def test_an_exception_leaves_the_profile(fabric, tmp_path):
    class Breaks(Regression):
        calls = 0

        def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
            Breaks.calls += 1
            if Breaks.calls == 7:
                raise ZeroDivisionError("mine")
            return super().loss(network, batch)

    for name, file in (("simple", "profile.txt"), ("advanced", "profile-rank0.txt"), ("pytorch", "profile-rank0.txt")):
        Breaks.calls = 0
        with pytest.raises(ZeroDivisionError, match="mine"):
            keys = {"profiler.name": name, "profiler.wait": 0, "profiler.warmup": 1}
            profiled(fabric, tmp_path / name, Breaks(40), **keys)
        assert "forward" in (tmp_path / name / file).read_text() or name == "advanced"
    assert sections(tmp_path / "simple/profile.json")["forward"][1] == 7
    assert "_trace" not in "".join(path.name for path in tmp_path.rglob("*.tmp*")), "nothing half-written"


def test_a_resume_writes_files_of_its_own(fabric, tmp_path):
    from fabric_trainer.checkpoint import load

    keys = {"profiler.name": "simple", "run.max_steps": 5}
    profiled(fabric, tmp_path, Regression(40), **keys)
    before = (tmp_path / "profile.txt").read_text()
    made = config(**{"batch.accumulate": 2, "ema.decay": 0.9, "profiler.name": "simple"})
    fit(fabric, Regression(40), made, tmp_path, load(tmp_path / "checkpoints/last.pt"))
    assert (tmp_path / "profile.txt").read_text() == before
    assert sections(tmp_path / "profile-from-5.json")["step"][1] == 5


def test_nothing_is_written_without_a_folder(fabric, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, says in (("simple", "the whole loop"), ("advanced", "cumulative"), ("pytorch", "Self CPU")):
        profiled(fabric, None, Regression(40), **{"profiler.name": name})
        assert says in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---- none -----------------------------------------------------------------------------------------------------------


def test_without_a_profiler_every_section_is_the_same_object_and_costs_little():
    none = Profiler()
    assert none("forward") is none("backward")
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        with none("forward"):
            pass
    assert len(gc.get_objects()) <= before + 1
    rounds, best = 2000, float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(rounds):
            with none("forward"):
                pass
        best = min(best, (time.perf_counter() - began) / rounds)
    assert best < 1e-6


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_a_profiler_changes_no_bit_and_leaves_with_the_loop(fabric, tmp_path, name):
    keys = {"run.log_memory": True, "run.cleanup_every": "3 steps"}
    a = profiled(fabric, tmp_path, Regression(40, dropout=0.3), **keys, **{"profiler.name": name})
    b = profiled(fabric, None, Regression(40, dropout=0.3))
    for key, value in a.module.state_dict().items():
        assert torch.equal(value, b.module.state_dict()[key])
    assert type(a.profiler) is Profiler


# ---- advanced, pytorch ----------------------------------------------------------------------------------------------


def test_advanced_lists_functions_with_their_calls(fabric, tmp_path, capsys):
    profiled(fabric, tmp_path, **{"profiler.name": "advanced"})
    assert "profile-rank0.txt" in capsys.readouterr().out
    text = (tmp_path / "profile-rank0.txt").read_text()
    assert "Ordered by: cumulative time" in text and re.search(r" 10 .*\(compute_gradients\)", text)
    calls: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for (_, _, function), (_, count, own, _, _) in pstats.Stats(str(tmp_path / "profile-rank0.pstats")).stats.items():
        calls[function] += count
        times[function] += own
    assert calls["compute_gradients"] == 10 and calls["<built-in method time.sleep>"] == 80 + 20 + 4
    assert times["<built-in method time.sleep>"] >= 80 * SAMPLE + 20 * LOSS + 4 * METRIC


def trace(path: Path) -> Counter[str]:
    """How often which name is in a trace."""
    with gzip.open(path, "rt") as file:
        return Counter(event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X")


def test_pytorch_traces_the_updates_it_was_asked_for(fabric, tmp_path):
    keys = {"profiler.name": "pytorch", "profiler.wait": 2, "profiler.warmup": 1, "profiler.updates": 4}
    profiled(fabric, tmp_path, Regression(40), **keys, **{"profiler.args": {"record_shapes": True}})
    found = trace(tmp_path / "trace-rank0.json.gz")
    assert [name for name in sorted(found) if name.startswith("ProfilerStep")] == [
        f"ProfilerStep#{i}" for i in range(3, 7)
    ]
    for section, calls in {"gradients": 4, "forward": 8, "backward": 8, "data": 4, "step": 4, "evaluate": 1}.items():
        assert found[section] == calls, section
    text = (tmp_path / "profile-rank0.txt").read_text()
    assert "Self CPU" in text and "aten::addmm" in text
    with gzip.open(tmp_path / "trace-rank0.json.gz", "rt") as file:
        assert '"Input Dims"' in file.read(), "an argument of torch's own"
    assert {path.name for path in tmp_path.glob("*rank0*")} == {"trace-rank0.json.gz", "profile-rank0.txt"}


@pytest.mark.parametrize("updates, recorded", [(2, 0), (5, 2)])
def test_a_run_that_ends_within_the_window_leaves_what_there_is(fabric, tmp_path, capsys, updates, recorded):
    keys = {"profiler.name": "pytorch", "profiler.wait": 2, "profiler.warmup": 1, "profiler.updates": 4}
    profiled(fabric, tmp_path, Regression(40), **keys, **{"run.max_steps": updates})
    path = tmp_path / "trace-rank0.json.gz"
    if recorded:
        assert trace(path)["gradients"] == recorded
    else:
        assert "no trace: it begins at update 4, the run ended with 2" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize(
    "args, says", [({"schedule": 1}, "leave schedule out"), ({"record_shape": True}, "profiler.args: .*record_shape")]
)
def test_arguments_that_torch_does_not_take(fabric, tmp_path, args, says):
    with pytest.raises(InputError, match=says):
        profiled(fabric, tmp_path, Regression(40), **{"profiler.name": "pytorch", "profiler.args": args})


# ---- memory ---------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_memory_is_logged_where_asked_at_log_points(fabric, tmp_path):
    class Grows(Regression):
        kept: list[mmap.mmap] = []

        def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
            if network.training:
                pages = mmap.mmap(-1, 4_000_000)  # that the system has to give: malloc may have some left
                pages.write(b"1" * 4_000_000)
                self.kept.append(pages)
            return super().loss(network, batch)

    profiled(fabric, tmp_path / "a", Grows(40), **{"run.log_memory": True})
    host = [row["memory/host"] for row in rows(tmp_path / "a")]
    assert host[0] == host[1] and host[2] == host[3], "a reading for each log point"
    assert host[6] - host[0] >= 0.9 * 12 * 4e6, "six updates later twelve more"
    Grows.kept.clear()
    profiled(fabric, tmp_path / "b", Regression(40))
    assert "memory/host" not in rows(tmp_path / "b")[0]
    for row in rows(tmp_path / "a") + rows(tmp_path / "b"):
        assert row["memory/peak"] >= host[0] - 1e7, "the kernel counts a little late"


def test_a_gpu_s_peaks_since_the_start_and_since_the_last_reading(monkeypatch):
    """With an allocator of our own: the one that torch keeps forgets when it is reset."""
    peak = 0

    def use(most: int) -> None:
        nonlocal peak
        peak = max(peak, most)

    def reset(device: torch.device) -> None:
        nonlocal peak
        peak = 3

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4)
    gauge = memory.Gauge(torch.device("cuda", 0))
    use(10)
    found = gauge.read()
    assert found.pop("host") > 0 and found == {"allocated": 3, "reserved": 4, "peak_since_log": 10}
    use(7)
    assert gauge.peak() == 10 and gauge.read()["peak_since_log"] == 7
    assert gauge.read()["peak_since_log"] == 3 and gauge.peak() == 10
    use(12)
    assert gauge.peak() == 12


@pytest.mark.parametrize(
    "every, at", [("4 steps", [4, 8]), ("1 epochs", [5, 10]), ("0.5 epochs", [3, 5, 8, 10]), (None, [])]
)
def test_clean_ups_come_when_they_are_due(fabric, tmp_path, monkeypatch, capsys, every, at):
    came, released = [], []
    clean_up = Boundary.clean_up

    def noted(self: Boundary) -> None:
        came.append(self.state.counters.step)
        clean_up(self)

    monkeypatch.setattr(Boundary, "clean_up", noted)
    monkeypatch.setattr(memory.Memory, "release", lambda self: released.append(1))
    profiled(fabric, tmp_path, Regression(40), **{"run.cleanup_every": every})
    assert came == at and len(released) == len(at)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clean-up")]
    assert [int(line.split()[3]) for line in lines] == at and all(" · host " in line for line in lines)


def test_a_clean_up_finds_what_the_collector_was_kept_from(fabric, tmp_path):
    """A cycle made in the loop goes at the clean-up; automatic collection is off."""

    class Node:
        pass

    class Cycles(Regression):
        def __init__(self, samples: int) -> None:
            super().__init__(samples)
            self.alive: list[int] = []
            self.nodes: list[weakref.ref] = []

        def loss(self, network: torch.nn.Module, batch: Batch) -> Loss:
            if network.training:
                self.alive.append(sum(node() is not None for node in self.nodes))
                node = Node()
                node.itself = node
                self.nodes.append(weakref.ref(node))
            return super().loss(network, batch)

    task = Cycles(40)
    gc.disable()
    try:
        profiled(fabric, None, task, **{"run.cleanup_every": "4 steps"})
    finally:
        gc.enable()
    assert task.alive == [*range(8), *range(8), *range(4)]


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("run.cleanup_every", "often", "run.cleanup_every must read like"),
        ("profiler.wait", -1, "profiler.wait must be at least 0"),
        ("profiler.warmup", -1, "profiler.warmup must be at least 0"),
        ("profiler.updates", 0, "profiler.updates must be at least 1"),
    ],
)
def test_values_that_no_run_can_have(key, value, says):
    with pytest.raises(InputError, match=says):
        check(config(**{key: value}))
