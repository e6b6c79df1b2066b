"""The physics losses beside plain numpy, closed forms and loops; what depends on the split, and what doesn't."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.losses import (
    batch_energy_ratio_loss,
    batch_relative_loss,
    collapsing_distillation_loss,
    curriculum_weight,
    distillation_loss,
    drifts_at,
    energy_ratio_loss,
    feature_spectral_loss,
    forward_loss,
    inverse_decoding_loss,
    inverse_encoding_loss,
    relative_loss,
    rollout_loss,
    spectral_amplitude_loss,
    spectral_energy_loss,
    unrolled,
)

Array = np.ndarray
PER_SAMPLE = [
    forward_loss,
    relative_loss,
    spectral_amplitude_loss,
    spectral_energy_loss,
    feature_spectral_loss,
    energy_ratio_loss,
]
BATCH_WISE = [batch_relative_loss, batch_energy_ratio_loss]


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return p, q * torch.arange(1, shape[0] + 1, dtype=dtype).view(-1, *[1] * (len(shape) - 1))  # of unlike sizes


def close(value: Tensor, expected: Tensor | Array | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=value.dtype).expand_as(value)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


# ---- beside numpy -------------------------------------------------------------------------------------------------


def reference(name: str, p: Array, q: Array) -> float:
    """The formulas as they are written, over whatever is given: one sample, or a batch; with full transforms."""
    last, tokens = p.ndim - 1, p.ndim - 2

    def full(x: Array) -> Array:
        return np.abs(np.fft.fft(x, axis=tokens)) / np.sqrt(x.shape[tokens])

    def one_sided(x: Array) -> float:
        return np.mean(np.abs(np.fft.rfft(x, axis=tokens)) ** 2)

    if name == "forward_loss":
        return np.mean((p - q) ** 2)
    if name == "relative_loss":
        return np.sqrt(np.mean((p - q) ** 2) / (np.mean(q**2) + 1e-8))
    if name == "spectral_amplitude_loss":
        return np.mean((full(p) - full(q)) ** 2)
    if name == "spectral_energy_loss":
        return np.mean(np.abs(full(p) ** 2 - full(q) ** 2)) / (np.mean(full(q) ** 2) + 1e-8)
    if name == "feature_spectral_loss":
        return np.mean((np.abs(np.fft.rfft(p, axis=last)) - np.abs(np.fft.rfft(q, axis=last))) ** 2)
    return np.abs(one_sided(p) - one_sided(q)) / (one_sided(q) + 1e-8)


@pytest.mark.parametrize("tokens, dim", [(8, 6), (7, 5), (1, 3), (2, 1)])
@pytest.mark.parametrize("loss", PER_SAMPLE)
def test_each_sample_has_the_formula_of_its_own(loss: Callable[..., Tensor], tokens: int, dim: int) -> None:
    p, q = pair(4, tokens, dim)
    value = loss(p, q)
    assert value.shape == (4,)
    close(value, np.array([reference(loss.__name__, p[i].numpy(), q[i].numpy()) for i in range(4)]))


@pytest.mark.parametrize("loss", BATCH_WISE)
def test_batch_wise_forms_are_the_originals(loss: Callable[..., Tensor]) -> None:
    p, q = pair(4, 8, 6)
    name = loss.__name__.removeprefix("batch_")
    value = loss(p, q, torch.ones(4))
    close(value, reference(name, p.numpy(), q.numpy()))
    # rows that only pad: nothing in the value, nothing in the gradient
    padded = torch.cat((p, 100 * p[:2])).requires_grad_()
    with_padding = loss(padded, torch.cat((q, q[:2])), torch.tensor([1.0, 1, 1, 1, 0, 0]))
    close(with_padding[:4], value.tolist()[0])
    with_padding[:4].sum().backward()
    assert padded.grad[:4].any() and not padded.grad[4:].any()
    nothing = loss(p.requires_grad_(), q, torch.zeros(4)) * 0
    nothing.sum().backward()
    assert nothing.tolist() == [0] * 4 and not p.grad.any()


@pytest.mark.parametrize("shape, axes", [((3, 2, 6, 8), (2, 3)), ((3, 1, 1, 9), (2, 3)), ((3, 2, 5, 7), (-2, -1))])
def test_spectra_over_the_axes_of_a_grid(shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    p, q = pair(*shape)
    p_hat, q_hat = (np.abs(np.fft.fft2(x.numpy(), norm="ortho")) for x in (p, q))
    amplitudes = ((p_hat - q_hat) ** 2).mean((1, 2, 3))
    energies = np.abs(p_hat**2 - q_hat**2).mean((1, 2, 3)) / ((q_hat**2).mean((1, 2, 3)) + 1e-8)
    close(spectral_amplitude_loss(p, q, axes), amplitudes)
    close(spectral_energy_loss(p, q, axes), energies)


# ---- what the spectra mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, axes", [((3, 8, 4), (1,)), ((3, 7, 4), (1,)), ((3, 2, 6, 9), (2, 3))])
def test_parseval(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    p, q = pair(*shape)
    close(spectral_amplitude_loss(torch.zeros_like(q), q, axes), forward_loss(torch.zeros_like(q), q))
    energy = q.pow(2).flatten(1).mean(1)
    close(spectral_energy_loss(torch.zeros_like(q), q, axes), energy / (energy + 1e-8))
    assert (spectral_amplitude_loss(p, q, axes) <= forward_loss(p, q)).all()


def test_spectra_see_wavenumbers_and_not_phases() -> None:
    x = torch.arange(32, dtype=torch.float64) / 32
    low, high = (torch.sin(2 * math.pi * k * x)[None, :, None] for k in (2, 5))
    for loss in (spectral_amplitude_loss, spectral_energy_loss):
        close(loss(low.roll(3, 1), low), 0.0)
    close(spectral_energy_loss(high, low), 2.0, 1e-7)  # all energy missing in one place, all too much in another
    close(energy_ratio_loss(high, low), 0.0)  # the original's total is blind to that


# ---- gradients and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", PER_SAMPLE)
def test_gradients(loss: Callable[..., Tensor]) -> None:
    p, q = pair(2, 5, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, q), p.requires_grad_())


@pytest.mark.parametrize("loss", BATCH_WISE)
def test_gradients_of_batch_wise_forms(loss: Callable[..., Tensor]) -> None:
    p, q = pair(2, 5, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, q, torch.ones(2)), p.requires_grad_())


@pytest.mark.parametrize("loss", PER_SAMPLE)
def test_a_perfect_prediction_has_a_finite_gradient(loss: Callable[..., Tensor]) -> None:
    """As at the start, where the operator predicts no change and a sample may have none."""
    p = torch.zeros(2, 4, 3, requires_grad=True)
    q = torch.stack((torch.zeros(4, 3), torch.ones(4, 3)))
    loss(p + q, q).sum().backward()
    assert p.grad.isfinite().all()
    close(loss(p + q, q).detach(), 0.0)


def test_a_perfect_batch_has_a_finite_gradient() -> None:
    q = torch.randn(2, 4, 3)
    p = q.clone().requires_grad_()
    batch_relative_loss(p, q, torch.ones(2)).sum().backward()
    assert not p.grad.any()


@pytest.mark.parametrize("loss", PER_SAMPLE)
def test_half_precision_and_autocast_change_nothing_after_the_rounding(loss: Callable[..., Tensor]) -> None:
    p, q = (x.bfloat16() for x in pair(3, 6, 5))  # lengths that are no powers of two
    expected = loss(p.float(), q.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(p, q)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.equal(loss(p, q), expected)  # without autocast, which widens some operations itself


@pytest.mark.parametrize("loss", [*PER_SAMPLE, rollout_loss, inverse_decoding_loss])
def test_shapes_that_would_broadcast_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"prediction \(3, 4, 2\) and target \(3, 1, 2\) differ"):
        loss(torch.zeros(3, 4, 2), torch.zeros(3, 1, 2))


# ---- splits -------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.data(), st.integers(0, 2**31))
def test_per_sample_forms_do_not_depend_on_the_split(batch: int, data: st.DataObject, seed: int) -> None:
    cut = data.draw(st.integers(1, batch - 1))
    p, q = pair(batch, 6, 4, seed=seed)
    for loss in [*PER_SAMPLE, rollout_loss, inverse_decoding_loss, distillation_loss]:
        close(torch.cat((loss(p[:cut], q[:cut]), loss(p[cut:], q[cut:]))), loss(p, q))
    fields = {"u": q[..., :1], "rho": q[..., 1:]}
    parts = ({name: x[rows] for name, x in fields.items()} for rows in (slice(cut), slice(cut, None)))
    split = [inverse_encoding_loss({"u": d[..., :1], "rho": d[..., 1:]}, f) for d, f in zip((p[:cut], p[cut:]), parts)]
    close(torch.cat(split), inverse_encoding_loss({"u": p[..., :1], "rho": p[..., 1:]}, fields))


@pytest.mark.parametrize("loss", BATCH_WISE)
def test_batch_wise_forms_do(loss: Callable[..., Tensor]) -> None:
    p, q = pair(4, 6, 4)
    whole, ones = loss(p, q, torch.ones(4)), torch.ones(2)
    halves = torch.cat((loss(p[:2], q[:2], ones), loss(p[2:], q[2:], ones)))
    assert abs(halves.mean() - whole.mean()) > 0.05 * whole.mean()


# ---- rollout ------------------------------------------------------------------------------------------------------


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls = nn.Linear(3, 3), 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z + self.linear(z).tanh()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_rollout_is_a_loop(steps: int, recompute: bool) -> None:
    z0, _ = pair(2, 5, 3, dtype=torch.float32)
    future, _ = pair(2, steps, 5, 3, seed=1, dtype=torch.float32)
    step, by_hand = Step(), Step()
    loss = rollout_loss(unrolled(step, z0, steps, recompute), future)
    loss.sum().backward()
    assert loss.shape == (2, steps) and step.calls == steps * (1 + recompute)
    z, expected = z0, []
    for k in range(steps):
        z = by_hand(z)
        expected.append(forward_loss(z, future[:, k]))
    torch.stack(expected, 1).sum().backward()
    assert torch.equal(loss, torch.stack(expected, 1))
    torch.testing.assert_close(step.linear.weight.grad, by_hand.linear.weight.grad)
    close(loss.detach().mean(), (unrolled(step, z0, steps) - future).detach().pow(2).mean(), 1e-6)  # the original's


def test_the_gradient_goes_through_time() -> None:
    z0, _ = pair(1, 2, 3)
    step, z0 = Step().double(), z0.requires_grad_()
    states = unrolled(step, z0, 3)
    (last,) = torch.autograd.grad(states[:, 2].sum(), z0)
    jacobians = [
        torch.autograd.functional.jacobian(step, z.detach()).view(6, 6) for z in (z0, states[:, 0], states[:, 1])
    ]
    close(last.flatten(), torch.ones(6, dtype=torch.float64) @ jacobians[2] @ jacobians[1] @ jacobians[0])


# ---- encoder and decoder ------------------------------------------------------------------------------------------


def autoencoder() -> tuple[GridEncoder, AnyPointDecoder, Tensor, Tensor]:
    torch.manual_seed(0)
    encoder, decoder = GridEncoder(4, 6), AnyPointDecoder(6, hidden=8, layers=1, heads=2, mlp=8)
    x = (torch.arange(16) + 0.5) / 16
    return encoder.requires_grad_(), decoder, torch.randn(3, 1, 1, 16), torch.stack((x, 0 * x), -1).expand(3, -1, -1)


@pytest.mark.parametrize("which", ["encoding", "decoding"])
@pytest.mark.parametrize("original", [False, True])
def test_inverse_losses_reach_encoder_and_decoder(which: str, original: bool) -> None:
    encoder, decoder, fields, points = autoencoder()
    z0 = encoder(fields)
    decoded = decoder(points, z0, encoder.places(1, 16))
    truth = fields[:, :, 0].mT
    if which == "encoding":
        loss = inverse_encoding_loss({"u": decoded}, {"u": truth}, original)
        expected = (decoded - truth).pow(2).mean((1, 2))
    else:
        again = encoder(decoded.mT[:, :, None])
        loss = inverse_decoding_loss(again, z0, original)
        expected = (again - z0).pow(2).mean((1, 2))
    assert loss.shape == (3,)
    close(loss.detach(), expected.detach(), 1e-6)
    assert loss.requires_grad is not original
    if not original:
        loss.sum().backward()
        for weight in (encoder.project.weight, encoder.stem[2].weight, decoder.latent_proj.weight):
            assert weight.grad.abs().max() > 1e-6


def test_inverse_decoding_holds_its_target_fixed() -> None:
    z0 = torch.randn(2, 4, 3, requires_grad=True)
    inverse_decoding_loss(2 * z0, z0).sum().backward()
    close(z0.grad, 2 * 2 * z0.detach() / 12, 1e-6)  # of (2 z - c)^2 at c = z, and not of (2 z - z)^2


def test_inverse_encoding_averages_over_fields() -> None:
    """However many components each has, as the original does; what else is decoded is not compared."""
    (u, v), (rho, _) = pair(2, 5, 2), pair(2, 5, 1, seed=1)
    value = inverse_encoding_loss({"u": u, "rho": rho, "e": rho}, {"u": v, "rho": 0 * rho})
    close(value, (np.mean((u - v).numpy() ** 2, (1, 2)) + np.mean(rho.numpy() ** 2, (1, 2))) / 2)
    with pytest.raises(KeyError, match="u"):
        inverse_encoding_loss({"rho": rho}, {"u": v})


@pytest.mark.parametrize(
    "epoch, base, warmup, cap, expected",
    [
        (0, 0.01, 15, 0.05, 0.0),
        (14, 0.01, 15, 0.05, 0.0),
        (15, 0.01, 15, 0.05, 0.0),
        (18, 0.01, 15, 0.05, 0.002),
        (29, 0.01, 15, 0.05, 0.01 * 14 / 15),
        (30, 0.01, 15, 0.05, 0.01),
        (99, 0.01, 15, 0.05, 0.01),
        (16, 0.5, 15, 0.05, 0.5 / 15),
        (17, 0.5, 15, 0.05, 0.05),
        (99, 0.5, 15, 0.05, 0.05),
        (0, 0.01, 0, 0.05, 0.01),
    ],
)
def test_curriculum(epoch: int, base: float, warmup: int, cap: float, expected: float) -> None:
    assert curriculum_weight(epoch, base, warmup, cap) == pytest.approx(expected, rel=1e-12)


# ---- distillation -------------------------------------------------------------------------------------------------


def corrector(z: Tensor, tau: Tensor) -> Tensor:
    return z.tanh() * (1 + tau).view(-1, 1, 1)


def test_drifts_at_every_tau_of_a_sample() -> None:
    z, _ = pair(3, 4, 2)
    taus = torch.rand(3, 5, dtype=torch.float64)
    expected = torch.stack([corrector(z, taus[:, s]) for s in range(5)], 1)
    assert torch.equal(drifts_at(corrector, z, taus), expected)


def test_distillation_matches_the_teachers_corrected_state() -> None:
    z, _ = pair(3, 4, 2)
    drift, teacher = (drifts_at(corrector, z, torch.rand(3, 5, dtype=torch.float64)) for _ in range(2))
    state = z[:, None].numpy()
    expected = np.mean(((state + drift.numpy()) - (state + teacher.numpy())) ** 2, (1, 2, 3))
    close(distillation_loss(drift, teacher), expected)
    alike = teacher[:, :1].expand_as(teacher)
    close(distillation_loss(drift, teacher[:, 0]), distillation_loss(drift, alike))


@pytest.mark.parametrize("collapses", [False, True])
def test_only_the_originals_distillation_collapses(collapses: bool) -> None:
    """Descending the loss from no drift ends at the teacher's; the original's from the teacher's ends at none."""
    z, teacher = pair(2, 4, 3)
    teacher.requires_grad_()
    drift = (teacher.detach() if collapses else torch.zeros_like(z))[:, None].repeat(1, 5, 1, 1).requires_grad_()
    for _ in range(40):
        loss = collapsing_distillation_loss(drift) if collapses else distillation_loss(drift, teacher)
        (gradient,) = torch.autograd.grad(loss.sum(), drift)
        with torch.no_grad():
            drift -= 0.25 * drift[0].numel() * gradient  # half of what is left
    end = torch.zeros_like(teacher) if collapses else teacher.detach()
    close(drift.detach(), end[:, None].expand_as(drift), 1e-9)
    assert teacher.grad is None and not loss.isnan().any()


def test_the_collapsing_form_is_the_originals() -> None:
    z, drift = pair(3, 4, 2)
    close(collapsing_distillation_loss(drift), np.mean(((z + drift) - z).numpy() ** 2, (1, 2)))


def test_distillation_asks_no_gradient_of_the_teacher() -> None:
    drift, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    distillation_loss(drift, teacher).sum().backward()
    assert drift.grad.any() and teacher.grad is None
