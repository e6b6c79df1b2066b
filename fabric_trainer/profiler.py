"""Where the time of a run goes: by section of the loop, by function, or operator by operator.

The loop and what it calls name their sections, ``with state.profiler("clip"): …``. Without a profiler a section is one
and the same empty context. A run that is resumed at step 1200 writes files of its own, ``profile-from-1200.txt``.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.table import Table

from fabric_trainer.config import ProfilerConfig
from fabric_trainer.errors import InputError
from fabric_trainer.files import hidden, write_atomically

if TYPE_CHECKING:
    from fabric_trainer.state import State

OTHER = "other"  # what no section has
ROWS = 30  # of a printed table of functions or operators
WIDTH = 120
NOTHING = nullcontext()


class Profiler(AbstractContextManager["Profiler"]):
    """None. Entered around the loop; its kinds say what they make of the sections and updates in between."""

    def __call__(self, section: str) -> AbstractContextManager[None]:
        """The context of a section; one may lie in another."""
        return NOTHING

    def next_update(self) -> None:
        """An update begins; no rank has sent anything that another has not answered."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what was found, whatever ended the loop. After an error (kind) no rank waits for another."""


@contextmanager
def profiling(state: State, folder: Path | None) -> Iterator[Profiler]:
    """``state.profiler`` as configured, inside. folder: the run's, or None to write no file and print instead.

    Raises InputError for arguments that torch's profiler doesn't take.
    """
    config, start = state.config.profiler, state.counters.step
    files = Files(state.fabric, folder, f"-from-{start}" if start else "")
    kinds = {"simple": Simple, "advanced": Advanced, "pytorch": Pytorch}
    state.profiler = kinds[config.name](config, files) if config.name in kinds else Profiler()
    try:
        with state.profiler:
            yield state.profiler
    finally:
        state.profiler = Profiler()


class Files:
    """Where the profiles of this part of the run go."""

    def __init__(self, fabric: Fabric, folder: Path | None, part: str) -> None:
        self.fabric, self.folder, self.part, self.rank = fabric, folder, part, fabric.global_rank

    def path(self, name: str) -> Path | None:
        """For ``profile.txt``, say, ``profile-from-1200.txt`` in the run's folder."""
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        stem, dot, kind = name.partition(".")
        return self.folder / f"{stem}{self.part}{dot}{kind}"

    def publish(self, name: str, text: str) -> None:
        """Write it, or without a folder print it on rank 0."""
        path = self.path(name)
        if path is not None:
            write_atomically(path, text)
        if self.rank == 0:
            print(f"profile {path}" if path else text, flush=True)


# ---- simple -------------------------------------------------------------------------------------------------------


class Simple(Profiler):
    """Wall-clock time of the process by section, over all ranks.

    One clock always runs, for the innermost section: so their times add up to that of the whole loop, and a section's
    is without those inside it. A GPU works on while the host goes ahead: what it still does at the end of a section is
    waited for in a later one.
    """

    def __init__(self, config: ProfilerConfig, files: Files) -> None:
        self.files = files
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __enter__(self) -> Simple:
        self._section, self._since = OTHER, time.perf_counter()
        return self

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        outer = self._turn_to(section)
        try:
            yield
        finally:
            self.calls[section] += 1
            self._turn_to(outer)

    def _turn_to(self, section: str) -> str:
        """Let the clock run for another section; returns for which it ran."""
        now = time.perf_counter()
        self.seconds[self._section] += now - self._since
        before, self._section, self._since = self._section, section, now
        return before

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._turn_to(OTHER)
        fabric, name = self.files.fabric, "profile"
        found = {"rank": fabric.global_rank, "seconds": dict(self.seconds), "calls": dict(self.calls)}
        ranks: list[Any] = [found]
        if kind is None and fabric.world_size > 1:
            ranks = [None] * fabric.world_size
            torch.distributed.all_gather_object(ranks, found)
        if kind is None and not fabric.is_global_zero:
            return
        if not fabric.is_global_zero:  # it has nobody to tell but its own file
            name = f"profile-rank{fabric.global_rank}"
        if (path := self.files.path(f"{name}.json")) is not None:
            write_atomically(path, json.dumps({"ranks": ranks}, indent=1))
        text = _as_text(section_table(ranks))
        if self.files.folder is not None:
            print(text, flush=True)
        self.files.publish(f"{name}.txt", text)


