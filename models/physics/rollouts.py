"""Long rollouts of a physics system, and what is measured along them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.pairs import States
from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch
from models.physics.losses import EPS, wide
from models.physics.system import PhysicsSystem

SPACES = ("latent", "field")
CORRELATED, ACCURATE = 0.8, 0.2  # a rollout is of use while its correlation is above, and its NRMSE below

Step = Callable[[Tensor], Tensor]


class Trajectories(Dataset[Batch]):
    """Stretches of ``steps`` steps of ``time_stride`` frames, as ``u`` (B, steps + 1, C, H, W), from every trajectory.

    steps: fewer where trajectories are shorter. starts: of one trajectory, spread evenly over the frames that leave
    room for all steps, the first frame first. A steady task's two frames are one step. Raises InputError where there
    is no room for a step.
    """

    def __init__(
        self, states: States, steps: int, time_stride: int = 1, starts: int = 1, steady: bool = False, name: str = ""
    ) -> None:
        if steps < 1 or starts < 1 or time_stride < 1:
            given = f"not {steps}, {starts} and {time_stride}"
            raise InputError(f"task.args: needs rollout_steps, starts and time_stride of at least 1, {given}")
        trajectories, frames = states.shape[:2]
        self.states, self.stride = states, 1 if steady else time_stride
        seen = -(-frames // self.stride)  # states of a trajectory
        self.steps = min(steps, seen - 1)
        if self.steps < 1:
            raise InputError(f"{name or 'the data'}: {frames} frames hold no step of time_stride {self.stride}")
        room = seen - self.steps
        self.starts = np.unique(np.linspace(0, room - 1, min(starts, room)).round().astype(np.int64)) * self.stride
        self.length = trajectories * len(self.starts)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = np.asarray(indices, np.int64)
        trajectory, start = index // len(self.starts), self.starts[index % len(self.starts)]
        frames = start[:, None] + self.stride * np.arange(self.steps + 1)
        return {"u": self.states[trajectory[:, None], frames]}


# ---- rollouts -----------------------------------------------------------------------------------------------------


def rollout(
    system: PhysicsSystem,
    u0: Tensor,
    steps: int,
    task: int,
    space: str = "latent",
    step: Step | None = None,
    difference: bool = True,
) -> Iterator[Tensor]:
    """The fields after 1, 2, …, ``steps`` steps from u0 (B, C, H, W), in its units: each (B, C, H, W).

    space: ``latent`` goes on from each predicted latent state, as the Universal Physics Stack does, and decodes each:
    u0 + D(z_k) - D(z_0), what single steps add up to. ``field`` encodes each predicted field again. step: from latent
    state to latent state; the system's own, ``system.ahead``, when None. difference: false reads D(z) alone, as it is
    for steady tasks: what latents don't hold of the first state is then gone, and not kept for good.
    """
    ahead = step or (lambda z: system.ahead(z, task))
    z = system.encode(u0, task)
    alone = system.grids[task].steady or not difference
    if space == "field":
        u = u0
        for _ in range(steps):
            z = system.encode(u, task)
            z1 = ahead(z)
            u = system.decode(z1, task) if alone else system.advance(u, z, z1, task)
            yield u
        return
    start = system.decode(z, task, frame=0)
    for _ in range(steps):
        z = ahead(z)
        yield system.decode(z, task) if alone else u0 + system.decode(z, task) - start


def repeated(step: Step, u0: Tensor, steps: int) -> Iterator[Tensor]:
    """step(u0), step(step(u0)), …"""
    for _ in range(steps):
        u0 = step(u0)
        yield u0


def measures(
    system: PhysicsSystem,
    u: Tensor,
    task: int,
    linear: Step,
    space: str = "latent",
    step: Step | None = None,
    periodic: bool = True,
    difference: bool = True,
) -> dict[str, Tensor]:
    """What is measured along trajectories u (B, K + 1, C, H, W), of each: float32 at least, (B, K) but for spectra and
    times.

    ``truth``: mean square of each later state. ``rollout``, ``rollout_persistence``, ``rollout_linear``: mean squared
    error of a rollout from the first state, of that state itself and of the linear step's rollout;
    ``rollout_floor``: where the decoder is given the true latents. ``step``, ``step_persistence``, ``step_linear`` and
    ``step_floor``: the same of single steps, each from the true state before. ``latent``, ``latent_step``,
    ``latent_persistence``: of latents, in one step. Persistence of a steady task is the training solutions' mean.

    ``accurate…`` and ``correlated…``, (B,): steps before a rollout's NRMSE first rises above ``ACCURATE`` or its
    correlation falls below ``CORRELATED``, K at most. ``spectrum_truth``, ``spectrum_rollout`` (B, 3, bins):
    ``spectrum`` at the first, the middle and the last step. What is not finite counts as an infinite error.
    """
    found: dict[str, list[Tensor]] = {}
    good: dict[str, list[Tensor]] = {}
    steps = u.shape[1] - 1
    for k, (fields, latents) in enumerate(_guesses(system, u, task, linear, space, step, difference)):
        truth = u[:, k + 1]
        values = {name: mean_square_or_inf(guess - truth) for name, guess in fields.items()}
        values |= {name: mean_square_or_inf(z) for name, z in latents.items()} | {"truth": mean_square_or_inf(truth)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        for kind in ("", "_persistence", "_linear"):
            accurate = values[f"rollout{kind}"] <= ACCURATE**2 * values["truth"]
            good.setdefault(f"accurate{kind}", []).append(accurate)
            good.setdefault(f"correlated{kind}", []).append(correlation(fields[f"rollout{kind}"], truth) >= CORRELATED)
        for _ in range(moments(steps).count(k)):  # one step may be first, middle and last
            found.setdefault("spectrum_truth", []).append(spectrum(truth, periodic))
            found.setdefault("spectrum_rollout", []).append(spectrum(fields["rollout"], periodic))
    kept = {name: leading(torch.stack(values, 1)) for name, values in good.items()}
    return {name: torch.stack(values, 1) for name, values in found.items()} | kept


def _guesses(
    system: PhysicsSystem, u: Tensor, task: int, linear: Step, space: str, step: Step | None, difference: bool
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For every step of the trajectories, fields that should be the next state, and latents, as ``measures`` names
    them."""
    ahead, steady = step or (lambda z: system.ahead(z, task)), system.grids[task].steady
    first, steps, alone = u[:, 0], u.shape[1] - 1, steady or not difference
    still = system.normalisers[system.names[task]].inverse(torch.zeros_like(first), 1) if steady else first
    z = system.encode(first, task)
    decoded = start = system.decode(z, task, frame=0)
    predicted, stencils = rollout(system, first, steps, task, space, ahead, difference), repeated(linear, first, steps)
    for k, (ours, theirs) in enumerate(zip(predicted, stencils, strict=True)):
        before = u[:, k]
        z_true, z_next = system.encode(u[:, k + 1], task, frame=1), ahead(z)
        next_decoded = system.decode(z_true, task)
        yield (
            {
                "rollout": ours,
                "rollout_persistence": still,
                "rollout_linear": theirs,
                "rollout_floor": next_decoded if alone else first + next_decoded - start,
                "step": system.decode(z_next, task) if alone else before + system.decode(z_next, task) - decoded,
                "step_persistence": still if steady else before,
                "step_linear": linear(before),
                "step_floor": next_decoded if alone else before + next_decoded - decoded,
            },
            {"latent": z_true, "latent_step": z_next - z_true, "latent_persistence": z - z_true},
        )
        z, decoded = z_true, next_decoded


