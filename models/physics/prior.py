"""The state that a latent state settles to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.physics.residual import told


class SteadyPrior(nn.Module):
    """A steady latent state, found from any in ``num_steps`` residual steps of one and the same net.

    Every token by itself: z <- z + drift([z, step / (num_steps - 1), cond]). Parameter names are those of the Universal
    Physics Stack (``steady_prior.pt``).

    dim: width of a token. hidden: of both hidden layers; 2 x dim when None, as in the UPS. cond: numbers per sample
    that it is told besides. zero_init: the last layer starts at zero, so that the untrained prior stays where it is;
    the UPS draws it like any other.
    """

    def __init__(
        self, dim: int, hidden: int | None = None, num_steps: int = 4, cond: int = 0, zero_init: bool = True
    ) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        hidden = hidden or 2 * dim
        last = nn.Linear(hidden, dim)
        self.num_steps, self.cond = num_steps, cond
        self.drift = nn.Sequential(
            nn.Linear(dim + 1 + cond, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), last
        )
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """z: (B, T, dim); cond: (B, cond), where the net has one -> (B, T, dim)."""
        for step in range(self.num_steps):
            time = step / max(self.num_steps - 1, 1)
            z = z + self.drift(torch.cat((z, *told(z, time, cond, self.cond)), -1))
        return z
