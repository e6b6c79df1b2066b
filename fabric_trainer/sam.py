"""Sharpness-aware minimisation: the update goes by the gradient at the worst point nearby."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fabric_trainer.clip import total_norm
from fabric_trainer.config import SamConfig

EPS = 1e-12


class Sam:
    """Where that point is, for whole gradients: w + rho g / |g| (Foret et al., arXiv 2010.01412); adaptive: relative
    to each weight, w + rho w^2 g / |w g| (Kwon et al., arXiv 2102.11600).

    parameters: those that the optimizer steps. statistics: buffers that every forward changes, such as BatchNorm's.
    """

    def __init__(self, parameters: list[nn.Parameter], statistics: list[Tensor], config: SamConfig) -> None:
        self.parameters, self.statistics, self.config = parameters, statistics, config

    @contextmanager
    def uphill(self) -> Iterator[None]:
        """Inside, the weights are at the worst point near the present ones, by the present gradients, which are dropped
        there. Afterwards weights and statistics are what they were, bit for bit; the gradients are those made inside.

        Nothing waits for the device. A gradient that isn't finite makes one that isn't.
        """
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        weights = [parameter.detach() for parameter in trained]
        touched = [*weights, *self.statistics]
        before = [tensor.clone() for tensor in touched]
        if trained:
            torch._foreach_add_(weights, self._way(trained))
        for parameter in trained:
            parameter.grad = None
        try:
            yield
        finally:
            if touched:
                torch._foreach_copy_(touched, before)

    @torch.no_grad()
    def _way(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        way = [parameter.grad for parameter in parameters if parameter.grad is not None]
        weights: list[Tensor] = list(parameters)
        if self.config.adaptive:
            way = list(torch._foreach_mul(way, weights))
        scale = self.config.rho / (total_norm(way) + EPS)
        if self.config.adaptive:
            way = list(torch._foreach_mul(way, weights))
        return list(torch._foreach_mul(way, scale))
