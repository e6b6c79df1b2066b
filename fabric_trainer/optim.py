"""Optimizers by name or import path, and the parameter groups they get."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_trainer.config import OptimConfig
from fabric_trainer.errors import InputError
from fabric_trainer.imports import import_path
from fabric_trainer.muon import Muon
from fabric_trainer.several import HYBRID, Portion, Several, portions

if TYPE_CHECKING:
    from fabric_trainer.freeze import Part

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_FUSED = ("cpu", "cuda", "xpu", "mps")  # devices on which torch's fused kernels run

# what the loop has no way to give; by the class's name, in lower case
_UNFIT = {
    "adahessian": "differentiates the gradient, which the loop does not keep a graph for",
    "sparseadam": "takes sparse gradients alone, which are neither clipped nor exchanged between ranks",
    "lookahead": "goes around another optimizer: name that one, and set optim.lookahead",
    "swats": "changes its learning rate by itself, which is the schedule's",
}


def build_optimizer(
    network: nn.Module,
    config: OptimConfig,
    device_type: str,
    scaled: bool = False,
    parts: Mapping[str, Part] = MappingProxyType({}),
    blocks: Iterable[nn.Module] = (),
) -> Optimizer:
    """The optimizer of the network's trainable parameters. Raises InputError for a wrong name or argument.

    device_type: where the weights will be; torch's fused kernels are used where they run there. scaled: the run has
    an fp16 loss scaler, which can't unscale for clipping when the kernel unscales by itself, so then none is used.
    parts: the freeze units, which have groups of their own.
    blocks: the network's repeated parts, whose matrices are the hidden ones of ``muon_hybrid``.
    """
    thawed = {name for part in parts.values() for name in part.names}
    trained = [n for n, parameter in network.named_parameters() if parameter.requires_grad or n in thawed]
    made = [
        _build(network, portion, device_type, scaled, _at_rate(parts, portion.config.lr, config.lr))
        for portion in portions(network, config, trained, blocks)
    ]
    return made[0] if len(made) == 1 else Several(made)


def _at_rate(parts: Mapping[str, Part], lr: float, main: float) -> Mapping[str, Part]:
    """The freeze units' rates, which are relative to the main optimizer's, for one with a rate of its own."""
    if lr == main or not main:
        return parts
    return {unit: replace(part, lr=part.lr * lr / main) for unit, part in parts.items()}


def _build(
    network: nn.Module, portion: Portion, device_type: str, scaled: bool, parts: Mapping[str, Part]
) -> Optimizer:
    config = portion.config
    cls = optimizer_class(config.name)
    accepted = inspect.signature(cls).parameters
    if reason := _UNFIT.get(cls.__name__.lower()):
        raise InputError(f"optim.name: {cls.__name__} {reason}")
    if own := sorted({"lr", "weight_decay"} & set(config.args)):
        raise InputError(f"optim.args: give {own[0]} as optim.{own[0]}")
    arguments: dict[str, Any] = {"lr": config.lr, **config.args}
    if unknown := sorted(set(arguments) - set(accepted)):
        known = ", ".join(name for name in accepted if name != "params")
        raise InputError(f"optim.args: {cls.__name__} takes no {', '.join(unknown)}; it takes {known}")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"optim.name: {cls.__name__} needs a closure that runs the loss again; take another")
    groups = [part for group in parameter_groups(network, config, parts, portion.names) for part in _by_mesh(group)]
    for group in groups:
        group["name"] = _labelled(portion.label, group["name"])
    if not {"fused", "foreach"} & set(arguments):
        if "fused" in accepted and device_type in _FUSED and not scaled and _fusible(cls, groups):
            arguments["fused"] = True
        elif "foreach" in accepted and device_type == "cuda":
            arguments["foreach"] = True
    try:
        return cls(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optim: {cls.__name__} refuses its arguments: {error}") from None


def _labelled(label: str, group: str) -> str:
    """muon, sgd/decay, sgd/no_decay; the main optimizer's groups keep their names."""
    return group if not label else label if group == "all" else f"{label}/{group}"


