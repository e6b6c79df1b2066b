"""What frozen units would learn: their gradients on a few batches, measured without a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from fabric_trainer.freeze_plans import Reading
from fabric_trainer.portable import whole
from fabric_trainer.random import mixed, seed_torch
from fabric_trainer.state import State
from fabric_trainer.task import Batch
from fabric_trainer.window import to_device, windows

_PROBE = 0x70726F62  # keeps the probe's random numbers apart from training's


def probe(state: State, epoch: int, count: int) -> list[dict[str, Reading]]:
    """The readings of every frozen unit on the first micro-batches of the epoch's first ``count`` windows.

    The gradient is that of the mean loss over all ranks' micro-batches, with every BatchNorm in eval mode. Weights,
    statistics, ``.grad`` and the random streams are as before afterwards. All ranks together; to be called between
    two updates.
    """
    order, freezer = state.order, state.freezer
    frozen = {unit: part for unit, part in freezer.parts.items() if unit in freezer.frozen}
    first = order.first_window(epoch)
    numbers = range(first, min(first + count, order.first_window(epoch + 1)))
    readings = []
    with _untouched(state):
        for window in windows(state.task, state.train_set, order, state.config.seed, numbers):
            seed_torch(state.fabric.device, mixed(_PROBE, state.config.seed), window.span.window, state.ranks.rank)
            batch = to_device(window.micro_batches[0], state.fabric.device)
            outputs = _Outputs(state.module, {unit: part.places for unit, part in frozen.items()})
            with outputs:
                gradients = _gradients(state, batch, freezer.names)
            spreads = outputs.spreads(state)
            readings.append(
                {
                    unit: _reading([gradients[name] for name in part.names], spreads[unit])
                    for unit, part in frozen.items()
                }
            )
    return readings


def _gradients(state: State, batch: Batch, names: list[str]) -> dict[str, Tensor]:
    """By name, whole, on every rank; zeros where the loss does not depend on it."""
    fabric, ranks = state.fabric, state.ranks
    weight = ranks.sum(torch.as_tensor(state.task.weight(batch), dtype=torch.float64, device=fabric.device).clone())
    parameters = dict(state.module.named_parameters())
    wanted = [parameters[name] for name in names]
    if isinstance(fabric.strategy, ModelParallelStrategy):  # whose hooks put gradients together on their way
        total = state.task.loss(state.network, batch).total
        fabric.backward(total * (ranks.size / weight).to(total.dtype), model=state.network)
        found = {name: p.grad for name, p in zip(names, wanted, strict=True)}
        state.engine.drop_gradients()
        return {name: torch.zeros_like(whole(parameters[name])) if g is None else whole(g) for name, g in found.items()}
    network = _Bare(state.module, fabric.strategy)
    total = state.task.loss(network, batch).total / weight.clamp(min=1e-30)
    made = torch.autograd.grad(total, wanted, allow_unused=True)
    return {
        name: ranks.sum(torch.zeros_like(parameter) if g is None else g.contiguous())
        for name, parameter, g in zip(names, wanted, made, strict=True)
    }


class _Bare(_FabricModule):
    """The network in the strategy's precision, without DDP or DeepSpeed around it."""

    def _register_backward_hook(self, tensor: Tensor) -> Tensor:
        return tensor  # Fabric's would insist on fabric.backward


def _reading(gradients: list[Tensor], activation: float) -> Reading:
    rows = torch.stack(
        [
            torch.stack([g.abs().mean(), g.var(correction=0), g.sign().mean().sign()])
            for g in (gradient.float() for gradient in gradients)
        ]
    ).tolist()
    means, variances, signs = zip(*rows, strict=True)
    return Reading(means, variances, tuple(int(sign) for sign in signs), activation)


@contextmanager
def _untouched(state: State) -> Iterator[None]:
    """Inside, all units require gradients and no BatchNorm moves; afterwards all is as before."""
    module, device = state.module, state.fabric.device
    streams = random.getstate(), np.random.get_state()
    modes = [(m, m.training) for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    flags = dict(module.named_parameters())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), state.compilation.paused():
            for name in state.freezer.names:
                flags[name].requires_grad_(True)
            for norm, _ in modes:
                norm.eval()
            yield
    finally:
        for parameter in module.parameters():
            parameter.grad = None
        for norm, training in modes:
            norm.training = training
        state.freezer.apply(module)
        state.engine.refresh()
        random.setstate(streams[0])
        np.random.set_state(streams[1])


class _Outputs:
    """The standard deviation of each unit's output: of its last module's, 0 for a unit of bare parameters."""

    def __init__(self, network: nn.Module, places: dict[str, tuple[str, ...]]) -> None:
        modules = dict(network.named_modules())
        own = {unit: [modules[place] for place in where if place in modules] for unit, where in places.items()}
        self.last = {unit: found[-1] for unit, found in own.items() if found}
        self.units, self.found = list(places), dict[str, Tensor]()

    def __enter__(self) -> None:
        self.handles = [
            module.register_forward_hook(lambda _, __, output, unit=unit: self._take(unit, output))
            for unit, module in self.last.items()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _take(self, unit: str, output: Any) -> None:
        first = next((item for item in output if isinstance(item, Tensor)), None) if _is_several(output) else output
        if isinstance(first, Tensor) and first.is_floating_point():
            self.found[unit] = whole(first.detach()).float().std(correction=0)

    def spreads(self, state: State) -> dict[str, float]:
        """The mean over ranks, by unit."""
        zero = torch.zeros((), device=state.fabric.device)
        own = torch.stack([self.found.get(unit, zero) for unit in self.units])
        return dict(zip(self.units, (state.ranks.sum(own) / state.ranks.size).tolist(), strict=True))


def _is_several(value: Any) -> bool:
    return isinstance(value, (tuple, list))
