"""How much memory is in use; and out of memory: smaller micro-batches for the same update, here and now, or after a
restart of the job."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from fabric_trainer.batch import with_micro_batches
from fabric_trainer.config import BatchConfig
from fabric_trainer.errors import OutOfMemoryRestart
from fabric_trainer.files import write_atomically

NOTE = "memory.json"
STATM = Path("/proc/self/statm")  # of Linux: pages, the second number the resident ones


class Memory:
    """How many rows a forward takes. What does not fit is halved, and stays so.

    split: this rank forgets the window's gradients and does the window again with half the rows; the update is the
    same. restart: a rank in the middle of a collective can't, so the job ends, and begins again with half.
    """

    def __init__(self, micro_batch_size: int, answer: str, folder: Path | None = None) -> None:
        self.micro_batch_size, self.answer, self.folder = micro_batch_size, answer, folder
        self.halvings = 0

    @property
    def rows(self) -> int:
        """Of a forward."""
        return -(-self.micro_batch_size // 2**self.halvings)

    def describe(self) -> str:
        """The answer, and how far it has come."""
        less = f", {self.rows} rows a forward: {self.micro_batch_size} did not fit" if self.halvings else ""
        return self.answer + less

    def state_dict(self) -> dict[str, int]:
        return {"micro_batch_size": self.micro_batch_size, "halvings": self.halvings}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Of a run of the same micro-batches: with others the search begins again."""
        if state.get("micro_batch_size") == self.micro_batch_size:
            self.halvings = state["halvings"]

    def ran_out(self, error: RuntimeError) -> None:
        """Make the next attempt smaller. Raises ``error`` itself where it is another, or one row is too much, and
        OutOfMemoryRestart where the attempt must be another job's."""
        if not is_out_of_memory(error) or self.rows == 1:
            raise error
        if self.answer == "restart":
            self._restart(error)
        self.halvings += 1

    def release(self) -> None:
        """Give the allocator's unused blocks back, so that smaller ones fit."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _restart(self, error: RuntimeError) -> NoReturn:
        rows = self.micro_batch_size // 2
        if self.folder is not None:
            write_atomically(self.folder / NOTE, json.dumps({"micro_batch_size": rows}))
        raise OutOfMemoryRestart(
            f"out of memory with micro-batches of {self.micro_batch_size} ({str(error).splitlines()[0]}); "
            f"continue with --resume auto, which takes smaller ones"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device, or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_use(device: torch.device) -> dict[str, int]:
    """Bytes: of this process on the host (resident; its largest, where the system doesn't tell the present one), and
    on a GPU by tensors (allocated) and by the allocator (reserved)."""
    found = {"host": int(STATM.read_text().split()[1]) * resource.getpagesize() if STATM.is_file() else host_peak()}
    if device.type == "cuda":
        found |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return found


def host_peak() -> int:
    """Bytes: the process's largest resident size."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Gauge:
    """Reads the memory in use at log points. GPU: its allocator's peak is asked for since the start and since the last
    reading; the allocator keeps one, so this object remembers what it makes the allocator forget."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.device, self.most = device.type == "cuda", device, 0

    def peak(self) -> int:
        """Bytes since the start: of the device's allocator, or on a CPU of the process."""
        if self.cuda:
            self.most = max(self.most, torch.cuda.max_memory_allocated(self.device))
        return self.most if self.cuda else host_peak()

    def read(self) -> dict[str, int]:
        """``in_use``, and of a GPU peak_since_log, the allocator's peak since the last call."""
        found = in_use(self.device)
        if self.cuda:
            found["peak_since_log"] = torch.cuda.max_memory_allocated(self.device)
            self.peak()
            torch.cuda.reset_peak_memory_stats(self.device)
        return found


def remembered(folder: Path, batch: BatchConfig, world_size: int, tell: Callable[[str], None]) -> BatchConfig:
    """The ``batch`` section for a run that has found out in ``folder`` what fits: the same updates."""
    path = folder / NOTE
    if not path.is_file():
        return batch
    fits, micro = json.loads(path.read_text()).get("micro_batch_size"), batch.micro_batch_size
    if fits is None or (micro != "auto" and micro <= fits):  # a search that goes on, or one for more
        return batch
    found = with_micro_batches(batch, world_size, fits)
    why = "found before" if micro == "auto" else "the run has run out of memory"
    tell(f"micro-batches of {found.micro_batch_size} instead of {micro}: {why} ({path})")
    return found
