"""What a freezing strategy is: units, what is measured of them, and a machine that advances once per epoch.

Pure Python, so that every strategy is tested without a network. ``freeze.py`` applies what a plan decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from fabric_trainer.errors import InputError


@dataclass(frozen=True)
class Unit:
    """What is frozen and unfrozen as one. Units are disjoint and given in the order of unfreezing.

    parameters: how many elements. kind: conv (a plain convolution, a stem), block, or sub_block (a part of one).
    depth: grows from the input to the head; blocks are 1 apart, sub-blocks of one block less.
    """

    name: str
    parameters: int
    kind: str = "block"
    depth: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Of one frozen unit on one probe batch; an entry per parameter tensor, always in the same order."""

    mean: tuple[float, ...]  # of |g|
    variance: tuple[float, ...]  # of g; of a single element 0
    sign: tuple[int, ...]  # of the mean of sign(g): -1, 0 or 1
    activation: float  # standard deviation of the unit's output


Probe = Sequence[Mapping[str, Reading]]  # unit -> its reading, for each probe batch in order


class Action(NamedTuple):
    """What is to be done before the next update."""

    unfreeze: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    restore: bool = False  # bring the weights of the best evaluation back
    notes: tuple[str, ...] = ()  # lines for the terminal


@dataclass(frozen=True)
class Warmup:
    """A unit just unfrozen: its learning rate rises from ``start`` to 1 over ``epochs``, ``done`` of which are past."""

    epochs: int
    start: float = 0.1
    exponential: bool = False
    done: int = 0

    @property
    def share(self) -> float:
        """start + (1 - start) p, or start^(1 - p), at the progress p = done / epochs."""
        progress = min(1.0, self.done / self.epochs)
        return self.start ** (1 - progress) if self.exponential else self.start + (1 - self.start) * progress


class Plan:
    """Everything frozen, for good: the strategy ``fixed``, and what the others share.

    A subclass says in ``decide`` what the end of an epoch does, and in ``carried`` which attributes (plain values) its
    state has beside these.
    """

    strategy = "fixed"
    follows_metric = False
    carried: tuple[str, ...] = ()

    def __init__(self, units: Iterable[Unit]) -> None:
        self.units = {unit.name: unit for unit in units}  # in the order of unfreezing
        self.unfrozen: list[str] = []  # in the order in which they were
        self.warmups: dict[str, Warmup] = {}
        self.epoch = -1  # the last one that is over

    @property
    def frozen(self) -> frozenset[str]:
        """The units that are frozen now."""
        return frozenset(self.units) - frozenset(self.unfrozen)

    @property
    def probes(self) -> int:
        """How many probe batches ``on_epoch`` wants next."""
        return 0

    def share(self, unit: str) -> float:
        """What the unit's learning rate is multiplied by now: 0 while it is frozen, less than 1 in its warm-up."""
        if unit in self.frozen:
            return 0.0
        return self.warmups[unit].share if unit in self.warmups else self.settled(unit)

    def settled(self, unit: str) -> float:
        """The share of an unfrozen unit after its warm-up."""
        return 1.0

    def on_epoch(self, metric: float | None, epoch: int, probe: Probe = ()) -> Action:
        """Advance over ``epoch``, counted from 0, which is just over: once for each, after its last evaluation.

        metric: of that evaluation, where higher is better; None where there was none. probe: readings of the frozen
        units. Raises ValueError for an epoch that was counted already.
        """
        if epoch <= self.epoch:
            raise ValueError(f"freezing advances once per epoch: epoch {epoch} comes after {self.epoch}")
        self.epoch = epoch
        return self.decide(metric, epoch, probe)

    def decide(self, metric: float | None, epoch: int, probe: Probe) -> Action:
        return Action()

    def release(self, names: Sequence[str], why: str) -> Action:
        """Unfreeze these."""
        self.unfrozen += names
        return Action(unfreeze=tuple(names), notes=tuple(f"{name} unfrozen ({why})" for name in names))

    def next_frozen(self, count: int) -> list[str]:
        """The next ``count`` in the order of unfreezing, or as many as there are."""
        frozen = self.frozen
        return [name for name in self.units if name in frozen][:count]

    def advance_warmups(self) -> None:
        """One more epoch of each is over; those that are complete end."""
        self.warmups = {
            name: replace(warmup, done=warmup.done + 1)
            for name, warmup in self.warmups.items()
            if warmup.done + 1 < warmup.epochs
        }

    # ---- checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        own = {name: deepcopy(getattr(self, name)) for name in self.carried}
        warmups = {name: asdict(warmup) for name, warmup in self.warmups.items()}
        common = {"strategy": self.strategy, "units": list(self.units), "epoch": self.epoch}
        return {**common, "unfrozen": list(self.unfrozen), "warmups": warmups, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InputError for the state of another strategy, or of other units."""
        if state["strategy"] != self.strategy:
            raise InputError(f"freeze.strategy is {self.strategy}, the checkpoint's run has {state['strategy']}")
        if state["units"] != list(self.units):
            raise InputError(
                f"freeze.units are {', '.join(self.units)}; the checkpoint's run has {', '.join(state['units'])}"
            )
        self.epoch, self.unfrozen = state["epoch"], list(state["unfrozen"])
        self.warmups = {name: Warmup(**warmup) for name, warmup in state["warmups"].items()}
        for name in self.carried:
            setattr(self, name, deepcopy(state[name]))
