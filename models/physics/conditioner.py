"""Physical parameters as scale, shift and gate of the operator's tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AdaLNConditioner(nn.Module):
    """Adaptive layer norm (Peebles and Xie, arXiv 2212.09748), one net for each source of conditions:
    gate x ((1 + scale) x LayerNorm(z) + shift), where scale, shift and gate are sums over the sources.

    The nets' last layers start at zero, so that no condition matters at first; the gate is then sigmoid(2) = 0.88.
    Parameter names are those of the Universal Physics Stack.

    dim: width of a token. sources: name -> numbers per sample. hidden: of each net.
    """

    def __init__(self, dim: int, sources: Mapping[str, int], hidden: int = 128) -> None:
        super().__init__()
        if not sources:
            raise ValueError("sources must name at least one condition, such as {'nu': 1}")
        self.embedders = nn.ModuleDict()
        for name, width in sources.items():
            last = nn.Linear(hidden, 3 * dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.embedders[name] = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)

    def forward(self, z: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
        """z: (B, T, dim); cond: every source, (B, numbers) each -> (B, T, dim). ValueError where one is missing."""
        cond = cond or {}
        if missing := [name for name in self.embedders if name not in cond]:
            raise ValueError(f"cond lacks {', '.join(missing)}: this operator is told {', '.join(self.embedders)}")
        told = torch.stack([embed(cond[name].to(z.dtype)) for name, embed in self.embedders.items()]).sum(0)
        scale, shift, gate = told[:, None].chunk(3, -1)
        return torch.sigmoid(gate + 2) * ((1 + scale) * F.layer_norm(z, z.shape[-1:]) + shift)
