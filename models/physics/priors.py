"""What a solution is known to obey, and what latents should look like: penalties per sample.

Fields are (B, C, H, W), in their units; a line has H = 1. Every penalty gives (B,), in float32 at least; its gradient
goes wherever the fields or latents came from, so decode them with a graph (the Universal Physics Stack, UPS, whose
penalties these are, decodes without one and trains nothing by them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.physics.losses import EPS, wide

EDGES = ("left", "right", "top", "bottom")  # x = 0, x = 1, the first row and the last


def divergence_penalty(velocity: Tensor, spacing: tuple[float, float] = (1.0, 1.0), periodic: bool = True) -> Tensor:
    """mean |du_x/dx + du_y/dy| by central differences: (B, 2, H, W), u_x and u_y, or (B, 1, 1, W) on a line -> (B,).

    spacing: (dy, dx) of the grid. periodic: around the edges; else over the points inside them alone, of which an
    axis must have one. (The UPS takes a derivative across an edge for 0 instead.)
    """
    height, width = velocity.shape[2:]
    if velocity.shape[1] != 2 and (velocity.shape[1], height) != (1, 1):
        raise ValueError(f"divergence is of (B, 2, H, W), or (B, 1, 1, W) on a line, not {tuple(velocity.shape)}")
    if not periodic and (width < 3 or height == 2):
        raise ValueError(f"a grid of {height} x {width} points has none inside its edges")
    velocity, (dy, dx) = wide(velocity), spacing
    divergence = _slope(velocity[:, 0], 2, dx)
    if height > 1:
        divergence = divergence + _slope(velocity[:, 1], 1, dy)
    if not periodic:
        divergence = divergence[:, 1:-1, 1:-1] if height > 1 else divergence[:, :, 1:-1]
    return divergence.abs().flatten(1).mean(1)


def conservation_penalty(fields: Tensor, first: Tensor) -> Tensor:
    """|sum f - sum f_0| / (|sum f_0| + 1e-8) of each field, sums over the grid and f_0 the same sample's first state,
    averaged over fields: (B, C, H, W) twice -> (B,). Large where f_0 has a mean near 0: leave such fields out."""
    if fields.shape != first.shape:
        raise ValueError(f"fields {tuple(fields.shape)} and first states {tuple(first.shape)} differ in shape")
    now, before = (wide(x).sum((2, 3)) for x in (fields, first))
    return ((now - before).abs() / (before.abs() + EPS)).mean(1)


def first_batch_conservation_penalty(fields: Tensor, first_batch: Tensor) -> Tensor:
    """The UPS's form, for comparing numbers only: ``first_batch`` is the first batch that the run ever saw, and row i
    is held to the integral of its row i, another sample's. Depends on the order and the split of the samples, and
    fails with ValueError where the shape differs, as with another task's."""
    return conservation_penalty(fields, first_batch)


def boundary_penalty(fields: Tensor, value: float = 0.0, edges: str = "all") -> Tensor:
    """mean (f - value)^2 on the grid's edges, each point once (Dirichlet): (B, C, H, W) -> (B,).

    edges: all, left, right, top or bottom; a line has the first three. (The UPS counts corners twice, and every point
    of a line as an edge.)
    """
    chosen = EDGES if edges == "all" else (edges,)
    height = fields.shape[2]
    if not set(chosen) <= set(EDGES) or (height == 1 and edges in ("top", "bottom")):
        raise ValueError(f"edges must be all, {', '.join(EDGES)}, of a line all, left or right, not {edges!r}")
    edge = torch.zeros(fields.shape[2:], dtype=torch.bool, device=fields.device)
    edge[:, 0] |= "left" in chosen
    edge[:, -1] |= "right" in chosen
    if height > 1:
        edge[0] |= "top" in chosen
        edge[-1] |= "bottom" in chosen
    return (wide(fields)[:, :, edge] - value).pow(2).flatten(1).mean(1)


def positivity_penalty(density: Tensor) -> Tensor:
    """mean(relu(-rho)), for densities and pressures: (B, ...) -> (B,)."""
    return (-wide(density)).relu().flatten(1).mean(1)


def latent_norm_penalty(z: Tensor) -> Tensor:
    """mean over tokens of | ||z_t|| - 1 |: (B, T, D) -> (B,)."""
    return (torch.linalg.vector_norm(wide(z), dim=-1) - 1).abs().mean(1)


def latent_diversity_penalty(z: Tensor) -> Tensor:
    """mean over pairs of a sample's different tokens of |cos(z_s, z_t)|: (B, T, D), T > 1 -> (B,). A token's length
    counts as 1e-8 more than it is, so that one of zeros is at right angles to all."""
    z = wide(z)
    tokens = z.shape[1]
    direction = z / (torch.linalg.vector_norm(z, dim=-1, keepdim=True) + EPS)
    with torch.autocast(z.device.type, enabled=False):
        cosines = direction @ direction.transpose(1, 2)
    different = 1 - torch.eye(tokens, dtype=z.dtype, device=z.device)
    return (cosines.abs() * different).sum((1, 2)) / (tokens * (tokens - 1))


def _slope(x: Tensor, axis: int, spacing: float) -> Tensor:
    """The central difference of (B, H, W) along an axis, around the edges."""
    return (x.roll(-1, axis) - x.roll(1, axis)) / (2 * spacing)
