"""A toy whose run can start from the weights of another, as the stages of a pipeline do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from torch import nn
from toys import Points, Regression

from fabric_trainer import Batch, Loss
from fabric_trainer.checkpoint import load


class Staged(Regression):
    """start: a checkpoint of ours, its average where it has one.

    In a run that has a start, $KILL after so many calls of ``loss`` the group of the process above dies of SIGKILL, and
    where $KILL_ALL is set so does this process.
    """

    def __init__(self, samples: int = 30, start: str | None = None) -> None:
        super().__init__(samples, dropout=0.1)
        self.start, self.calls = start, 0

    def dataset(self, split: str) -> Points | None:
        return Points(17, 2) if split == "test" else super().dataset(split)

    def network(self) -> nn.Module:
        network = super().network()
        if self.start:
            saved = load(Path(self.start))
            network.load_state_dict(saved["model"] | (saved["ema"] or {}))
        return network

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        self.calls += network.training
        if self.start and self.calls == int(os.environ.get("KILL", -1)):
            os.killpg(os.getpgid(os.getppid()), signal.SIGKILL)
            if "KILL_ALL" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)  # for the system to notice, and to tell
        return super().loss(network, batch)
