"""Which of a network's parameters stand still, and when that changes.

A *unit* is what is frozen and unfrozen as one; ``freeze_plans.py`` decides which and when, this applies it. What is
in no unit (the head) always trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fabric_trainer.config import FreezeConfig
from fabric_trainer.errors import InputError
from fabric_trainer.freeze_plans import Schedule, Unit, make_plan

Patterns = Sequence[str] | Mapping[str, Sequence[str]]
_NORMS = nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Part:
    """A unit in the network. places: modules (or parameters) that it consists of; names: its parameters'."""

    places: tuple[str, ...]
    names: tuple[str, ...]
    lr: float  # peak learning rate

    def has(self, name: str) -> bool:
        """Whether the module or parameter of that name belongs to it."""
        return any(name == place or name.startswith(place + ".") for place in self.places)


class Freezer:
    """The units of a network, and which of them are frozen: by the plan's state, or by the step.

    network: the bare one; parameters that it has frozen itself are never touched. wanted: the patterns that the task
    names, for a configuration without. Raises InputError for patterns that make no units.
    """

    def __init__(self, network: nn.Module, config: FreezeConfig, wanted: Patterns, lr: float) -> None:
        self.config = config
        patterns = wanted if config.units is None and config.strategy != "none" else config.units or []
        peak = lr if config.lr is None else config.lr
        self.parts = {
            unit: Part(places, names, peak * config.lr_decay**place)
            for place, (unit, (places, names)) in enumerate(find_units(network, patterns).items())
        }
        if config.strategy != "none" and not self.parts:
            raise InputError(f"freeze.strategy: {config.strategy} needs freeze.units: the task names none")
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        self.plan = make_plan(
            config,
            [
                Unit(unit, sum(sizes[name] for name in part.names), kind(network, part), depth(list(self.parts), unit))
                for unit, part in self.parts.items()
            ],
        )
        self.step = 0

    @property
    def names(self) -> list[str]:
        """The parameters of all units."""
        return [name for part in self.parts.values() for name in part.names]

    @property
    def frozen(self) -> frozenset[str]:
        """The units that are frozen now."""
        return self.plan.frozen_at(self.step) if isinstance(self.plan, Schedule) else self.plan.frozen

    @property
    def next_change(self) -> int | None:
        """The step at which a schedule changes next."""
        changes = self.plan.changes if isinstance(self.plan, Schedule) else ()
        return next((step for step in changes if step > self.step), None)

    def share(self, unit: str | None) -> float:
        """The factor on the unit's learning rate now: 1 for what is in no unit, 0 while it is frozen."""
        if unit is None:
            return 1.0
        return 0.0 if unit in self.frozen else self.plan.share(unit)

    def apply(self, network: nn.Module) -> None:
        """Frozen parameters require no gradient, and BatchNorm statistics in a frozen unit stand still."""
        frozen = self.frozen
        parameters = dict(network.named_parameters())
        for unit, part in self.parts.items():
            for name in part.names:
                parameters[name].requires_grad_(unit not in frozen)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError(f"freeze: nothing is left to train, all of {', '.join(frozen)} are frozen")
        self.set_modes(network)

    def set_modes(self, network: nn.Module) -> None:
        """BatchNorm of frozen units in eval mode; call after ``network.train()``."""
        frozen = [self.parts[unit] for unit in self.frozen]
        for name, module in network.named_modules():
            if isinstance(module, _NORMS):
                module.train(network.training and not any(part.has(name) for part in frozen))

    def count(self, network: nn.Module) -> str:
        """Units and parameters that train, in words."""
        sizes = {True: 0, False: 0}
        for leaf in network.parameters():
            sizes[leaf.requires_grad] += getattr(leaf, "ds_numel", leaf.numel())  # ZeRO-3's are in pieces
        names = ", ".join(unit for unit in self.parts if unit not in self.frozen) or "no unit"
        return f"{names} trained; {sizes[True]:,} of {sum(sizes.values()):,} parameters"

    def describe(self) -> str:
        """For the start-up summary."""
        names, frozen = list(self.parts), self.frozen
        some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return f"{self.config.strategy}, units {some}; frozen now: {len(frozen)} of {len(names)}"

    def state_dict(self) -> dict[str, Any]:
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None, step: int) -> None:
        """Continue. Raises InputError for the state of another strategy, or of other units."""
        self.step = step
        if state is not None:
            self.plan.load_state_dict(state)


def find_units(network: nn.Module, patterns: Patterns) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Unit -> (modules, parameters), in the order of unfreezing.

    ``backbone.layer*`` is compared part by part with the beginnings of the trainable parameters' names; in a list each
    module that it meets becomes a unit of its own, the last one first; {unit: [patterns]} makes one unit of all of
    them. Raises InputError for a pattern that meets nothing, and for a parameter in two units.
    """
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if isinstance(patterns, Mapping):
        grouped = {
            unit: tuple(place for pattern in several for place in places(pattern, names))
            for unit, several in patterns.items()
        }
    else:
        grouped = {place: (place,) for pattern in patterns for place in reversed(places(pattern, names))}
    made: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    owner: dict[str, str] = {}
    for unit, where in grouped.items():
        own = tuple(n for n in names if any(n == place or n.startswith(place + ".") for place in where))
        for name in own:
            if name in owner:
                raise InputError(f"freeze.units: {name} is in {owner[name]} and in {unit}")
            owner[name] = unit
        made[unit] = (where, own)
    return made


def places(pattern: str, names: Iterable[str]) -> list[str]:
    """The modules and parameters that the pattern meets, in the network's order."""
    wanted = pattern.split(".")
    starts = [name.split(".")[: len(wanted)] for name in names]
    found = [".".join(start) for start in starts if len(start) == len(wanted) and all(map(fnmatchcase, start, wanted))]
    if not found:
        first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
        raise InputError(f"freeze.units: {pattern} meets no trainable parameter; the network has {first}")
    return list(dict.fromkeys(found))


def kind(network: nn.Module, part: Part) -> str:
    """conv: convolutions and norms alone, such as a stem; sub_block: one of a numbered series; block: anything else."""
    modules = [network.get_submodule(place) for place in part.places if _is_module(network, place)]
    leaves = [leaf for module in modules for leaf in module.modules() if next(leaf.children(), None) is None]
    if any(isinstance(leaf, nn.modules.conv._ConvNd) for leaf in leaves) and len(leaves) <= 6:
        return "conv"
    return "sub_block" if all(place.rpartition(".")[2].isdigit() for place in part.places) else "block"


def depth(units: list[str], unit: str) -> float:
    """How near the output a unit is: those unfrozen last have 0; blocks of one parent are tenths apart."""
    parents = list(dict.fromkeys(_parent(name) for name in reversed(units)))
    number = unit.rpartition(".")[2]
    return parents.index(_parent(unit)) + (int(number) / 10 if number.isdigit() and "." in unit else 0.0)


def _parent(unit: str) -> str:
    head, _, last = unit.rpartition(".")
    return head if last.isdigit() and head else unit


def _is_module(network: nn.Module, name: str) -> bool:
    return any(name == own for own, _ in network.named_modules())