def moments(steps: int) -> list[int]:
    """The first, the middle and the last of so many steps, counted from 0."""
    return [0, (steps - 1) // 2, steps - 1]


# ---- figures ------------------------------------------------------------------------------------------------------


def figures(sums: Mapping[str, Any], dt: float) -> dict[str, Any]:
    """Of one task, from sums over trajectories of ``measures`` and of their ``weight``. dt: a step, in units of time.

    One step, over all steps of all trajectories: ``nrmse`` of latents and ``nrmse_persistence``, ``nrmse_physical`` of
    fields, and ``nrmse_physical_persistence``, ``…_linear`` and ``…_floor``. A rollout's last step: ``rollout_nrmse``
    and its ``…_persistence``, ``…_linear`` and ``…_floor``; ``rollout_nrmse_mean`` over its steps; of every step, the
    arrays (K,) ``rollout_nrmse/steps``, ``rollout_nrmse_linear/steps`` and so on. ``time_accurate``,
    ``time_correlated``: mean time before NRMSE or correlation are lost, the rollout's length at most,
    ``…_persistence`` and ``…_linear``. ``rollout_spectrum``: the mean over wavenumbers of |log10 of the energies'
    ratio| at the last step; ``spectrum/truth``, ``spectrum/rollout``: the energies (3, bins).

    NRMSE = sqrt(sum of squared errors) / sqrt(sum of squares) of fields in their units, each step by itself.
    """

    def nrmse(error: Any, truth: Any) -> Any:
        n = sums["weight"]
        return np.sqrt(np.asarray(error) / n) / (np.sqrt(np.asarray(truth) / n) + EPS)

    kinds = ("", "_persistence", "_linear", "_floor")
    found: dict[str, Any] = {"nrmse": float(nrmse(sums["latent_step"].sum(), sums["latent"].sum()))}
    found["nrmse_persistence"] = float(nrmse(sums["latent_persistence"].sum(), sums["latent"].sum()))
    for kind in kinds:
        found[f"nrmse_physical{kind}"] = float(nrmse(sums[f"step{kind}"].sum(), sums["truth"].sum()))
    growth = {kind: nrmse(sums[f"rollout{kind}"], sums["truth"]) for kind in kinds}
    found |= {f"rollout_nrmse{kind}": float(values[-1]) for kind, values in growth.items()}
    found |= {f"rollout_nrmse_mean{kind}": float(values.mean()) for kind, values in growth.items()}
    for what in ("accurate", "correlated"):
        for kind in kinds[:3]:
            found[f"time_{what}{kind}"] = sums[f"{what}{kind}"] * dt / sums["weight"]
    truth, ours = sums["spectrum_truth"][-1], sums["spectrum_rollout"][-1]
    found["rollout_spectrum"] = spectral_distance(ours, truth)
    found |= {f"rollout_nrmse{kind}/steps": values for kind, values in growth.items()}
    spectra = {f"spectrum/{name}": sums[f"spectrum_{name}"] / sums["weight"] for name in ("truth", "rollout")}
    return found | spectra


def spectral_distance(energy: Any, truth: Any) -> float:
    """The mean of |log10(energy / truth)| over wavenumbers; those of less than 1e-12 of the true energy, float32's
    rounding, count as that much."""
    least = 1e-12 * truth.sum() + np.finfo(np.float64).tiny
    return float(np.abs(np.log10(np.maximum(energy, least) / np.maximum(truth, least))).mean())


# ---- parts --------------------------------------------------------------------------------------------------------


def spectrum(fields: Tensor, periodic: bool = True) -> Tensor:
    """Energy by wavenumber: (B, C, H, W) -> (B, bins). Bin k has the squared Fourier amplitudes of k - 1/2 to k + 1/2
    waves along the side, in every direction; they add up to the mean square (Parseval's theorem).

    Fields that aren't periodic are mirrored first, as a cosine transform does it, so that their edges don't ring; bin
    k is then of k half waves.
    """
    fields = wide(fields)
    for axis in () if periodic else (2, 3):
        if fields.shape[axis] > 1:
            fields = torch.cat((fields, fields.flip(axis)), axis)
    with torch.autocast(fields.device.type, enabled=False):
        amplitude = torch.fft.fft2(fields, norm="forward")
    energy = (amplitude.real.pow(2) + amplitude.imag.pow(2)).mean(1).flatten(1)
    y, x = (torch.fft.fftfreq(n, 1 / n, device=fields.device) for n in fields.shape[2:])
    bins = (y[:, None].pow(2) + x.pow(2)).sqrt().round().long().flatten()
    return energy.new_zeros(len(energy), int(bins.max()) + 1).index_add(1, bins, energy)


def wavenumbers(bins: int, periodic: bool) -> np.ndarray:
    """Waves per side of ``spectrum``'s bins: float64 (bins,)."""
    return np.arange(bins) / (1 if periodic else 2)


def whole_bins(height: int, width: int, periodic: bool) -> int:
    """The bins of ``spectrum`` whose waves fit in every direction; those above have only a plane's corners."""
    shortest = min(n for n in (height, width) if n > 1)
    return shortest // 2 + 1 if periodic else shortest


def correlation(predicted: Tensor, truth: Tensor) -> Tensor:
    """Pearson's, over space, of deviations from each channel's mean: (B, C, H, W) twice -> (B,); nan where the
    prediction isn't finite, or either doesn't vary."""
    p, q = (x - x.mean((2, 3), keepdim=True) for x in (wide(predicted), wide(truth)))
    product, p, q = ((a * b).flatten(1).sum(1) for a, b in ((p, q), (p, p), (q, q)))
    return product / (p * q).sqrt()


def leading(good: Tensor) -> Tensor:
    """How many steps are good before the first that isn't: bool (B, K) -> int64 (B,)."""
    return good.long().cumprod(1).sum(1)


def mean_square_or_inf(x: Tensor) -> Tensor:
    """Of each row, in float32 at least; what isn't finite counts as infinite: (B, ...) -> (B,)."""
    return wide(x).pow(2).flatten(1).mean(1).nan_to_num(nan=math.inf, posinf=math.inf)


def summed(values: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Sums over rows (B, ...), each by its weight (B,), and of the weights; rows of weight 0 add exactly nothing."""
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    counted = weight > 0
    sums = {
        name: torch.tensordot(weight[counted].to(exact), rows[counted].to(exact), 1) for name, rows in values.items()
    }
    return sums | {"weight": weight.to(exact).sum()}
