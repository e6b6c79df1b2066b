"""One step of time in latent space: LatentOperator and its two cores.

Parameter names are those of the Universal Physics Stack, whose published weights load into these modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.physics.conditioner import AdaLNConditioner

# ---- attention ----------------------------------------------------------------------------------------------------


class ChannelAttention(nn.Module):
    """Self-attention over tokens within groups of channels that share one set of projections.

    Groups of ``group`` channels are treated as separate sequences, so the projections have group^2 weights instead of
    dim^2. q and k are normalised *before* their projections.
    """

    def __init__(self, dim: int, group: int, heads: int) -> None:
        super().__init__()
        if dim % group or group % heads:
            raise ValueError(f"group_size {group} must divide hidden_dim {dim} and be a multiple of num_heads {heads}")
        self.group, self.heads = group, heads
        self.q_norm, self.k_norm = nn.RMSNorm(group, eps=1e-6), nn.RMSNorm(group, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(group, group) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        batch, tokens, dim = x.shape
        x = x.view(batch, tokens, dim // self.group, self.group).transpose(1, 2)  # (B, groups, T, group)
        parts = (self.q_proj(self.q_norm(x)), self.k_proj(self.k_norm(x)), self.v_proj(x))
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v)  # over (B, groups x heads, T, head)
        y = y.unflatten(1, (-1, self.heads)).transpose(2, 3).flatten(3)
        return self.out_proj(y).transpose(1, 2).reshape(batch, tokens, dim)


class Attention(nn.Module):
    """Self-attention over tokens; q and k normalised per head, *after* the projection, where ``qk_norm``.

    dropout: of the attention weights and of the result.
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"num_heads {heads} must divide hidden_dim {dim}")
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout)


