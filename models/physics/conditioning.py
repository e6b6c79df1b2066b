"""Test-time conditioning: of several candidate next states, the one that keeps best what the physics keeps.

Around each prediction of the operator lie candidates: the corrector's drifts at other taus, and noise. Each is decoded
and scored by how far mass, momentum and energy have moved from the start state's; a beam search looks ``horizon``
steps ahead. The Universal Physics Stack (UPS), whose method this is, reports no gain from it.

What differs from the UPS: a sample's candidates are scored by that sample alone (there by the mean over the batch it
came in: ``scoring: batch``); the first candidate is the plain prediction; states that were not looked ahead from are
never compared with ones that were (there they lack the next steps' penalties, and so win); changes are from the start
state, not from the candidate before; and the decoder is the one that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom
from models.physics.losses import wide

KEY = "task.args.ttc"
CHANNELS = {  # of the tasks whose channels have names of their own
    "reaction_diffusion2d": ("u", "v"),
    "shallow_water2d": ("h",),
    "cfd1d_shocktube": ("density", "pressure", "Vx"),
    "compressible_ns1d": ("density", "pressure", "Vx"),
    "cfd2d_rand": ("density", "pressure", "Vx", "Vy"),
    "cfd2d_turb": ("density", "pressure", "Vx", "Vy"),
}
_NOT_HERE = {
    "residual_threshold": "nothing read it in the original either; leave it out",
    "critic": "there is no learned critic; leave it out",
    "grid": "fields are decoded on the grid of the data; leave it out",
    "decoder": "the system's own decoder is used (task.args.decoder); leave it out",
    "analytical_weight": "a factor of the only reward changes nothing; leave it out",
}


# ---- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Of the changes of mass, momentum and energy, and of negative values of the mass field."""

    mass: float = 1.0
    momentum: float = 0.0
    energy: float = 0.0
    penalty_negative: float = 0.0


@dataclass(frozen=True)
class Reward:
    """mass_field, momentum_field, energy_field: channels, by name or number. Without an energy_field the energy is
    half the square of all channels. energy: which change of it counts, any ``change`` or ``growth`` alone, for
    equations that dissipate."""

    mass_field: str | int | None = None
    momentum_field: tuple[str | int, ...] = ()
    energy_field: str | int | None = None
    energy: str = "change"
    weights: Weights = field(default_factory=Weights)


@dataclass(frozen=True)
class Sampler:
    """tau_range: of the corrector's taus, uniform. noise_std: of the noise, or
    noise_schedule: of each step, the last one from there on. noise_unit: ``latent_change``, the RMS change of latents
    in one step of the task, or ``absolute``, as in the UPS."""

    tau_range: tuple[float, float] = (0.3, 0.7)
    noise_std: float = 0.0
    noise_schedule: tuple[float, ...] = ()
    noise_unit: str = "latent_change"

    def noise(self, moment: int) -> float:
        """The noise of the step number ``moment``."""
        return self.noise_schedule[min(moment, len(self.noise_schedule) - 1)] if self.noise_schedule else self.noise_std


@dataclass(frozen=True)
class Settings:
    """``task.args.ttc``. steps: of time that are conditioned, one after the other. candidates: of each prediction.
    beam_width: sequences that are kept at each step of ``horizon`` steps ahead; with one there is no looking ahead.
    gamma: discount of a step. max_evaluations: candidates of a sample that are decoded in all; what is left over goes
    on as plain steps. scoring: ``sample``, or ``batch``: all samples of a batch take the candidate that is best in
    their mean, which depends on how batches are cut."""

    steps: int = 1
    candidates: int = 4
    beam_width: int = 1
    horizon: int = 1
    gamma: float = 1.0
    max_evaluations: int | None = None
    scoring: str = "sample"
    sampler: Sampler = field(default_factory=Sampler)
    reward: Reward = field(default_factory=Reward)


