"""Histograms of tensors, counted where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 64

Histogram = tuple[list[int], list[float]]
"""Counts, and their edges: one more."""


def histogram(values: Tensor) -> Histogram | None:
    """Of all elements, in 64 bins of equal width from the smallest to the largest, which is in the last; one bin where
    all are equal. None where there are none, or the width isn't finite. Synchronises with the device."""
    values = values.detach().flatten()
    if not len(values):
        return None
    values = values if values.dtype == torch.float64 else values.float()
    least, most = values.aminmax()
    low, high, width = torch.stack([least, most, most - least]).tolist()
    if not math.isfinite(width):
        return None
    if width == 0:
        return [len(values)], [low, high]
    # histc counts in float32, which stands still at 2^24
    place = ((values - low) / width * BINS).clamp_(max=BINS - 1).to(torch.uint8)
    counts = torch.bincount(place, minlength=BINS).tolist()
    return counts, torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
