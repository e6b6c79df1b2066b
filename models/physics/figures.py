"""The physics system's figures, from exact sums over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from models.physics.losses import EPS


def nrmses(sums: Mapping[str, float], tasks: Sequence[str], compared: Sequence[str] = ()) -> dict[str, float]:
    """From sums of the rows of ``PhysicsSystem.measure`` by task, ``<task>/<name>``, ``nrmse`` of latents and
    ``nrmse_physical`` of fields; ``…_persistence``: of predicting no change, ``…_floor``: of decoding the true latents,
    ``…_ratio``: to persistence, and ``…_<name>`` of each of ``compared``. Of several tasks ``<task>/…`` each; latents
    count alike whatever their task, of fields the mean over tasks is taken.

    NRMSE = sqrt(mean of squared errors) / (sqrt(mean of squares) + 1e-8), over the whole split; nan of no samples.
    """
    own = {task: _nrmses(lambda name, task=task: sums[f"{task}/{name}"], compared) for task in tasks}
    if len(own) == 1:
        return next(iter(own.values()))
    overall = _nrmses(lambda name: sum(sums[f"{task}/{name}"] for task in own), compared)
    physical = [name for name in overall if name.startswith("nrmse_physical")]
    means = {name: sum(figures[name] for figures in own.values()) / len(own) for name in physical}
    by_task = {f"{task}/{name}": value for task, figures in own.items() for name, value in figures.items()}
    return overall | means | by_task


def _nrmses(sum_of: Callable[[str], float], compared: Sequence[str]) -> dict[str, float]:
    figures: dict[str, float] = {}
    n = sum_of("weight")

    def nrmse(error: str, truth: str) -> float:
        return math.sqrt(sum_of(error) / n) / (math.sqrt(sum_of(truth) / n) + EPS) if n else math.nan

    for truth, name in (("latent", "nrmse"), ("field", "nrmse_physical")):
        error, persistence = nrmse(f"{truth}_error", truth), nrmse(f"{truth}_persistence", truth)
        figures |= {name: error, f"{name}_persistence": persistence, f"{name}_ratio": error / (persistence + EPS)}
        figures |= {f"{name}_{other}": nrmse(f"{truth}_{other}", truth) for other in compared}
    return figures | {"nrmse_physical_floor": nrmse("field_floor", "field")}
