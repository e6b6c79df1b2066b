"""The losses of the physics stages: pure functions of tensors that give one value per sample.

Each returns (B,), in float32 at least whatever autocast says; the task weighs and sums them. A form of the Universal
Physics Stack (UPS) that mixes samples is called ``batch_…``: it depends on what a sample came with, and so on how a
batch is split over micro-batches and ranks. It gives the batch's value to every row, and takes the rows' weights so
that one that only pads counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EPS = 1e-8  # in denominators, as the UPS has it


# ---- one step -----------------------------------------------------------------------------------------------------


def forward_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """mean((p - q)^2): (B, ...) twice -> (B,)."""
    return _difference(predicted, target).pow(2).flatten(1).mean(1)


def relative_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """sqrt(mean((p - q)^2) / (mean(q^2) + 1e-8)) of each sample, its NRMSE: (B, ...) twice -> (B,).

    Where p = q the gradient is 0, not the root's infinity.
    """
    return _rms(_difference(predicted, target)) / (_mean_square(target) + EPS).sqrt()


def batch_relative_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The UPS's NRMSE, with its means over the whole batch: (B, ...) twice, weight (B,) -> (B,), equal in all rows.

    Depends on the split.
    """
    share = _shares(weight)
    error = torch.linalg.vector_norm(_rms(_difference(predicted, target)) * share.sqrt())
    truth = (_mean_square(target) * share).sum()
    return (error / (truth + EPS).sqrt()).expand(len(weight))


# ---- spectra ------------------------------------------------------------------------------------------------------


def spectral_amplitude_loss(predicted: Tensor, target: Tensor, axes: Sequence[int] = (1,)) -> Tensor:
    """mean((|P| - |Q|)^2) over all wavenumbers, P and Q the orthonormal Fourier transforms over ``axes``:
    (B, ...) twice -> (B,).

    axes: those of space: (1,) of latents (B, T, D), (2, 3) of fields (B, C, H, W). In the unit of ``forward_loss``
    and never above it (Parseval's theorem, and ||a| - |b|| <= |a - b|): the part of the error that isn't phase alone.
    """
    _check(predicted, target)
    (p, modes), (q, _) = _spectrum(predicted, axes), _spectrum(target, axes)
    return _over_modes((p.abs() - q.abs()).pow(2), modes, predicted)


def spectral_energy_loss(predicted: Tensor, target: Tensor, axes: Sequence[int] = (1,)) -> Tensor:
    """mean(||P|^2 - |Q|^2|) / (mean(|Q|^2) + 1e-8) over all wavenumbers, as above: (B, ...) twice -> (B,).

    The distance of the energy spectra, relative to the energy, which is mean(q^2) (Parseval's theorem). Unlike
    ``energy_ratio_loss`` it is not 0 where energy sits at wrong wavenumbers.
    """
    _check(predicted, target)
    (p, modes), (q, _) = _spectrum(predicted, axes), _spectrum(target, axes)
    error = _over_modes((_square(p) - _square(q)).abs(), modes, predicted)
    return error / (_over_modes(_square(q), modes, target) + EPS)


def feature_spectral_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The UPS's spectral loss of the operator: mean((|P| - |Q|)^2), P and Q the one-sided, unscaled transforms over
    the *last* axis, a latent's features, whose order means nothing: (B, ..., D) twice -> (B,)."""
    _check(predicted, target)
    p, q = (_rfft(x, -1).abs() for x in (predicted, target))
    return forward_loss(p, q)


def energy_ratio_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """|E_p - E_q| / (E_q + 1e-8) of each sample, E the mean of the squared amplitudes of its one-sided, unscaled
    transform over tokens: the UPS's spectral loss of the corrector, per sample. (B, T, D) twice -> (B,)."""
    _check(predicted, target)
    p, q = (_token_energy(x) for x in (predicted, target))
    return (p - q).abs() / (q + EPS)


def batch_energy_ratio_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The same with the UPS's means over the whole batch: (B, T, D) twice, weight (B,) -> (B,), equal in all rows.

    Depends on the split.
    """
    _check(predicted, target)
    p, q = ((_token_energy(x) * _shares(weight)).sum() for x in (predicted, target))
    return ((p - q).abs() / (q + EPS)).expand(len(weight))


# ---- several steps ------------------------------------------------------------------------------------------------


def unrolled(step: Callable[[Tensor], Tensor], z0: Tensor, steps: int, recompute: bool = False) -> Tensor:
    """step(z0), step(step(z0)), …: (B, ...) -> (B, steps, ...); the gradient goes back through all of them.

    The UPS starts from the state it has predicted already, and ``steps`` is then its rollout_horizon - 1. recompute:
    keep the states alone and run each step again in the backward pass.
    """
    states, z = [], z0
    for _ in range(steps):
        z = checkpoint(step, z, use_reentrant=False) if recompute else step(z)
        states.append(z)
    return torch.stack(states, 1)


def rollout_loss(predicted: Tensor, future: Tensor) -> Tensor:
    """mean((p_k - q_k)^2) of each step k: (B, K, ...) twice -> (B, K). With K = 1 it is ``forward_loss``; the mean
    over steps is the UPS's."""
    _check(predicted, future)
    return torch.stack([forward_loss(p, q) for p, q in zip(predicted.unbind(1), future.unbind(1), strict=True)], 1)


