"""Per-update values: kept on the device, fetched together at log points, summed over ranks, written by rank 0."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fabric_trainer.errors import FAILED
from fabric_trainer.loggers import Loggers
from fabric_trainer.memory import Gauge
from fabric_trainer.progress import Progress
from fabric_trainer.state import State
from fabric_trainer.task import Loss
from fabric_trainer.window import Window

NO_NORM = torch.zeros(())


@dataclass(slots=True)
class Update:
    """What an update leaves to be logged. Tensors stay where they are."""

    window: Window
    weight: float  # of the whole window, over all ranks
    names: tuple[str, ...] = ()
    sums: list[Tensor] = field(default_factory=list)  # this rank's, len(names) per micro-batch
    norm: Tensor = NO_NORM
    part_norms: dict[str, Tensor] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    complete: bool = False  # every micro-batch has had its backward
    step: int = 0  # set once it is known to be applied
    samples: int = 0

    def add(self, loss: Loss) -> None:
        self.names = ("loss", *loss.logs)
        self.sums.append(loss.total.detach())
        self.sums.extend(value.detach() for value in loss.logs.values())


class Record(AbstractContextManager["Record"]):
    """Collects updates; ``flush`` fetches and writes them. Every rank has one, rank 0's writes.

    folder: the run's, or None to write no file.
    """

    def __init__(self, state: State, folder: Path | None) -> None:
        self.state, self.folder = state, folder
        self.fabric = state.fabric
        self.updates: list[Update] = []
        self.gauge = Gauge(self.fabric.device)
        self._since, self._samples = time.perf_counter(), state.counters.samples
        self.loggers, self.progress = Loggers(), None
        if self.fabric.is_global_zero:
            self.progress = Progress(state.steps, state.counters.step)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.loggers = Loggers.build(folder, state.config, folder.name, state.layers)
                # also at step 0: the run may have been killed before its first checkpoint
                self.loggers.cut_back(state.counters.step)
                state.history.write(folder)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.loggers.close(FAILED if kind else self.state.stopped)
        if self.progress is not None:
            self.progress.close()

    def print(self, line: str) -> None:
        """A line on rank 0's terminal, above the progress bar."""
        if self.progress is not None:
            self.progress.print(line)

    def tell(self, line: str) -> None:
        """A line from whichever rank has something to say."""
        if self.progress is not None:
            self.progress.print(line)
        else:
            print(f"rank {self.fabric.global_rank}: {line}", flush=True)

    def add(self, update: Update) -> None:
        self.updates.append(update)

    def flush(self, show: bool) -> None:
        """Fetch what was added since the last flush (one synchronisation), sum it over ranks (one collective), add
        it to the epoch's sums and hand it to the loggers; ``show`` it on the terminal too."""
        updates, self.updates = self.updates, []
        if not updates:
            return
        rows = self._rows(updates)
        self.loggers.log_updates(rows)
        if show and self.progress is not None:
            last = rows[-1]
            shown = {"epoch": last["epoch"], "loss": last["train/loss"], "lr": max(updates[-1].rates.values())}
            shown |= {"grad_norm": last["grad_norm"], "samples_per_second": last["samples_per_second"]}
            self.progress.update(updates[-1].step, shown)

    def restart_clock(self) -> None:
        """Leave what was done since the last flush, evaluating and saving, out of the training pace."""
        self._since = time.perf_counter()

    def metrics(self, values: dict[str, float]) -> None:
        """Hand evaluation metrics or epoch means to the loggers."""
        self.loggers.log_metrics(self.state.counters.step, values)

    def gradients(self) -> None:
        """Let the loggers see those of the update under way: whole, and as the optimizer will."""
        self.loggers.log_gradients(self.state.counters.step + 1, self.state.module)

    def best(self) -> None:
        """Tell the loggers which evaluation is the best so far by checkpoint.monitor."""
        checkpoint = self.state.config.checkpoint
        if best := self.state.history.best(checkpoint.monitor, checkpoint.mode):
            self.loggers.log_best(best)

    def settled(self) -> None:
        """Everything on disk that a checkpoint of this moment must find there."""
        self.loggers.flush()
        if self.folder is not None and self.fabric.is_global_zero:
            self.state.history.write(self.folder)

    def _rows(self, updates: list[Update]) -> list[dict[str, float]]:
        sums, norms, parts = self._fetch(updates)
        now = time.perf_counter()
        pace = (updates[-1].samples - self._samples) / max(now - self._since, 1e-9)
        self._since, self._samples = now, updates[-1].samples
        memory = self._memory()
        rows = []
        for update, values, norm, part_norms in zip(updates, sums, norms, parts, strict=True):
            self.state.epoch.add(update.weight, values)
            span = update.window.span
            row: dict[str, float] = {"step": update.step, "window": span.window, "epoch": span.epoch}
            row |= {"samples": update.samples}
            means = {name: value / update.weight for name, value in values.items()}
            row |= {f"train/{name}": value for name, value in self.state.task.training_figures(means).items()}
            row |= update.rates | {"grad_norm": norm} | {f"grad_norm/{part}": n for part, n in part_norms.items()}
            rows.append(row | {"samples_per_second": pace} | memory)
        return rows

    def _fetch(self, updates: list[Update]) -> tuple[list[dict[str, float]], list[float], list[dict[str, float]]]:
        """Per update, the sums over micro-batches and ranks by name, the gradient's norm, and its parts' by name."""
        tensors = [tensor for u in updates for tensor in (*u.sums, u.norm, *u.part_norms.values())]
        wide = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        if len({tensor.dtype for tensor in tensors}) > 1:
            tensors = [tensor.to(wide) for tensor in tensors]
        values = iter(torch.stack(tensors).to(wide).tolist())
        sums, norms, parts = [], [], []
        for update in updates:
            total = dict.fromkeys(update.names, 0.0)
            for i in range(len(update.sums)):
                total[update.names[i % len(update.names)]] += next(values)
            sums.append(total)
            norms.append(next(values))
            parts.append({part: next(values) for part in update.part_norms})
        if self.state.ranks.size > 1:
            own = torch.tensor([list(total.values()) for total in sums], dtype=wide, device=self.fabric.device)
            over_ranks = self.state.ranks.sum(own).tolist()
            sums = [dict(zip(t, row, strict=True)) for t, row in zip(sums, over_ranks, strict=True)]
        return sums, norms, parts

    def _memory(self) -> dict[str, float]:
        """Bytes. peak: this rank's, since the start. run.log_memory: the rest, the most of any rank; one collective."""
        found: dict[str, float] = {"memory/peak": self.gauge.peak()}
        if not self.state.config.run.log_memory:
            return found
        read: dict[str, float] = {f"memory/{name}": value for name, value in self.gauge.read().items()}
        if self.fabric.world_size > 1:
            most = torch.tensor(list(read.values()), dtype=torch.float64, device=self.fabric.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            read = dict(zip(read, most.tolist(), strict=True))
        return found | read
