"""The whole physics system as one module: encoder, operator and decoder behind one ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.operator import LatentOperator


class PhysicsNetwork(nn.Module):
    """One step of time of a field on a periodic line, through latent space.

    The encoder sees the normalised field. The operator's own change is in units of ``reach`` x ``latent_change``. The
    decoder D is read as a difference: the field after the step is u0 + D(z1) - D(z0), so that what latents don't hold
    stays as it was. Everything a loss needs comes out of ``forward``: wrappers such as DDP and FSDP allow no other
    way in.

    dt: the step, in the equation's time. field_mean, field_std: of the fields, in their units. latent_change: root
    mean square (RMS) of z1 - z0. field_change: RMS of u1 - u0, in the field's units. reach: changes at a shock, where
    nearly all of the error is, are far above the RMS; with their size as the unit the operator's last norm gets there
    in tens of updates, with the RMS it takes thousands. All are saved as buffers.
    """

    dt: Tensor
    field_mean: Tensor
    field_std: Tensor
    latent_change: Tensor
    field_change: Tensor
    reach: Tensor

    def __init__(
        self,
        encoder: GridEncoder,
        operator: LatentOperator,
        decoder: AnyPointDecoder,
        dt: float,
        field_mean: float = 0.0,
        field_std: float = 1.0,
        latent_change: float = 1.0,
        field_change: float = 1.0,
        reach: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.operator, self.decoder = encoder, operator, decoder
        fitted = {"field_mean": field_mean, "field_std": field_std, "field_change": field_change}
        for name, value in {"dt": dt, "reach": reach, "latent_change": latent_change, **fitted}.items():
            self.register_buffer(name, torch.tensor(float(value)))

    def forward(
        self, u0: Tensor, u1: Tensor | None = None, points: Tensor | None = None, predict: bool = True
    ) -> dict[str, Tensor]:
        """u0, u1: float32 (B, X), the field before and after the step, in its units.

        points: int64 (B, Q), the grid points at which the decoder is asked; all of them when None.
        predict: decode the predicted latent too.

        Returns ``z0`` and ``z1`` (B, T, D), z1 predicted, and with ``predict`` the field ``u1`` (B, Q), predicted.
        Where u1 is given, also ``z1_true``, and ``u1_true_latent`` (B, Q): the prediction that the decoder makes of
        the true latent, which shows what the decoder alone loses; and ``reconstruction`` (2 B, Q): D(z0), D(z1_true).
        """
        states = u0 if u1 is None else torch.cat((u0, u1))
        latents = self.encoder(((states - self.field_mean) / self.field_std)[:, None, None])
        z0 = latents[: u0.shape[0]]
        z1 = z0 + self.reach * self.latent_change * (self.operator(z0, self.dt) - z0)
        out = {"z0": z0, "z1": z1}
        asked = [latents, z1] if predict else [latents]
        decoded = self._decode(torch.cat(asked), points, u0.shape[1])
        before = u0 if points is None else u0.gather(1, points)
        if u1 is not None:
            out["z1_true"] = latents[u0.shape[0] :]
            out["reconstruction"] = decoded[: states.shape[0]]
            out["u1_true_latent"] = before + decoded[u0.shape[0] : states.shape[0]] - decoded[: u0.shape[0]]
        if predict:
            out["u1"] = before + decoded[states.shape[0] :] - decoded[: u0.shape[0]]
        return out

    def _decode(self, latents: Tensor, points: Tensor | None, size: int) -> Tensor:
        """The decoder's field, in its units, for latents that are a multiple of the rows of ``points``: (n B, Q)."""
        if points is None:
            points = torch.arange(size, device=latents.device)[None]
        x = ((points + 0.5) / size).to(latents.dtype)
        xy = torch.stack((x, torch.zeros_like(x)), -1).repeat(latents.shape[0] // x.shape[0], 1, 1)
        values = self.decoder(xy, latents, self.encoder.places(1, size))[..., 0]
        return values.to(latents.dtype) * self.field_std + self.field_mean