# ---- encoder and decoder ------------------------------------------------------------------------------------------


def inverse_encoding_loss(
    decoded: Mapping[str, Tensor], fields: Mapping[str, Tensor], original: bool = False
) -> Tensor:
    """What the decoder makes of z0 should be the field that was encoded: the mean over ``fields`` of
    mean((decoded - field)^2), each (B, Q, channels), at the query points -> (B,). Universal Physics Transformers,
    arXiv 2402.12365.

    The gradient reaches the decoder, and the encoder where z0 still hangs on it. original: the UPS trains neither, so
    its value is a constant of no gradient; for comparing numbers only.
    """
    losses = [forward_loss(decoded[name], field) for name, field in fields.items()]
    return _constant_if(original, torch.stack(losses).mean(0))


def inverse_decoding_loss(encoded_again: Tensor, z0: Tensor, original: bool = False) -> Tensor:
    """What the encoder makes of the decoded z0 should be z0: mean((E(D(z0)) - z0)^2), z0 as a target held fixed:
    (B, T, D) twice -> (B,). Alone it would be met by an encoder that gives the same for every field; beside
    ``inverse_encoding_loss`` it can't. original: as there."""
    return _constant_if(original, forward_loss(encoded_again, z0.detach()))


def curriculum_weight(epoch: float, base: float, warmup: float, cap: float = math.inf) -> float:
    """The weight of an inverse loss: 0 before epoch ``warmup`` (W), base (epoch - W) / W up to 2 W, then base; never
    above ``cap``. The UPS's defaults are W = 15 and cap = 0.05; its authors report gradients that blew up with 0.5 from
    the start."""
    grown = min((epoch - warmup) / warmup, 1.0) if warmup else 1.0
    return min(base * grown, cap) if epoch >= warmup else 0.0


# ---- distillation -------------------------------------------------------------------------------------------------


def drifts_at(corrector: Callable[[Tensor, Tensor], Tensor], z: Tensor, taus: Tensor) -> Tensor:
    """The corrector's drifts from z (B, ...) at each of taus (B, S), in one call of B x S rows: (B, S, ...)."""
    samples, count = taus.shape
    return corrector(z.repeat_interleave(count, 0), taus.flatten()).unflatten(0, (samples, count))


def distillation_loss(drift: Tensor, teacher_drift: Tensor) -> Tensor:
    """mean over taus of mean(((z + d) - (z + d_T))^2): the student's corrected state at every tau should be the
    teacher's, which is held fixed. drift: (B, S, ...); teacher_drift the same, or (B, ...) for all taus -> (B,).

    z cancels out, so it isn't asked for. Met by d = d_T alone, and so by no drift only where the teacher has none.
    """
    if teacher_drift.dim() < drift.dim():
        teacher_drift = teacher_drift[:, None].expand_as(drift)
    return rollout_loss(drift, teacher_drift.detach()).mean(1)


def collapsing_distillation_loss(drift: Tensor) -> Tensor:
    """The UPS's loss of this stage, MSE(z + d, z) = mean(d^2), which trains every drift to 0; for comparing numbers
    only: (B, S, ...) -> (B,)."""
    return _mean_square(drift)


# ---- parts --------------------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape:  # which could broadcast, and mean something else
        raise ValueError(f"prediction {tuple(predicted.shape)} and target {tuple(target.shape)} differ in shape")


def _difference(predicted: Tensor, target: Tensor) -> Tensor:
    _check(predicted, target)
    return wide(predicted) - wide(target)


def _mean_square(x: Tensor) -> Tensor:
    return wide(x).pow(2).flatten(1).mean(1)


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1) / math.sqrt(x[0].numel())


def _shares(weight: Tensor) -> Tensor:
    return weight / weight.sum().clamp(min=EPS)


def _constant_if(original: bool, loss: Tensor) -> Tensor:
    return loss.detach() if original else loss


def _rfft(x: Tensor, axis: int, norm: str = "backward") -> Tensor:
    """In float32 at least: half-precision transforms take powers of two alone, and square out of range."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.fft.rfft(wide(x), dim=axis, norm=norm)


def _square(x: Tensor) -> Tensor:
    return x.real.pow(2) + x.imag.pow(2)


def _token_energy(x: Tensor) -> Tensor:
    return _square(_rfft(x, 1)).flatten(1).mean(1)


def _spectrum(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The orthonormal transform over ``axes``, one-sided along the last, and how many modes of the full one each of
    its entries stands for: 2 where the other one is its complex conjugate."""
    *others, last = (axis % x.dim() for axis in axes)
    half = _rfft(x, last, "ortho")
    for axis in others:
        half = torch.fft.fft(half, dim=axis, norm="ortho")
    modes = torch.full((half.shape[last],), 2.0, device=x.device)
    modes[0] = 1
    if x.shape[last] % 2 == 0:
        modes[-1] = 1
    return half, modes.view(-1, *[1] * (x.dim() - last - 1))


def _over_modes(value: Tensor, modes: Tensor, x: Tensor) -> Tensor:
    """The mean of a value per mode over the full transform of x: (B,)."""
    return (value * modes).flatten(1).sum(1) / x[0].numel()
