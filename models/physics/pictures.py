"""Pictures of the physics system."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@torch.no_grad()
def rollout(network: nn.Module, start: Tensor, steps: int) -> Tensor:
    """``steps`` steps of the network, each from the field that the one before gave: (N, X) -> (N, steps + 1, X)."""
    fields = [start]
    for _ in range(steps):
        fields.append(network(fields[-1])["u1"].to(start.dtype))
    return torch.stack(fields, 1)


def rollout_figure(network: nn.Module, truth: Tensor, dt: float) -> Figure:
    """Truth, rollout and their difference over space and time, a row per trajectory, and profiles at three times.

    truth: (N, T, X), states ``dt`` time units apart, on the network's device.
    """
    import matplotlib.pyplot as plt

    was_training = network.training
    network.eval()
    predicted = rollout(network, truth[:, 0], truth.shape[1] - 1).float().cpu()
    network.train(was_training)
    truth = truth.float().cpu()
    end = (truth.shape[1] - 1) * dt
    figure, axes = plt.subplots(
        len(truth), 4, figsize=(14, 3.2 * len(truth)), squeeze=False, layout="constrained", width_ratios=(1, 1, 1, 1.3)
    )
    for row, u, v in zip(axes, truth, predicted, strict=True):
        limit, error = u.abs().max().item(), v - u
        shown = (("truth", u, limit), ("prediction", v, limit), ("error", error, error.abs().max().item()))
        for axis, (title, field, bound) in zip(row, shown, strict=False):
            image = axis.imshow(
                field, cmap="RdBu_r", vmin=-bound, vmax=bound, origin="lower", aspect="auto", extent=(0, 1, 0, end)
            )
            axis.set(title=title, xlabel="x", ylabel="t")
            figure.colorbar(image, ax=axis, shrink=0.9)
        relative = (error.pow(2).mean().sqrt() / u.pow(2).mean().sqrt()).item()
        row[2].set_title(f"error, NRMSE {relative:.3f}")
        _profiles(row[3], u, v, dt)
    return figure


def _profiles(axis: Axes, truth: Tensor, predicted: Tensor, dt: float) -> None:
    """The fields at a quarter, half and the whole of the time: truth as thin lines, the rollout dashed over it."""
    last, cells = truth.shape[0] - 1, truth.shape[1]
    x = (torch.arange(cells) + 0.5) / cells
    for color, frame in zip(("tab:blue", "tab:orange", "tab:green"), (last // 4, last // 2, last), strict=True):
        axis.plot(x, truth[frame], color=color, linewidth=1, label=f"t = {frame * dt:.2f}")
        axis.plot(x, predicted[frame], color=color, linewidth=2.2, linestyle=(0, (2, 2)), alpha=0.6)
    axis.set(title="truth thin, prediction dashed", xlabel="x", ylabel="u", xlim=(0, 1))
    axis.legend(frameon=False, fontsize="small")
