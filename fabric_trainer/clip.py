"""Gradient norm and clipping. The norm comes back as a plain 0-d tensor on the device: nothing waits for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def clip_gradients(
    parameters: Iterable[Tensor], norm: float | None = None, value: float | None = None, p: float = 2.0
) -> Tensor:
    """Clip the parameters' gradients in place; return their global p-norm *before* clipping, 0-d.

    norm: scale all gradients by min(1, norm / (total + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` does (Pascanu et
    al., arXiv 1211.5063), bit for bit. value: clamp every element to [-value, value]. Neither: measure alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = total_norm(gradients, p)
    if norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(norm / (total + 1e-6), max=1.0))
    elif value is not None:
        torch._foreach_clamp_min_(gradients, -value)
        torch._foreach_clamp_max_(gradients, value)
    return total


def total_norm(tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """The p-norm of all elements of all tensors, 0-d, on the first one's device."""
    norms = torch._foreach_norm(tensors, p)
    return torch.linalg.vector_norm(torch.stack(norms), p)
