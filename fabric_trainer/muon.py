"""Muon for matrices that may lie in shards.

Written against torch 2.9 to 2.15: the iteration and the convention of the rate are torch.optim.Muon's own functions,
which are private there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from fabric_trainer.portable import like, local

Orthogonalise = Callable[[Tensor], Tensor]


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al., kellerjordan.github.io/posts/muon), bit for bit, and the same update under
    FSDP2 and tensor parallelism: momentum and decay stay on the shards, Newton-Schulz sees whole matrices.

    The iteration computes in bfloat16 whatever the weights are: it needs a direction, not its digits.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            function = partial(
                _zeropower_via_newtonschulz,
                ns_coefficients=group["ns_coefficients"],
                ns_steps=group["ns_steps"],
                eps=group["eps"],
            )
            averaged = [self._average(parameter, group) for parameter in trained]
            for parameter, direction in zip(trained, orthogonal(averaged, function), strict=True):
                weight, rate = local(parameter), float(group["lr"])
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(direction, alpha=-_adjust_lr(rate, group["adjust_lr_fn"], parameter.shape))

    def _average(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient's running mean, with the gradient itself once more under Nesterov; laid out like it."""
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)  # type: ignore[arg-type]
        mean = state["momentum_buffer"]
        local(mean).lerp_(local(gradient), 1 - group["momentum"])  # type: ignore[arg-type]
        if not group["nesterov"]:
            return mean  # type: ignore[no-any-return]
        ahead = like(gradient)  # type: ignore[arg-type]
        local(ahead).lerp_(local(mean), group["momentum"])
        return ahead  # type: ignore[return-value]


def orthogonal(matrices: list[Tensor], function: Orthogonalise) -> Iterator[Tensor]:
    """``function`` of each whole matrix, of which this rank gets its part. All shards are of one mesh."""
    if not matrices or not isinstance(matrices[0], DTensor):
        yield from map(function, matrices)
        return
    ranks = matrices[0].device_mesh.mesh.flatten().tolist()
    for start in range(0, len(matrices), len(ranks)):
        yield from _shared_out(matrices[start : start + len(ranks)], ranks, function)  # type: ignore[arg-type]


def _shared_out(matrices: list[DTensor], ranks: list[int], function: Orthogonalise) -> Iterator[Tensor]:
    """At most one matrix for each rank: all are gathered, every rank does its own, and gives the parts back."""
    own, result = ranks.index(torch.distributed.get_rank()), None
    for place, matrix in enumerate(matrices):
        gathered = matrix.full_tensor()
        if place == own:
            result = function(gathered)
    for place, matrix in enumerate(matrices):
        mesh = matrix.device_mesh
        # the owner's, and nothing from the others: their sum, scattered, is everybody's part
        addend = result if place == own else torch.zeros(matrix.shape, dtype=torch.bfloat16, device=matrix.device)
        summed = DTensor.from_local(addend, mesh, [Partial()] * mesh.ndim, run_check=False)  # type: ignore[arg-type]
        yield summed.redistribute(placements=matrix.placements).to_local()
