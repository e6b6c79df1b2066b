"""Mean and spread of fields, per channel, fitted on the training split and used for all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.fields import Fields
from fabric_trainer.errors import InputError


class Normaliser(nn.Module):
    """(values - mean) / spread per channel, and back.

    A module without parameters: as a part of the network it is in every checkpoint, and a prediction comes back in the
    fields' own units wherever the network goes.

    mean, std: float32 (1, C); (2, C) for a steady task, whose given field and solution have each their own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if mean.ndim != 2 or mean.shape != std.shape or not bool((std > 0).all()):
            raise ValueError(f"needs mean and std of one shape (1 or 2, C), std > 0, not {mean} and {std}")
        self.register_buffer("mean", mean.to(torch.float32))
        self.register_buffer("std", std.to(torch.float32))

    def forward(self, fields: Tensor, frame: int | None = None) -> Tensor:
        """(…, C, H, W) in their units -> the same, normalised.

        Of a steady task either whole trajectories (…, 2, C, H, W), or the states of one frame, 0 or 1.
        """
        mean, std = self._of(fields, frame)
        return (fields - mean) / std

    def inverse(self, fields: Tensor, frame: int | None = None) -> Tensor:
        """Normalised fields in their units."""
        mean, std = self._of(fields, frame)
        return fields * std + mean

    def _of(self, fields: Tensor, frame: int | None) -> tuple[Tensor, Tensor]:
        frames = self.mean.shape[0]
        if frame is None and frames > 1 and (fields.ndim < 4 or fields.shape[-4] != frames):
            raise ValueError(f"a steady task's fields need a frame, or both: (…, {frames}, C, H, W)")
        if frame is None:
            mean, std = (self.mean, self.std) if frames > 1 else (self.mean[0], self.std[0])
        else:
            mean, std = (values[min(frame, frames - 1)] for values in (self.mean, self.std))
        return mean[..., None, None], std[..., None, None]


def fit(fields: Fields) -> Normaliser:
    """The training split's Normaliser. Raises InputError where a value is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):  # said below, with the file's name
        mean, std = moments(fields.chunks(), fields.steady)
    if not np.isfinite(mean).all() or not np.isfinite(std).all():
        raise InputError(f"{fields.paths[0]}: {fields.name} holds values that are not finite")
    return Normaliser(torch.from_numpy(mean), torch.from_numpy(std))


def moments(chunks: Iterable[NDArray[np.float32]], by_frame: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (of the population) of streamed fields (n, T, C, H, W): float64 (1, C), by frame
    (T, C). A channel that does not vary, beyond float32's rounding, has a spread of 1.

    Each chunk's mean and squared deviations in two passes, joined by Chan, Golub & LeVeque's formula (1979): no
    difference of large sums, so that a pressure of 1e5 keeps the spread of its 1e-1.
    """
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for chunk in chunks:
        axes = (0, 3, 4) if by_frame else (0, 1, 3, 4)
        wide = chunk.astype(np.float64)
        own = wide.mean(axes, keepdims=True)
        deviations = ((wide - own) ** 2).sum(axes)
        own, new = own.reshape(deviations.shape), wide.size // deviations.size
        change, total = own - mean, count + new
        mean = mean + change * (new / total)
        squares = squares + deviations + change**2 * (count * new / total)
        count = total
    std = np.sqrt(squares / count)
    std = np.where(std <= np.finfo(np.float32).eps * np.abs(mean), 1.0, std)
    return np.atleast_2d(mean), np.atleast_2d(std)