def optimizer_class(name: str) -> type[Optimizer]:
    """``adamw`` or ``Lamb`` by name, in any case, from torch.optim or torch_optimizer; ``my.module.Class`` by path."""
    if "." in name:
        cls = import_path(name, "optim.name")
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise InputError(f"optim.name: {name} is not a torch.optim.Optimizer")
        return Muon if cls is torch.optim.Muon else cls
    found = _classes(torch.optim) | {"muon": Muon}
    if name.lower() not in found:
        found = _classes(_torch_optimizer(name)) | found
    if name.lower() not in found:
        near = difflib.get_close_matches(name.lower(), found, n=3) or sorted(found)
        raise InputError(f"optim.name: there is no {name}; did you mean {', '.join(near)}?")
    return found[name.lower()]


def optimizer_classes(config: OptimConfig) -> list[type[Optimizer]]:
    """All that ``optim`` names, the main one first. Raises InputError for a name that there isn't."""
    main = "adamw" if config.name.lower() == HYBRID else config.name
    return [optimizer_class(name) for name in (main, *(other.name for other in config.others))]


def parameter_groups(
    network: nn.Module,
    config: OptimConfig,
    parts: Mapping[str, Part] = MappingProxyType({}),
    names: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """``decay`` and ``no_decay`` (norms by module type, biases, other vectors), or ``all`` where there is one kind;
    of each freeze unit ``<unit>/decay`` and so on, with the unit's own peak rate.

    Only parameters that require a gradient now, or will when their unit is unfrozen: the groups are fixed for the
    whole run. names: those of one of several optimizers.
    """
    owners = {name: unit for unit, part in parts.items() for name in part.names}
    own: dict[str | None, dict[str, nn.Parameter]] = {}
    wanted = None if names is None else set(names)
    for name, parameter in network.named_parameters():
        if (parameter.requires_grad or name in owners) and (wanted is None or name in wanted):
            own.setdefault(owners.get(name), {})[name] = parameter
    if not own:
        raise InputError("the network has no parameter that requires a gradient: there is nothing to train")
    in_norms = {id(p) for module in network.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    groups = []
    for unit in sorted(own, key=[None, *parts].index):
        for group in _by_decay(own[unit], in_norms, config):
            if unit is not None:
                group |= {"name": f"{unit}/{group['name']}", "unit": unit, "lr": parts[unit].lr}
            groups.append(group)
    return groups


def _by_decay(named: dict[str, nn.Parameter], in_norms: set[int], config: OptimConfig) -> list[dict[str, Any]]:
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named.items():
        bare = id(parameter) in in_norms or name.rpartition(".")[2] == "bias" or parameter.ndim < 2
        (rest if bare else decay).append(parameter)
    if config.weight_decay == 0 or config.decay_everything or not decay or not rest:
        weight_decay = config.weight_decay if decay or config.decay_everything else 0.0
        return [{"name": "all", "params": list(named.values()), **_decay(config, weight_decay)}]
    return [
        {"name": "decay", "params": decay, **_decay(config, config.weight_decay)},
        {"name": "no_decay", "params": rest, **_decay(config, 0.0)},
    ]


def _by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """One group for each device mesh that its parameters are sharded over: a fused kernel can't take them mixed."""
    parts: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return [group | {"params": part} for part in parts.values()]


def _decay(config: OptimConfig, value: float) -> dict[str, float]:
    accepted = inspect.signature(optimizer_class(config.name)).parameters
    if "weight_decay" in accepted:
        return {"weight_decay": value}
    if config.weight_decay:
        raise InputError(f"optim.weight_decay: {config.name} has none; leave it at 0")
    return {}


def _classes(module: ModuleType) -> dict[str, type[Optimizer]]:
    return {
        name.lower(): cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


def _torch_optimizer(name: str) -> ModuleType:
    try:
        return importlib.import_module("torch_optimizer")
    except ImportError:
        near = difflib.get_close_matches(name.lower(), _classes(torch.optim), n=3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise InputError(
            f"optim.name: torch.optim has no {name}{hint}; for those of torch-optimizer: pip install torch-optimizer"
        ) from None


def _fusible(cls: type[Optimizer], groups: list[dict[str, Any]]) -> bool:
    """Whether the fused kernel takes these parameters: floating ones; in shards (DTensor) Adam's and AdamW's alone."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    in_shards = any(isinstance(parameter, DTensor) for parameter in parameters)
    known = not in_shards or cls in (torch.optim.Adam, torch.optim.AdamW)
    return known and all(torch.is_floating_point(parameter) for parameter in parameters)
