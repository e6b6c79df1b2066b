"""Latent tokens to field values at any point."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.physics.encoder import fourier

_SHARPNESS = 3.0  # of the first attention; 1 takes several times as many updates to find a place


class DecoderLayer(nn.Module):
    """Cross-attention from queries to tokens and a feed-forward net, each with its norm behind it."""

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.attn_norm = nn.LayerNorm(hidden)
        self.ff = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, hidden))
        self.ff_norm = nn.LayerNorm(hidden)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = self.attn_norm(queries + self.attn(queries, tokens, tokens, need_weights=False)[0])
        return self.ff_norm(queries + self.ff(queries))


class AnyPointDecoder(nn.Module):
    """Field values at query points, read from latent tokens by cross-attention.

    Tokens are marked with their places by the same position features as queries, and keys start as the map that
    queries have: so attention leans to the query's own place from the start, and soon sharpens there.

    dim: width of a token. fields: values per point. hidden, layers, heads, mlp: sizes. frequencies: of the position
    features, in periods per unit length.
    """

    def __init__(
        self,
        dim: int,
        fields: int = 1,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp: int = 128,
        frequencies: Sequence[float] = (1, 2, 4),
    ) -> None:
        super().__init__()
        self.frequencies = tuple(float(f) for f in frequencies)
        self.query_proj = nn.Linear(2 + 4 * len(self.frequencies), hidden)
        self.latent_proj = nn.Linear(dim, hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, heads, mlp) for _ in range(layers))
        self.head = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, fields))
        with torch.no_grad():
            self.query_proj.weight.mul_(_SHARPNESS)
            for layer in self.layers:
                query, key, _ = layer.attn.in_proj_weight.chunk(3)  # type: ignore[union-attr, operator]
                key.copy_(query)

    def forward(self, points: Tensor, z: Tensor, places: Tensor) -> Tensor:
        """points: float (B, Q, 2), (x, y) in the unit square; z: (B, T, dim); places: (T, 2), where the tokens are,
        as GridEncoder.places gives them -> (B, Q, fields)."""
        queries = self._mark(points)
        tokens = self.latent_proj(z) + self._mark(places)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return self.head(queries)

    def _mark(self, xy: Tensor) -> Tensor:
        return self.query_proj(torch.cat((xy, fourier(xy, self.frequencies)), -1))
