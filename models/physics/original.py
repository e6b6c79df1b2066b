"""The Universal Physics Stack's own encoder and decoder, by its names and formulas, for parity.

Ours (``encoder.GridEncoder``, ``decoder.AnyPointDecoder``) see beyond a patch and know where tokens are. These two
don't. In the UPS neither was ever trained, nor saved; here they are modules like any other: drawn from the global
generator, trainable, and in the checkpoint of whatever holds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OriginalGridEncoder(nn.Module):
    """Fields on a grid to latent tokens: patches, a residual convolution (the identity as built) for each field,
    Fourier features of the patches' centres, a linear map, the mean over neighbouring patches.

    Coordinates run from 0 to 1 with both ends on the grid, 0 along an axis of one point. The head that the UPS has for
    a self-check, from tokens back to patches, is left out.

    tokens: length of the sequence. dim: width of a token. fields: name -> channels, in the order of their patches.
    patch: points of a patch along each axis. stem: hidden channels of the convolution; max(channels, 32) when None.
    frequencies: in periods per unit length; without any, and a dim that is the patches' own, there is no linear map.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        fields: Mapping[str, int],
        patch: int = 4,
        stem: int | None = None,
        frequencies: Sequence[float] = (1, 2),
    ) -> None:
        super().__init__()
        self.tokens, self.patch, self.frequencies = tokens, patch, tuple(float(f) for f in frequencies)
        self.per_field_stems = nn.ModuleDict()
        for name, channels in fields.items():
            width = channels * patch * patch
            last = nn.Conv2d(stem or max(width, 32), width, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
            first = nn.Conv2d(width, last.in_channels, 3, padding=1)
            self.per_field_stems[name] = nn.Sequential(first, nn.GELU(), last)
        width = sum(fields.values()) * patch * patch
        plain = width == dim and not self.frequencies
        self.to_latent = nn.Identity() if plain else nn.Linear(width + 4 * len(self.frequencies), dim)

    def forward(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Each field float (B, C, H, W), H = 1 on a line -> (B, tokens, dim). ValueError where patches don't fit."""
        height, width = next(iter(fields.values())).shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"a grid of {height} x {width} points has no whole patches of {self.patch} x {self.patch}")
        parts = []
        for name, stem in self.per_field_stems.items():
            patches = F.pixel_unshuffle(fields[name], self.patch)
            parts.append(patches + stem(patches))
        if self.frequencies:
            position = self._position(parts[0], height, width)
            parts.append(position.expand(parts[0].shape[0], -1, -1, -1))
        tokens = self.to_latent(torch.cat(parts, 1).flatten(2).transpose(1, 2))
        return F.adaptive_avg_pool1d(tokens.transpose(1, 2), self.tokens).transpose(1, 2)

    def _position(self, like: Tensor, height: int, width: int) -> Tensor:
        """Sines of both coordinates, then their cosines, at the patches' centres: (1, 4 F, H / patch, W / patch)."""
        x, y = (
            torch.linspace(0, 1, size, device=like.device, dtype=like.dtype).view(-1, self.patch).mean(1)
            for size in (width, height)
        )
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"))  # (2, rows, columns)
        frequencies = torch.tensor(self.frequencies, device=like.device, dtype=like.dtype)
        angles = (2 * math.pi * centres[:, None] * frequencies.view(1, -1, 1, 1)).flatten(0, 1)
        return torch.cat((angles.sin(), angles.cos()))[None]


class OriginalAnyPointDecoder(nn.Module):
    """Field values at query points, by cross-attention to tokens that don't say where they are.

    dim: width of a token. fields: name -> channels. hidden, layers, heads, mlp: sizes. frequencies: of the position
    features, in periods per unit length. log_clamp: t, to damp large values v to sign(v) t log(1 + |v| / t); 10 in the
    UPS where it is used.
    """

    def __init__(
        self,
        dim: int,
        fields: Mapping[str, int],
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp: int = 128,
        frequencies: Sequence[float] = (1, 2, 4),
        log_clamp: float | None = None,
    ) -> None:
        super().__init__()
        if log_clamp is not None and log_clamp <= 0:
            raise ValueError(f"log_clamp must be above 0, not {log_clamp}")

        def net(out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, out))

        self.frequencies, self.log_clamp = tuple(float(f) for f in frequencies), log_clamp
        self.query_embed = nn.Linear(2 + 4 * len(self.frequencies), hidden)
        self.latent_proj = nn.Linear(dim, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.MultiheadAttention(hidden, heads, batch_first=True),
                    nn.LayerNorm(hidden),
                    net(hidden),
                    nn.LayerNorm(hidden),
                )
            )
            for _ in range(layers)
        )
        self.heads = nn.ModuleDict({name: net(channels) for name, channels in fields.items()})

    def forward(self, points: Tensor, z: Tensor) -> dict[str, Tensor]:
        """points: float (B, Q, 2), (x, y); z: (B, T, dim) -> each field's (B, Q, channels)."""
        frequencies = torch.tensor(self.frequencies, device=points.device, dtype=points.dtype)
        angles = (2 * math.pi * points[..., None, :] * frequencies[:, None]).flatten(-2)
        queries = self.query_embed(torch.cat((points, angles.sin(), angles.cos()), -1))
        tokens = self.latent_proj(z)
        for layer in self.layers:
            attention, attention_norm, net, net_norm = layer.children()
            queries = attention_norm(queries + attention(queries, tokens, tokens, need_weights=False)[0])
            queries = net_norm(queries + net(queries))
        return {name: self._clamp(head(queries)) for name, head in self.heads.items()}

    def _clamp(self, values: Tensor) -> Tensor:
        if self.log_clamp is None:
            return values
        return values.sign() * self.log_clamp * torch.log1p(values.abs() / self.log_clamp)