# ---- core "pdet_unet" ---------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class UNetLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(x)."""

    def __init__(self, dim: int, group: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(dim)
        self.attn = ChannelAttention(dim, group, heads)
        self.ff = FeedForward(dim, mlp_ratio, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.ff(x)


class UNetCore(nn.Module):
    """Token U-Net "pdet_unet": (B, T, input_dim) -> (B, T, input_dim).

    depths: layers per level on the way down, the last one at the bottom, the same again on the way up. The sequence is
    halved between levels by means of neighbouring tokens, and interpolated on the way back.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        depths: Sequence[int] = (2, 2, 2),
        group_size: int = 32,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def layers(count: int) -> nn.ModuleList:
            return nn.ModuleList(UNetLayer(hidden_dim, group_size, num_heads, mlp_ratio, dropout) for _ in range(count))

        *sides, bottom = depths
        linear = nn.Linear
        self.input_proj = linear(input_dim, hidden_dim)
        self.down_layers = nn.ModuleList(nn.ModuleList((layers(n), linear(hidden_dim, hidden_dim))) for n in sides)
        self.bottleneck = layers(bottom)
        self.up_layers = nn.ModuleList(nn.ModuleList((linear(hidden_dim, hidden_dim), layers(n))) for n in sides[::-1])
        self.final_norm = nn.LayerNorm(hidden_dim)
        self.output_proj = linear(hidden_dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.input_proj(x), []
        for down in self.down_layers:
            layers, narrow = down.children()
            x = _chain(layers, x)
            skips.append(x)
            x = narrow(_halve(x))
        x = _chain(self.bottleneck, x)
        for up in self.up_layers:
            widen, layers = up.children()
            skip = skips.pop()
            x = _chain(layers, _stretched(x, skip.shape[1]) + widen(skip))
        return self.output_proj(self.final_norm(x))


def _chain(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x


def _halve(x: Tensor) -> Tensor:
    """Means of neighbouring tokens: (B, T, D) -> (B, ceil(T / 2), D); an odd last token is its own mean."""
    if x.shape[1] % 2:
        x = torch.cat((x, x[:, -1:]), 1)
    return 0.5 * (x[:, ::2] + x[:, 1::2])


def _stretched(x: Tensor, tokens: int) -> Tensor:
    """Linear interpolation to another number of tokens: (B, T, D) -> (B, tokens, D)."""
    x = x.transpose(1, 2)
    # on a GPU torch has a deterministic backward for planes alone
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x[:, :, None], size=(1, tokens), mode="bilinear")[:, :, 0].transpose(1, 2)
    return F.interpolate(x, size=tokens, mode="linear").transpose(1, 2)


# ---- core "pdet_stack" --------------------------------------------------------------------------------------------


class StackLayer(nn.Module):
    """Pre-norm transformer block with stochastic depth (Huang et al. 2016): ``drop_path`` skips a sample's branch."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.drop_path = drop_path
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attn, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * (branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep)


class StackCore(nn.Module):
    """Plain transformer "pdet_stack": (B, T, input_dim) -> (B, T, input_dim).

    attention_type: "standard" or "channel_separated" (with ``group_size``). drop_path grows linearly over the blocks
    to its value. dropout: in the feed-forward nets and in standard attention. use_activation_checkpoint recomputes
    every block in the backward pass: less memory, more time. (The UPS recomputes attention and feed-forward net one by
    one; a whole block keeps one tensor instead of two or more, and its norms are all that it recomputes besides.)
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        depth: int = 8,
        num_heads: int = 8,
        attention_type: str = "standard",
        group_size: int = 32,
        qk_norm: bool = True,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        use_activation_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if attention_type not in ("standard", "channel_separated"):
            raise ValueError(f"attention_type must be standard or channel_separated, not {attention_type!r}")

        def attention() -> nn.Module:
            if attention_type == "standard":
                return Attention(hidden_dim, num_heads, qk_norm, dropout)
            return ChannelAttention(hidden_dim, group_size, num_heads)

        equal = input_dim == hidden_dim
        self.recompute = use_activation_checkpoint
        self.input_proj = nn.Identity() if equal else nn.Linear(input_dim, hidden_dim)
        self.layers = nn.ModuleList(
            StackLayer(hidden_dim, attention(), mlp_ratio, dropout, drop_path * i / max(1, depth - 1))
            for i in range(depth)
        )
        self.output_norm = nn.LayerNorm(hidden_dim)
        self.output_proj = nn.Identity() if equal else nn.Linear(hidden_dim, input_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_proj(x)
        for layer in self.layers:
            recompute = self.recompute and self.training
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return self.output_proj(self.output_norm(x))


CORES: dict[str, type[nn.Module]] = {"pdet_unet": UNetCore, "pdet_stack": StackCore}


# ---- the operator -------------------------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """A step of time to a vector: (B, 1) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, dt: Tensor) -> Tensor:
        return self.proj(dt)


class LatentOperator(nn.Module):
    """The latent state after a step of time: z + LayerNorm(core(z + time)).

    The LayerNorm's gain and bias start at zero, so the untrained operator predicts that nothing changes. ``norm_eps``
    is added to the variance of the core's output: the usual 1e-5 forces one size on every token's change, whatever
    happens there; at 1 a token that stays as it is can say so.

    dim: width of a token. architecture: "pdet_unet" or "pdet_stack". core: the arguments of that core, input_dim
    left out. sources, source_hidden: of an AdaLNConditioner that stands before the core, where conditions are given.
    """

    def __init__(
        self,
        dim: int,
        architecture: str = "pdet_unet",
        core: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        sources: Mapping[str, int] | None = None,
        source_hidden: int = 128,
    ) -> None:
        super().__init__()
        if architecture not in CORES:
            raise ValueError(f"architecture must be one of {', '.join(CORES)}, not {architecture!r}")
        # without settings, those of the UPS for a missing section
        default = {"hidden_dim": 2 * dim, "depths": (1, 1, 1), "group_size": max(dim // 2, 4), "num_heads": 4}
        core = core or (default if architecture == "pdet_unet" else {"hidden_dim": 2 * dim})
        self.time_embed = TimeEmbedding(dim)
        self.time_to_latent = nn.Linear(dim, dim)
        self.core = CORES[architecture](input_dim=dim, **core)
        self.output_norm = nn.LayerNorm(dim, eps=norm_eps)
        nn.init.zeros_(self.output_norm.weight)
        self.conditioner = AdaLNConditioner(dim, sources, source_hidden) if sources else None

    def forward(self, z: Tensor, dt: Tensor | float, cond: Mapping[str, Tensor] | None = None) -> Tensor:
        """z: (B, T, dim); dt: a number or (B,); cond: (B, numbers) of each source -> (B, T, dim)."""
        dt = torch.as_tensor(dt, dtype=z.dtype, device=z.device).reshape(-1, 1)
        time = self.time_to_latent(self.time_embed(dt))
        x = z + time[:, None]
        if self.conditioner is not None:
            x = self.conditioner(x, cond)
        return z + self.output_norm(self.core(x))
