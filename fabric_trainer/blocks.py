"""The repeated parts of a network: what is sharded, recomputed or compiled one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_trainer.errors import InputError


def find_blocks(network: nn.Module, wanted: list[str] | int, key: str) -> list[nn.Module]:
    """Modules of these classes, or with at least that many parameters of their own; inner ones first.

    Raises InputError, naming ``key`` and the classes that there are, where a class has no module.
    """
    inner_first = [module for module in reversed(list(network.modules())) if module is not network]
    if isinstance(wanted, int):
        return _by_size(inner_first, wanted)
    classes = {type(module).__name__ for module in inner_first}
    for name in wanted:
        if name not in classes:
            raise InputError(f"{key}: the network has no {name}; it has {', '.join(sorted(classes))}")
    return [module for module in inner_first if type(module).__name__ in wanted]


def recompute_blocks(network: nn.Module, classes: list[str]) -> None:
    """Activation checkpointing (Chen et al., arXiv 1604.06174): the blocks' activations are computed again in the
    backward instead of kept, with the same dropout. Parameter names stay as they are."""
    for block in find_blocks(network, classes, "fabric.activation_checkpointing"):
        block.forward = MethodType(_recomputed(unbound(block)), block)


def unbound(module: nn.Module) -> Callable[..., Any]:
    """The module's forward as a function of the module and its inputs: the same for all modules of a class, unless a
    module has a forward of its own."""
    forward: Any = module.forward
    if getattr(forward, "__self__", None) is module:
        return forward.__func__  # type: ignore[no-any-return]
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


@cache
def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One for all modules of a class, so that ``torch.compile`` makes one graph for them."""

    def recomputed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)

    return recomputed


def _by_size(inner_first: list[nn.Module], least: int) -> list[nn.Module]:
    taken: set[int] = set()
    blocks = []
    for module in inner_first:
        own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        if sum(parameter.numel() for parameter in own) >= least:
            taken.update(map(id, own))
            blocks.append(module)
    return blocks