def section_table(ranks: list[dict[str, Any]]) -> Table:
    """The sections by their share of the time. ranks: {"rank", "seconds": {section: s}, "calls": {section: count}} of
    each. Calls are the first rank's; times are means over ranks, beside the fastest and the slowest."""
    names = list(dict.fromkeys(name for rank in ranks for name in rank["seconds"]))
    times = {name: [rank["seconds"].get(name, 0.0) for rank in ranks] for name in names}
    means = {name: sum(own) / len(ranks) for name, own in times.items()}
    whole = sum(means.values())
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("section", no_wrap=True)
    for heading in ("calls", "ms a call", "seconds", "share", *(("min", "max", "by rank") if len(ranks) > 1 else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in sorted(names, key=means.__getitem__, reverse=True):
        calls, own = ranks[0]["calls"].get(name, 0), times[name]
        cells = [f"{calls:,}", f"{1e3 * own[0] / calls:.3f}"] if calls else ["", ""]
        cells += [f"{means[name]:.3f}", f"{means[name] / whole:.1%}"]
        if len(ranks) > 1:
            cells += [f"{min(own):.3f}", f"{max(own):.3f}", str(ranks[own.index(max(own))]["rank"])]
        table.add_row(name, *cells)
    table.add_row("the whole loop", "", "", f"{whole:.3f}", style="bold")
    return table


def _as_text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"  # type: ignore[attr-defined]


# ---- advanced -----------------------------------------------------------------------------------------------------


class Advanced(Profiler):
    """cProfile of the loop's own thread, on every rank: a table by cumulative time, and the statistics themselves
    (profile-rank0.pstats) for ``python -m pstats`` and its viewers. Every call in Python gets slower by it."""

    def __init__(self, config: ProfilerConfig, files: Files) -> None:
        self.files, self.profile = files, cProfile.Profile()

    def __enter__(self) -> Advanced:
        self.profile.enable()
        return self

    def __exit__(self, *_: object) -> None:
        self.profile.disable()
        name, text = f"profile-rank{self.files.rank}", io.StringIO()
        statistics = pstats.Stats(self.profile, stream=text).sort_stats("cumulative")
        statistics.print_stats(ROWS)
        if (path := self.files.path(f"{name}.pstats")) is not None:
            statistics.dump_stats(path)
        self.files.publish(f"{name}.txt", text.getvalue())


# ---- pytorch ------------------------------------------------------------------------------------------------------


class Pytorch(Profiler):
    """torch.profiler over a few updates, on every rank: a trace for Perfetto or chrome://tracing, in which the sections
    are marked, and a table of the operators."""

    def __init__(self, config: ProfilerConfig, files: Files) -> None:
        self.config, self.files, self.update, self.recorded = config, files, -1, False
        self.cuda = files.fabric.device.type == "cuda"
        kinds = torch.profiler.ProfilerActivity
        window = torch.profiler.schedule(wait=config.wait, warmup=config.warmup, active=config.updates, repeat=1)
        try:
            self.profile = torch.profiler.profile(
                activities=[kinds.CPU, kinds.CUDA] if self.cuda else [kinds.CPU],
                schedule=window,
                on_trace_ready=self.write,
                **config.args,
            )
        except TypeError as error:
            raise InputError(f"profiler.args: {error}") from None

    def __call__(self, section: str) -> AbstractContextManager[None]:
        return torch.profiler.record_function(section) if self.active else NOTHING  # type: ignore[no-untyped-call]

    @property
    def last(self) -> int:
        """The first update that is no longer recorded."""
        return self.config.wait + self.config.warmup + self.config.updates

    @property
    def active(self) -> bool:
        return self.config.wait <= self.update < self.last

    def next_update(self) -> None:
        self.update += 1
        if self.update == 0:
            self.profile.start()
        elif self.update < self.last:
            self.profile.step()
        elif self.update == self.last:
            self.profile.stop()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if 0 <= self.update < self.last:
            self.profile.stop()
        if not self.recorded and self.files.rank == 0:
            first = self.config.wait + self.config.warmup + 1
            print(f"no trace: it begins at update {first}, the run ended with {self.update + 1}", flush=True)

    def write(self, profile: Any) -> None:
        """The trace and the table."""
        self.recorded, name = True, f"-rank{self.files.rank}"
        if (path := self.files.path(f"trace{name}.json.gz")) is not None:
            unfinished = hidden(path).with_suffix(".gz")  # by which torch knows what to write
            profile.export_chrome_trace(str(unfinished))
            os.replace(unfinished, path)
        by = f"self_{'device' if self.cuda else 'cpu'}_time_total"
        self.files.publish(f"profile{name}.txt", profile.key_averages().table(sort_by=by, row_limit=ROWS))
