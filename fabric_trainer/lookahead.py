"""Lookahead: slow weights that follow the optimizer's, and take it back to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.config import LookaheadConfig
from fabric_trainer.portable import Leaf, fill, like, local


class Lookahead:
    """After every k-th applied update: slow += alpha * (fast - slow), then fast = slow (Zhang et al., arXiv
    1907.08610). The optimizer's own moments go on as they are.

    leaves: where each parameter is kept, which are also what the optimizer steps; elementwise, so no update needs
    another rank. Slow weights of half-precision parameters are kept in float32. What has no gradient stands still.
    """

    def __init__(self, leaves: Mapping[str, Leaf], config: LookaheadConfig) -> None:
        self.k, self.alpha, self.leaves = config.k, config.alpha, leaves
        self.slow: dict[str, Leaf] = {name: like(leaf, _wide(leaf.dtype)) for name, leaf in leaves.items()}

    @torch.no_grad()
    def update(self, step: int, left_out: Tensor | bool) -> None:
        """Call right after the optimizer's step, which makes the step counter ``step``, unless it is left out: a
        tensor where only the device knows, and then the host does not wait for it."""
        if step % self.k or left_out is True:
            return
        stepped = [name for name, leaf in self.leaves.items() if leaf.grad is not None]  # type: ignore[union-attr]
        slow = [local(self.slow[name]) for name in stepped]
        fast = [local(self.leaves[name]) for name in stepped]
        if not slow:
            return
        way = torch._foreach_sub([weight.to(s.dtype) for weight, s in zip(fast, slow, strict=True)], slow)
        if not isinstance(left_out, Tensor):
            torch._foreach_mul_(way, self.alpha)
            torch._foreach_add_(slow, way)
            torch._foreach_copy_(fast, slow)
            return
        torch._foreach_mul_(way, self.alpha * left_out.logical_not())
        torch._foreach_add_(slow, way)
        for weight, value in zip(fast, slow, strict=True):
            weight.copy_(torch.where(left_out, weight, value.to(weight.dtype)))

    def restart(self) -> None:
        """From the present weights."""
        for name, leaf in self.leaves.items():
            local(self.slow[name]).copy_(local(leaf))

    def load_state_dict(self, saved: Mapping[str, Any], fetch: Callable[[Tensor], Tensor]) -> None:
        """``fetch`` brings a tensor to this rank. What was not trained then starts at the present weights."""
        self.restart()
        fill([(leaf, saved[name]) for name, leaf in self.slow.items() if name in saved], fetch)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