def settings(given: Mapping[str, Any]) -> Settings:
    """The settings of a mapping as YAML has it. InputError names the key that is unknown or wrong."""
    made: Settings = _made(Settings, given, KEY)
    sampler, reward = made.sampler, made.reward
    for name in ("steps", "candidates", "beam_width", "horizon"):
        _whole(f"{KEY}.{name}", getattr(made, name))
    if made.max_evaluations is not None:
        _whole(f"{KEY}.max_evaluations", made.max_evaluations)
    _number(f"{KEY}.gamma", made.gamma, "above 0 and at most 1", lambda x: 0 < x <= 1)
    _choice(f"{KEY}.scoring", made.scoring, "sample", "batch")
    _choice(f"{KEY}.sampler.noise_unit", sampler.noise_unit, "latent_change", "absolute")
    _choice(f"{KEY}.reward.energy", reward.energy, "change", "growth")
    for name, noise in [("noise_std", sampler.noise_std), *(("noise_schedule", x) for x in sampler.noise_schedule)]:
        _number(f"{KEY}.sampler.{name}", noise, "at least 0", lambda x: x >= 0)
    for tau in sampler.tau_range:
        _number(f"{KEY}.sampler.tau_range", tau, "within 0 and 1", lambda x: 0 <= x <= 1)
    if len(sampler.tau_range) != 2 or sampler.tau_range[0] > sampler.tau_range[1]:
        raise InputError(f"{KEY}.sampler.tau_range: {list(sampler.tau_range)} is no [low, high] within 0 and 1")
    weights = {each.name: getattr(reward.weights, each.name) for each in fields(Weights)}
    for name, weight in weights.items():
        _number(f"{KEY}.reward.weights.{name}", weight, "at least 0", lambda x: x >= 0)
    if not any(weights.values()):
        raise InputError(f"{KEY}.reward.weights: all are 0: no candidate is better than another")
    for name, where in (("mass", "mass_field"), ("penalty_negative", "mass_field"), ("momentum", "momentum_field")):
        if weights[name] and getattr(reward, where) in (None, ()):
            raise InputError(
                f"{KEY}.reward.{where}: weights.{name} {weights[name]} needs it: a channel's name or number"
            )
    return made


def channel_names(task: str, channels: int) -> list[str]:
    """What a task's channels are called; ``u`` where there is one, numbers where nothing is known of them."""
    known = CHANNELS.get(task, ("u",))
    return list(known) if len(known) == channels else [str(number) for number in range(channels)]


# ---- reward -------------------------------------------------------------------------------------------------------


class Scored:
    """The reward of fields on a task's grid.

    channels: their names, in order. task: for messages. InputError for a field that the task hasn't.
    """

    def __init__(self, reward: Reward, channels: Sequence[str], task: str = "the data") -> None:
        def place(key: str, wanted: str | int) -> int:
            names = list(channels)
            if str(wanted) in names:
                return names.index(str(wanted))
            if str(wanted).isdigit() and int(wanted) < len(names):
                return int(wanted)
            there = ", ".join(f"{name} ({number})" for number, name in enumerate(names))
            raise InputError(f"{KEY}.reward.{key}: {wanted!r} is no channel of {task}; there is {there}")

        self.weights, self.growth = reward.weights, reward.energy == "growth"
        self.mass = 0 if reward.mass_field is None else place("mass_field", reward.mass_field)
        self.energy = None if reward.energy_field is None else place("energy_field", reward.energy_field)
        self.momentum = [place("momentum_field", name) for name in reward.momentum_field]

    def __call__(self, start: Tensor, now: Tensor) -> Tensor:
        """-(w_mass |dM| + w_momentum mean |dP| + w_energy |dE| + w_negative N): (B, C, H, W) twice -> (B,), float32 at
        least. M, P and E are integrals over the unit domain, that is, means over the points (the UPS has sums over a
        grid of its own); N is the integral of the mass field's negative part."""
        weights, start, now = self.weights, wide(start), wide(now)
        penalty = torch.zeros_like(now[:, 0, 0, 0])
        if weights.mass:
            penalty = penalty + weights.mass * _integral(now[:, self.mass] - start[:, self.mass]).abs()
        if weights.momentum:
            changes = [_integral(now[:, place] - start[:, place]).abs() for place in self.momentum]
            penalty = penalty + weights.momentum * torch.stack(changes).mean(0)
        if weights.energy:
            before, after = self._energy(start), self._energy(now)
            change = _integral(after - before)
            penalty = penalty + weights.energy * (change.relu() if self.growth else change.abs())
        if weights.penalty_negative:
            penalty = penalty + weights.penalty_negative * _integral((-now[:, self.mass]).relu())
        return -penalty

    def _energy(self, u: Tensor) -> Tensor:
        return u.pow(2).sum(1) / 2 if self.energy is None else u[:, self.energy]


# ---- search -------------------------------------------------------------------------------------------------------


class Conditioned(NamedTuple):
    """z, plain: (B, steps, ...), the states after each step, and those of plain steps. reward, reward_plain: (B,),
    the mean of their rewards. evaluations: candidates that were decoded for each sample."""

    z: Tensor
    plain: Tensor
    reward: Tensor
    reward_plain: Tensor
    evaluations: int


