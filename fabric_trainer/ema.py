"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages the network's parameters: average += (1 - decay) * (parameter - average), after each applied update.

    decay: such as 0.999. warmup: use min(decay, (1 + step) / (10 + step)), which forgets the first weights quickly.
    The average of a half-precision parameter is kept in float32, where small changes don't round away. Buffers (such
    as BatchNorm statistics) are not averaged: the network's own go with the average.
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool = True) -> None:
        self.network, self.decay, self.warmup = network, decay, warmup
        self._names = [name for name, _ in network.named_parameters()]
        places = {id(parameter): place for place, parameter in enumerate(network.parameters())}
        # tied weights have one average and several names
        named = network.named_parameters(remove_duplicate=False)
        self._place = {name: places[id(parameter)] for name, parameter in named}
        self._parameters = [parameter.detach() for parameter in network.parameters()]
        self._averages = [_wide(parameter).clone() for parameter in self._parameters]

    def decay_at(self, step: int) -> float:
        """The decay of the update that made the step counter ``step`` (so 1 for the first)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's present weights."""
        weights = [_wide(parameter) for parameter in self._parameters]
        torch._foreach_lerp_(self._averages, weights, 1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside, and its own again afterwards, whatever happens."""
        own = [parameter.clone() for parameter in self._parameters]
        try:
            torch._foreach_copy_(self._parameters, self._averages)
            yield
        finally:
            torch._foreach_copy_(self._parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict, by the network's own names, with the averages in place of the parameters."""
        averages = {name: self._averages[place] for name, place in self._place.items()}
        return {name: averages.get(name, value) for name, value in self.network.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError where an average is missing."""
        torch._foreach_copy_(self._averages, [state[name] for name in self._names])


def _wide(parameter: Tensor) -> Tensor:
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter
