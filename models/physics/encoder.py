"""Fields on a grid to latent tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GridEncoder(nn.Module):
    """Fields on a regular grid of the unit square (or line) to a sequence of latent tokens, by fixed random features.

    The encoder is never trained. Its weights come from a seed of its own, in a fork of the global generator, so they
    are the same in every run, stage and process; they are part of the state dict all the same, and so of every
    checkpoint. Latents of two encoders with different weights have nothing to do with each other.

    A residual convolution (the identity as built), patches of points, Fourier features of the patches' centres, a
    linear map of each patch and the mean over neighbouring patches: ``tokens`` of them in row-major order.

    tokens: length of the sequence. dim: width of a token. channels: fields. patch: points of a patch along y and x;
    they keep their own numbers in the token, whereas pooling keeps only the mean. margin: points beyond a patch on
    either side, along y and x and around the periodic edges, that its token sees as well. frequencies: of the position
    features, in periods per unit length. stem: hidden channels of the convolution. seed: of the weights.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        channels: int = 1,
        patch: tuple[int, int] = (1, 1),
        margin: tuple[int, int] = (0, 0),
        frequencies: Sequence[float] = (1, 2),
        stem: int = 32,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.tokens, self.dim, self.patch, self.margin = tokens, dim, tuple(patch), tuple(margin)
        window = math.prod(p + 2 * m for p, m in zip(patch, margin, strict=True))
        self.frequencies = tuple(float(f) for f in frequencies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = max(channels, stem)
            first, last = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 1)
            self.stem = nn.Sequential(first, nn.GELU(), last)
            self.project = nn.Linear(channels * window + 4 * len(self.frequencies), dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.requires_grad_(False)

    def forward(self, fields: Tensor) -> Tensor:
        """float (B, C, H, W), H = 1 on a line -> (B, tokens, dim), in the weights' own precision: small differences
        of latents are what the operator learns, so there is no autocast here. ValueError where patches don't fit."""
        rows, columns = self._patches(*fields.shape[2:])
        (ph, pw), (my, mx) = self.patch, self.margin
        with torch.autocast(fields.device.type, enabled=False):
            fields = fields.to(self.project.weight.dtype)
            fields = fields + self.stem(fields)
            padded = F.pad(fields, (mx, mx, my, my), mode="circular")
            patches = padded.unfold(2, ph + 2 * my, ph).unfold(3, pw + 2 * mx, pw)  # (B, C, rows, columns, ph, pw)
            patches = patches.permute(0, 1, 4, 5, 2, 3).reshape(fields.shape[0], -1, rows * columns)
            position = fourier(_centres(rows, columns, fields), self.frequencies).T.expand(fields.shape[0], -1, -1)
            pooled = F.adaptive_avg_pool1d(torch.cat((patches, position), 1), self.tokens)
            # linear maps and means commute; in this order the map is applied to fewer places
            return self.project(pooled.transpose(1, 2))

    def places(self, height: int, width: int) -> Tensor:
        """Where the tokens of a grid are: (tokens, 2), the mean (x, y) of their patches' centres."""
        centres = _centres(*self._patches(height, width), self.project.weight)
        return F.adaptive_avg_pool1d(centres.T[None], self.tokens)[0].T

    def _patches(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = height // self.patch[0], width // self.patch[1]
        if (rows * self.patch[0], columns * self.patch[1]) != (height, width) or rows * columns < self.tokens:
            raise ValueError(
                f"a grid of {height} x {width} points does not give {self.tokens} tokens "
                f"of patches of {self.patch[0]} x {self.patch[1]}"
            )
        return rows, columns


def _centres(rows: int, columns: int, like: Tensor) -> Tensor:
    """(x, y) of the cell centres of a grid of the unit square, row by row: (rows x columns, 2)."""
    y = (torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=like.device, dtype=like.dtype) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def fourier(coordinates: Tensor, frequencies: Sequence[float]) -> Tensor:
    """sin and cos of 2 pi f times each coordinate: (..., K) -> (..., 2 K x frequencies)."""
    angles = [2 * math.pi * f * coordinates for f in frequencies]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], -1)
