"""Weights in fewer bits: what a file keeps of them, and the weights that are computed with.

``fp16``: every floating parameter in half precision. ``int8``: the matrices of linear layers as whole numbers from
-127 to 127 and a scale per row, w = q * scale with scale = max |w| / 127. Only storage is small: what is restored is
float32, and so is every product. Buffers, and what is no matrix of a linear layer, stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fabric_trainer.errors import InputError

SCALE = "_scale"  # beside "up.weight", int8 (rows, columns), lies "up.weight_scale", float32 (rows, 1)


def quantize(network: nn.Module, state: dict[str, Any], how: str) -> dict[str, Any]:
    """What to keep of ``state``, the network's state dict: ``how`` is int8 or fp16. Names that share a tensor share it
    afterwards. Raises InputError where there is nothing to quantize, or a weight is too large."""
    chosen = matrices(network) if how == "int8" else floating(network)
    if not chosen:
        raise InputError(f"--quantize {how}: the network has no {'linear layer' if how == 'int8' else 'parameter'}")
    stored: dict[str, Any] = {}
    made: dict[int, tuple[Tensor, Tensor | None]] = {}
    for name, value in state.items():
        if name not in chosen:
            stored[name] = value
            continue
        if id(value) not in made:
            made[id(value)] = to_int8(value) if how == "int8" else (value.half(), None)
        stored[name], scale = made[id(value)]
        if scale is not None:
            stored[name + SCALE] = scale
        if not stored[name].isfinite().all():
            raise InputError(f"--quantize {how}: {name} has a weight of {value.abs().max():.3g}, fp16 ends at 65504")
    return stored


def restore(stored: dict[str, Any]) -> dict[str, Any]:
    """The state dict that the network takes, from what ``quantize`` kept."""
    scales = {name + SCALE for name, value in stored.items() if isinstance(value, Tensor) and value.dtype == torch.int8}
    return {
        name: restored(value, stored.get(name + SCALE)) if isinstance(value, Tensor) else value
        for name, value in stored.items()
        if name not in scales
    }


def restored(value: Tensor, scale: Tensor | None) -> Tensor:
    """A tensor as it is computed with."""
    if value.dtype == torch.int8 and scale is not None:
        return value.float() * scale
    return value.float() if value.dtype == torch.float16 else value


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> int8 (rows, columns) and float32 (rows, 1); no weight moves by more than half its scale."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale.where(scale > 0, 1)).round().to(torch.int8), scale


def matrices(network: nn.Module) -> set[str]:
    """The names of the weights of linear layers, and of what else is the same parameter."""
    modules = list(network.modules())
    found = [module.weight for module in modules if isinstance(module, nn.Linear)]
    found += [module.in_proj_weight for module in modules if isinstance(module, nn.MultiheadAttention)]
    ids = {id(weight) for weight in found if isinstance(weight, nn.Parameter)}
    return {name for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in ids}


def floating(network: nn.Module) -> set[str]:
    """The names of the floating parameters."""
    parameters = network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.is_floating_point()}


class Restoring(nn.Module):
    """The network as a graph has to see it: every forward makes its weights of the stored ones."""

    def __init__(self, network: nn.Module, stored: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.names = copy.deepcopy(network), []
        for name, parameter in self.network.named_parameters():
            if stored[name].dtype != parameter.dtype:
                self.names.append(name)
                self.register_buffer(f"stored_{len(self.names)}", stored[name])
                if name + SCALE in stored:
                    self.register_buffer(f"scale_{len(self.names)}", stored[name + SCALE])
                parameter.data = torch.empty(0)  # never read

        def forward(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.network, self.weights(), args, kwargs)

        forward.__signature__ = inspect.signature(network.forward)  # a graph's inputs have its names
        self.forward = forward

    def weights(self) -> dict[str, Tensor]:
        return {
            name: restored(getattr(self, f"stored_{i}"), getattr(self, f"scale_{i}", None))
            for i, name in enumerate(self.names, 1)
        }
