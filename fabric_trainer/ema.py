"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fabric_trainer.portable import Leaf, fill, like, local


class EMA:
    """Averages the network's parameters: average += (1 - decay) * (parameter - average), after each applied update.

    decay: such as 0.999. warmup: use min(decay, (1 + step) / (10 + step)), which forgets the first weights quickly.
    The average of a half-precision parameter is kept in float32, where small changes don't round away. Buffers (such
    as BatchNorm statistics) are not averaged: the network's own go with the average.

    leaves: where a strategy keeps each parameter, by default in the network; refresh: what makes the network's
    forward see what was written there (``Engine`` has both).
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        warmup: bool = True,
        leaves: Mapping[str, Leaf] | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.network, self.decay, self.warmup, self.refresh = network, decay, warmup, refresh
        self.leaves = dict(network.named_parameters()) if leaves is None else leaves
        self.averages = {name: like(leaf, _wide(leaf.dtype)) for name, leaf in self.leaves.items()}
        # the pieces that lie on this rank, in place: no update needs another rank
        self._parameters = [local(leaf) for leaf in self.leaves.values()]
        self._averages = [local(leaf) for leaf in self.averages.values()]

    def decay_at(self, step: int) -> float:
        """The decay of the update that made the step counter ``step`` (so 1 for the first)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's present weights."""
        weights = [parameter.to(_wide(parameter.dtype)) for parameter in self._parameters]
        torch._foreach_lerp_(self._averages, weights, 1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside, and its own again afterwards, whatever happens."""
        own = [parameter.clone() for parameter in self._parameters]
        try:
            torch._foreach_copy_(self._parameters, self._averages)
            self.refresh()
            yield
        finally:
            torch._foreach_copy_(self._parameters, own)
            self.refresh()

    def state_dict(self) -> dict[str, Any]:
        """The network's state dict, by the network's own names, with the averages in place of the parameters."""
        places = {id(parameter): self.averages[name] for name, parameter in self.network.named_parameters()}
        # tied weights have one average and several names
        tied = self.network.named_parameters(remove_duplicate=False)
        return self.network.state_dict() | {name: places[id(parameter)] for name, parameter in tied}

    def load_state_dict(self, state: Mapping[str, Tensor], fetch: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """``fetch`` brings a tensor to this rank. Raises KeyError where an average is missing."""
        fill([(average, state[name]) for name, average in self.averages.items()], fetch)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