@dataclass(frozen=True)
class Search:
    """The beam search of a batch of one task.

    step: states (B, ...) -> the predicted next ones. decode: states -> fields (B, C, H, W); always of all rows in
    their order, so that it may hold on to the fields that they started from. correct: a prediction and taus (B,) ->
    the drift to add; tau: of the plain prediction's. unit: of the noise, with ``noise_unit: latent_change``. random:
    the samples'. weight: (B,), 0 for rows that pad; asked for by ``scoring: batch`` alone.

    What is drawn depends on the sample, the step and the candidate's number: not on the sequence that leads there, so
    that the candidates a search looks ahead to are those of the next step.
    """

    settings: Settings
    score: Scored
    step: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    random: SampleRandom
    correct: Callable[[Tensor, Tensor], Tensor] | None = None
    tau: float = 0.5
    unit: Tensor | float = 1.0
    weight: Tensor | None = None

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Conditioned:
        """z: (B, ...), the states to start from."""
        start, plain, evaluations = self.decode(z), z, 0
        states, plain_states = [], []
        for moment in range(self.settings.steps):
            z, spent = self._next(z, start, moment, evaluations)
            plain = self.candidate(self.step(plain), moment, 0)
            evaluations += spent
            states.append(z)
            plain_states.append(plain)
        rewards = [torch.stack([self.score(start, self.decode(z)) for z in each]) for each in (states, plain_states)]
        reward, reward_plain = (each.mean(0) for each in rewards)
        return Conditioned(torch.stack(states, 1), torch.stack(plain_states, 1), reward, reward_plain, evaluations)

    def candidate(self, predicted: Tensor, moment: int, number: int) -> Tensor:
        """One of the candidates around a prediction; number 0 is the plain one."""
        sampler, z = self.settings.sampler, predicted
        if self.correct is not None:
            low, high = sampler.tau_range
            taus = low + (high - low) * self.random.uniform(f"ttc tau {moment} {number}")
            z = z + self.correct(predicted, taus if number else torch.full_like(taus, self.tau))
        if number and (noise := sampler.noise(moment)):
            unit = self.unit if sampler.noise_unit == "latent_change" else 1.0
            z = z + noise * unit * self.random.normal(f"ttc noise {moment} {number}", *z.shape[1:]).to(z.dtype)
        return z

    def _next(self, z: Tensor, start: Tensor, moment: int, spent_before: int) -> tuple[Tensor, int]:
        """The state after one step, and how many candidates were decoded to choose it."""
        chosen, spent = self.settings, 0
        budget = math.inf if chosen.max_evaluations is None else chosen.max_evaluations - spent_before
        beams, totals, first = z[:, None], wide(z.new_zeros(len(z), 1)), None
        for depth in range(chosen.horizon):
            width = beams.shape[1]
            count = int(min(chosen.candidates, (budget - spent) // width))
            if count < 1 or (count if depth == 0 else width) == 1:  # nothing to choose from
                break
            predicted = [self.step(parent) for parent in beams.unbind(1)]
            states = [self.candidate(each, moment + depth, number) for each in predicted for number in range(count)]
            rewards = torch.stack([self.score(start, self.decode(state)) for state in states], 1)
            spent += len(states)
            totals = self._shared(totals.repeat_interleave(count, 1) + chosen.gamma**depth * rewards)
            first = torch.stack(states, 1) if first is None else first.repeat_interleave(count, 1)
            order = totals.sort(dim=1, descending=True, stable=True).indices  # of equals the first, so the plain one
            best = order[:, : chosen.beam_width]
            rows = torch.arange(len(z), device=z.device)[:, None]
            beams, totals, first = torch.stack(states, 1)[rows, best], totals[rows, best], first[rows, best]
        return (self.candidate(self.step(z), moment, 0) if first is None else first[:, 0]), spent

    def _shared(self, totals: Tensor) -> Tensor:
        """Totals (B, n) to choose by: their own of every row, or the batch's mean; the worst of all where a candidate
        isn't finite."""
        if self.settings.scoring == "batch":
            weight = torch.ones_like(totals[:, 0]) if self.weight is None else self.weight
            counted = torch.where(weight[:, None] > 0, totals * weight[:, None], 0.0)
            totals = (counted.sum(0) / weight.sum()).expand_as(totals)
        return totals.nan_to_num(nan=-math.inf)


# ---- parts --------------------------------------------------------------------------------------------------------


def _integral(x: Tensor) -> Tensor:
    """Over the unit domain: (B, H, W) -> (B,)."""
    return x.flatten(1).mean(1)


def _made(kind: type[Any], given: Any, key: str) -> Any:
    """A dataclass of a mapping, and of those in it; lists become tuples."""
    known = {each.name: getattr(kind(), each.name) for each in fields(kind)}
    if not isinstance(given, Mapping):
        raise InputError(f"{key}: {given!r} is no mapping of {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{key}.{name}: {_NOT_HERE.get(name) or 'no such key, only ' + ', '.join(known)}")
        if is_dataclass(known[name]):
            value = _made(type(known[name]), value, f"{key}.{name}")
        elif isinstance(known[name], tuple):
            value = tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
        values[name] = value
    return kind(**values)


def _whole(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{key}: {value!r} is no whole number of at least 1")


def _number(key: str, value: Any, right: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not fits(value):
        raise InputError(f"{key}: {value!r} is no number {right}")


def _choice(key: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise InputError(f"{key}: {value!r} is none of {', '.join(choices)}")
