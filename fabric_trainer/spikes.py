"""Gradients that are suddenly large: told by their norm, against its running mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DECAY = 0.97  # of the running mean: about the last 33 updates count


class RunningNorm:
    """The exponential mean of the gradient's norm (as ZClip has it, arXiv 2504.02507), and what is far above it.

    A single bad batch can undo days of training; leaving its update out is the common remedy (Chowdhery et al., arXiv
    2204.02311, section 5.1). A norm is a spike above ``factor`` times the mean, once ``warmup`` norms are in it. A
    spike goes into the mean as large as is allowed, no larger: it hardly moves it, but where gradients have grown for
    good the limit follows, by (1 - DECAY) (factor - 1) of itself each update. What isn't finite never goes in.

    Everything stays on the norm's device; every rank has the same norm, so all come to the same verdict.
    """

    def __init__(self, factor: float, warmup: int) -> None:
        self.factor, self.warmup = factor, warmup
        self.mean, self.count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
        self.limit = self.mean  # for the last norm

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """Whether ``norm`` is a spike, a 0-d bool; takes it in."""
        self.mean, self.count = self.mean.to(norm), self.count.to(norm.device)
        self.limit = self.factor * self.mean
        finite, known = norm.isfinite(), (self.count >= self.warmup) & (self.limit > 0)
        spike = finite & known & (norm > self.limit)
        rate = (1 / (self.count.to(norm) + 1)).clamp(min=1 - DECAY)  # at first the plain mean
        taken = torch.where(spike, self.limit, norm)
        self.mean = torch.where(finite, self.mean + rate * (taken - self.mean), self.mean)
        self.count = self.count + finite
        return spike

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.item(), "count": int(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = torch.tensor(state["mean"], dtype=torch.float64)
        self.count = torch.tensor(state["count"], dtype=torch.int64)
