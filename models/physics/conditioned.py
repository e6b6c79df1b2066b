"""Test-time conditioning of a physics system's steps, measured beside plain ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom
from models.physics.conditioning import KEY, Scored, Search, Settings, channel_names
from models.physics.losses import EPS
from models.physics.rollouts import mean_square_or_inf
from models.physics.system import Grid, PhysicsSystem


def scores(settings: Settings, grids: Sequence[Grid], steps: Sequence[int]) -> dict[int, Scored]:
    """The reward of each task that has a time, by its place. steps: of each task's trajectories. InputError where no
    task has a time, or one lacks the fields or the steps that are asked for."""
    found = {}
    for task, grid in enumerate(grids):
        if grid.steady:  # what is given and what is found share no integral
            continue
        if settings.steps > steps[task]:
            raise InputError(f"{KEY}.steps: {settings.steps} are more than the {steps[task]} of {grid.name}")
        found[task] = Scored(settings.reward, channel_names(grid.name, grid.channels), grid.name)
    if not found:
        raise InputError(f"{KEY}: {', '.join(grid.name for grid in grids)} is steady: there are no steps to condition")
    return found


def measures(
    system: PhysicsSystem,
    u: Tensor,
    task: int,
    settings: Settings,
    score: Scored,
    random: SampleRandom,
    weight: Tensor,
    tau: float | None = None,
) -> dict[str, Tensor]:
    """Of trajectories u (B, K + 1, C, H, W), from every state that has ``steps`` more behind it: mean squares of the
    latents and fields of these steps and of their errors, conditioned and plain, the rewards, and the candidates
    decoded per start; (B,) each, means over the starts. random: the trajectories'. weight: (B,), as ``Search`` has it.
    tau: of the corrector, for the plain prediction; None: there is no corrector.
    """
    starts = u.shape[1] - settings.steps
    z_true = torch.stack([system.encode(states, task) for states in u.unbind(1)], 1)
    found: dict[str, list[Tensor]] = {}
    for k in range(starts):
        first, decoded = u[:, k], system.decode(z_true[:, k], task)

        def fields(z: Tensor, first: Tensor = first, decoded: Tensor = decoded) -> Tensor:
            return first + (system.decode(z, task) - decoded)  # as system.advance has it, and exact for the start

        search = Search(
            settings,
            score,
            step=lambda z: system.step(z, task),
            decode=fields,
            random=SampleRandom(random.seed, random.epoch, random.index * starts + k),
            correct=None if tau is None else partial(system.drift, task=task),
            tau=0.0 if tau is None else tau,
            unit=system.latent_change[task],
            weight=weight,
        )
        got = search(z_true[:, k])
        z_later, u_later = (x[:, k + 1 : k + 1 + settings.steps] for x in (z_true, u))
        values = {"ttc_latent": z_later, "ttc_field": u_later}
        for kind, states in (("", got.z), ("_plain", got.plain)):
            decodings = torch.stack([fields(z) for z in states.unbind(1)], 1)
            values |= {f"ttc_latent_error{kind}": states - z_later, f"ttc_field_error{kind}": decodings - u_later}
        rows = {name: mean_square_or_inf(value) for name, value in values.items()}
        rows |= {"ttc_reward": got.reward, "ttc_reward_plain": got.reward_plain}
        rows["ttc_evaluations"] = torch.full_like(got.reward, got.evaluations)
        for name, value in rows.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(rows).mean(0) for name, rows in found.items()}


def figures(sums: Mapping[str, Any]) -> dict[str, float]:
    """Of one task, from sums over trajectories of ``measures`` and of their ``weight``: ``nrmse_ttc`` of latents and
    ``nrmse_physical_ttc`` of fields after conditioned steps, ``…_plain`` of the same steps as they are predicted,
    ``ttc_reward`` and ``ttc_reward_plain``, and ``ttc_evaluations`` per start. None where nothing was conditioned."""
    if "ttc_reward" not in sums:
        return {}
    n, found = sums["weight"], {}
    for what, name in (("latent", "nrmse_ttc"), ("field", "nrmse_physical_ttc")):
        for kind in ("", "_plain"):
            error, truth = sums[f"ttc_{what}_error{kind}"] / n, sums[f"ttc_{what}"] / n
            found[name + kind] = math.sqrt(error) / (math.sqrt(truth) + EPS)
    return found | {name: sums[name] / n for name in ("ttc_reward", "ttc_reward_plain", "ttc_evaluations")}
