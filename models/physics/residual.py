"""What the operator's latent state still lacks, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DiffusionResidual(nn.Module):
    """A correction to add to a latent state, from the state itself and a level ``tau`` between 0 and 1.

    Every token by itself: a net on [z, tau, cond]. Parameter names are those of the Universal Physics Stack
    (``diffusion_residual.pt``).

    dim: width of a token. hidden: of both hidden layers; 2 x dim when None, as in the UPS. cond: numbers per sample
    that it is told besides. zero_init: the last layer starts at zero, so that the untrained net corrects nothing; the
    UPS draws it like any other.
    """

    def __init__(self, dim: int, hidden: int | None = None, cond: int = 0, zero_init: bool = True) -> None:
        super().__init__()
        hidden = hidden or 2 * dim
        last = nn.Linear(hidden, dim)
        self.cond = cond
        self.network = nn.Sequential(
            nn.Linear(dim + 1 + cond, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last
        )
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, tau: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """z: (B, T, dim); tau: a number or (B,); cond: (B, cond), where the net has one -> (B, T, dim)."""
        return self.network(torch.cat((z, *told(z, tau, cond, self.cond)), -1))


def told(z: Tensor, level: Tensor | float, cond: Tensor | None, width: int) -> list[Tensor]:
    """What every token is told beside itself: the level (B, T, 1), and cond (B, T, width) where width isn't 0.

    z: (B, T, D); level: a number or (B,). ValueError for a cond of another width, or none where there should be one.
    """
    batch, tokens = z.shape[:2]
    level = torch.as_tensor(level, dtype=z.dtype, device=z.device).reshape(-1, 1, 1)
    beside = [level.expand(batch, tokens, 1)]
    if (cond.shape[-1] if cond is not None else 0) != width:
        given = "none" if cond is None else f"{cond.shape[-1]} numbers"
        raise ValueError(f"cond must have {width} numbers per sample, not {given}")
    if cond is not None:
        beside.append(cond.to(z.dtype)[:, None].expand(batch, tokens, width))
    return beside


# ---- levels between a prediction and the truth --------------------------------------------------------------------


def bridged(z1: Tensor, predicted: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """A state on the way from the truth, at tau = 0, to the prediction with noise, at tau = 1:
    (1 - tau) z1 + tau (predicted + noise). Inversion by direct iteration, arXiv 2303.11435. (B, T, D) three times,
    tau (B,) -> (B, T, D)."""
    return torch.lerp(z1, predicted + noise, tau.to(z1.dtype).view(-1, 1, 1))


def refined(drift: Callable[[Tensor, float], Tensor], z: Tensor, calls: int, tau: float = 1.0) -> Tensor:
    """A prediction z brought from level tau to level 0 in ``calls`` equal steps from t to t':
    z <- (1 - t' / t) (z + d(z, t)) + (t' / t) z, where z + d(z, t) is what the drift takes for the truth (same paper,
    algorithm 1). One call is z + d(z, tau)."""
    for left in range(calls, 0, -1):
        z = z + drift(z, tau * left / calls) / left  # 1 - t' / t = 1 / left
    return z
