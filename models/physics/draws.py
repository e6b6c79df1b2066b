"""What the losses draw: query points of the grid, and the corrector's taus. Each sample has its own.

Draw them on the host, in the task's ``augment``, and let them travel with the batch; a different ``name`` gives other
draws of the same sample.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv
from torch import Tensor

from fabric_trainer.random import SampleRandom

_MANY = 1 << 62  # equally likely integers: too many for two draws of a sample to tie


def query_points(
    random: SampleRandom, height: int, width: int, queries: int, stratified: bool = False, name: str = "queries"
) -> Tensor:
    """Different points of the grid, for each sample: int64 (B, min(queries, height x width)), numbered row by row.

    Uniform: every choice of that many points is equally likely. stratified: the grid is cut into near-equal blocks,
    about as many along y as along x, or along x alone on a line; each gives a point, and the rest are uniform among
    the points that are left.
    """
    points = height * width
    queries = min(queries, points)
    keys = random.integers(name, 0, _MANY, points)
    if not stratified:
        return keys.topk(queries).indices
    rows = min(height, math.isqrt(queries))
    columns = min(width, queries // rows)
    y = _in_stretches(height, random.integers(f"{name} row", 0, _MANY, columns, rows)).mT
    x = _in_stretches(width, random.integers(f"{name} column", 0, _MANY, rows, columns))
    chosen = (y * width + x).flatten(1)
    left = keys.scatter(1, chosen, -1).topk(queries - rows * columns).indices
    return torch.cat((chosen, left), 1)


def at_points(fields: Tensor, points: Tensor) -> Tensor:
    """The fields' values at points numbered as above: (B, C, H, W), int64 (B, Q) -> (B, Q, C)."""
    return fields.flatten(2).gather(2, points[:, None].expand(-1, fields.shape[1], -1)).mT


def taus(random: SampleRandom, count: int, alpha: float = 1.0, beta: float = 1.0, name: str = "tau") -> Tensor:
    """tau from Beta(alpha, beta) by its inverse distribution function, on the host: float32 (B, count).

    Beta(1, 1) is uniform in [0, 1).
    """
    uniform = random.uniform(name, count)
    if alpha == beta == 1:
        return uniform
    return torch.from_numpy(betaincinv(alpha, beta, uniform.double().numpy())).float()


def _in_stretches(size: int, bits: Tensor) -> Tensor:
    """One of the places of each of (..., N) near-equal stretches of ``size``, by random bits of that shape."""
    edges = torch.arange(bits.shape[-1] + 1, device=bits.device) * size // bits.shape[-1]
    return edges[:-1] + bits % edges.diff()
