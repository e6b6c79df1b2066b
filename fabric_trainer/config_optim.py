"""The keys of ``optim``: the optimizer, its parameter groups, and what goes around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class MuonConfig:
    """Muon's half of muon_hybrid; AdamW's is optim.lr, optim.weight_decay and optim.args."""

    matrices: Literal["hidden", "all"] | list[str] = "hidden"
    """Which it steps: hidden, the 2-D weights in the task's blocks; all, all but embeddings; or name patterns."""
    lr: float | None = None
    """Peak learning rate; else optim.lr."""
    weight_decay: float | None = None
    """Else optim.weight_decay."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What a matrix's rate is multiplied by: 0.2 sqrt(max(rows, columns)), with which AdamW's rates fit, or (original)
    sqrt(max(1, rows / columns))."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of torch.optim.Muon: momentum, nesterov, ns_steps, ns_coefficients, eps."""


@dataclass
class OtherConfig:
    """An optimizer for some of the parameters."""

    match: list[str] = field(default_factory=list)
    """Patterns of parameter names, such as head.*; the first entry that matches a parameter has it."""
    name: str = "adamw"
    """As optim.name."""
    lr: float | None = None
    """Peak learning rate; else optim.lr."""
    weight_decay: float | None = None
    """Else optim.weight_decay."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of this optimizer."""


@dataclass
class LookaheadConfig:
    """Slow weights that follow every k updates."""

    k: int = 5
    """Applied updates between two synchronisations."""
    alpha: float = 0.5
    """The share of the way that the slow weights go."""


@dataclass
class SamConfig:
    """Sharpness-aware minimisation: the gradient is that at the worst point nearby. Twice the work."""

    rho: float = 0.05
    """How far away that point is."""
    adaptive: bool = False
    """Measure the distance relative to each weight (ASAM; rho about ten times larger)."""


@dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    name: str = "adamw"
    """A name of torch.optim or torch_optimizer, in any case, or an import path; muon_hybrid: Muon for matrices, AdamW
    for the rest."""
    lr: float = 1e-3
    """Peak learning rate; the schedule gives the share of it."""
    weight_decay: float = 0.0
    """For weights; norms, biases and other vectors get none."""
    decay_everything: bool = False
    """Give norms and biases the weight decay too."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, such as betas."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    others: list[OtherConfig] = field(default_factory=list)
    """Optimizers for parameters by name, beside this one: [{match: [head.*], name: sgd, lr: 0.1, weight_decay: 0,
    args: {momentum: 0.9}}]."""
    lookahead: LookaheadConfig | None = None
    """Lookahead around the optimizer: {k: 5, alpha: 0.5}."""
    sam: SamConfig | None = None
    """Sharpness-aware minimisation: {rho: 0.05, adaptive: false}."""
