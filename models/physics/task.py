"""The physics system's task: the next state of Burgers' equation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.burgers import FRAME_TIME, Burgers, ensure
from data.pdebench import read
from fabric_trainer.errors import InputError
from fabric_trainer.task import Batch, Loss, Task
from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.network import PhysicsNetwork
from models.physics.operator import LatentOperator

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

ROLLOUT = 25  # steps that the picture shows
_TINY = 1e-8  # in the NRMSE's denominator, as the UPS has it

Settings = Mapping[str, Any]


class Pairs(Dataset[dict[str, Tensor]]):
    """Pairs (u0, u1) of states ``stride`` frames apart, float32 (X,) each, from trajectories u (N, T, X).

    every: frames between the starts of two pairs of one trajectory.
    """

    def __init__(self, u: Tensor, stride: int, every: int = 1) -> None:
        if u.shape[1] <= stride:
            raise ValueError(f"time_stride {stride} needs more than {u.shape[1]} frames")
        self.u, self.stride, self.every = u, stride, every
        self.starts = -(-(u.shape[1] - stride) // every)  # per trajectory

    def __len__(self) -> int:
        return len(self.u) * self.starts

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices)
        trajectory, frame = index // self.starts, index % self.starts * self.every
        return {"u0": self.u[trajectory, frame], "u1": self.u[trajectory, frame + self.stride]}


class BurgersOperator(Task):
    """Learn one step of Burgers' equation, u_t + (u^2/2)_x = (nu/pi) u_xx, in the latent space of a fixed encoder.

    nu: PDEBench's ``Nu``; the viscosity is nu / pi. nx: grid cells. train_samples, val_samples: trajectories, made by
    our own solver under the data root, from seeds of their own. frames: saved states per trajectory, 0.01 time units
    apart. time_stride: frames in a step. val_every: frames between the starts of two validation pairs.
    symmetries: shift each training pair around the period, and mirror half of them as u(x) -> -u(-x); the equation
    is the same after both.

    files: PDEBench HDF5 files to read instead, {"train": PATH, "val": PATH}, of one grid and frame spacing; nu, nx,
    frames and the numbers of samples are then the files'. file_dataset: the name of the field in them.

    tokens, dim: of the latents. patch, margin: the grid points that a token holds, and those on either side of them
    that it sees too. frequencies: of the encoder's position features, per unit length. encoder_seed: of its weights.
    architecture, core, norm_eps: of the LatentOperator. reach: of the PhysicsNetwork.
    decoder: arguments of the AnyPointDecoder, dim and fields left out. queries: points per pair at which the decoder
    is trained; they must divide nx. decoder_weight: of its loss beside the operator's.
    """

    def __init__(
        self,
        *,
        nu: float = 0.01,
        nx: int = 256,
        train_samples: int = 128,
        val_samples: int = 16,
        frames: int = 201,
        time_stride: int = 2,
        val_every: int = 8,
        symmetries: bool = True,
        files: dict[str, str] | None = None,
        file_dataset: str = "tensor",
        tokens: int = 128,
        dim: int = 64,
        patch: int = 2,
        margin: int = 16,
        frequencies: Sequence[float] = (1, 2, 4),
        encoder_seed: int = 42,
        architecture: str = "pdet_unet",
        core: Settings | None = None,
        norm_eps: float = 10.0,
        reach: float = 50.0,
        decoder: Settings | None = None,
        queries: int = 16,
        decoder_weight: float = 1.0,
    ) -> None:
        if time_stride < 1 or val_every < 1 or time_stride >= frames:
            raise ValueError(f"needs 1 <= time_stride < frames and val_every >= 1, not {time_stride=} {val_every=}")
        if queries < 1 or (nx % queries and not files):
            raise ValueError(f"queries must divide nx: {queries} does not divide {nx}")
        if files is not None and set(files) != {"train", "val"}:
            raise ValueError(f"files must name train and val, not {', '.join(files) or 'nothing'}")
        self.files, self.file_dataset = {split: Path(path) for split, path in (files or {}).items()}, file_dataset
        sizes: dict[str, Any] = {"nu": nu, "nx": nx, "frames": frames}
        self.sets = {
            "train": Burgers(samples=train_samples, seed=0, **sizes),
            "val": Burgers(samples=val_samples, seed=1, **sizes),
        }
        self.stride, self.val_every, self.symmetries = time_stride, val_every, symmetries
        self.queries, self.decoder_weight = queries, decoder_weight
        self.latent: dict[str, Any] = {"tokens": tokens, "dim": dim, "patch": (1, patch), "margin": (0, margin)}
        self.latent |= {"frequencies": tuple(frequencies), "seed": encoder_seed}
        self.step: dict[str, Any] = {"architecture": architecture, "core": core, "norm_eps": norm_eps}
        self.reading = dict(decoder or {})
        self.scales: dict[str, float] = {"dt": time_stride * FRAME_TIME, "reach": reach}
        self.data: dict[str, Tensor] = {}

    # ---- data -------------------------------------------------------------------------------------------------

    def prepare(self, root: Path) -> None:
        """Read ``files``, or make the trajectories under ``root``/burgers or check those that are there; fit the
        scales. InputError where a file isn't what it should be."""
        paths = self.files or {split: ensure(Path(root) / "burgers", made) for split, made in self.sets.items()}
        read_in = {split: read(path, self.file_dataset) for split, path in paths.items()}
        train = read_in["train"]
        if train.u.shape[2] % self.queries:
            raise InputError(f"queries must divide the grid: {self.queries} does not divide {train.u.shape[2]}")
        if self.files:
            self.scales["dt"] = self.stride * float(train.t[1] - train.t[0])
        self.data = {split: torch.from_numpy(trajectories.u) for split, trajectories in read_in.items()}
        self.scales |= self._fit(self.data["train"])

    def missing(self, root: Path) -> list[str]:
        """The files that are not there; those that the task makes are never missing."""
        return [
            f"task.args.files: {path} ({split}) is not there"
            for split, path in self.files.items()
            if not path.is_file()
        ]

    @torch.no_grad()
    def _fit(self, u: Tensor) -> dict[str, float]:
        """Mean and spread of the training fields, and the RMS of a step's change, in field and latents."""
        encoder = GridEncoder(**self.latent)
        mean, std = u.double().mean().item(), u.double().std().item()
        square = 0.0
        for trajectory in u:
            z = encoder(((trajectory - mean) / std)[:, None, None])
            square += (z[self.stride :] - z[: -self.stride]).double().pow(2).mean().item()
        change = (u[:, self.stride :] - u[:, : -self.stride]).double().pow(2).mean().sqrt().item()
        latent_change = math.sqrt(square / len(u))
        return {"field_mean": mean, "field_std": std, "field_change": change, "latent_change": latent_change}

    def dataset(self, split: str) -> Pairs | None:
        if split not in self.sets:
            return None
        if split not in self.data:
            raise ValueError("BurgersOperator.prepare(root) has to come first: it makes the data")
        return Pairs(self.data[split], self.stride, 1 if split == "train" else self.val_every)

    def augment(self, batch: Batch) -> Batch:
        if not self.symmetries:
            return batch
        random, size = batch["random"], batch["u0"].shape[1]
        place = torch.arange(size) + random.integers("shift", 0, size, 1)
        mirror = random.uniform("mirror", 1) < 0.5
        for name in ("u0", "u1"):
            shifted = batch[name].gather(1, place % size)
            batch[name] = torch.where(mirror, -shifted.flip(1), shifted)
        return batch

    # ---- training ---------------------------------------------------------------------------------------------

    def network(self) -> PhysicsNetwork:
        if "field_std" not in self.scales:
            raise ValueError("BurgersOperator.prepare(root) has to come first: the network's scales are fitted there")
        dim = self.latent["dim"]
        operator, decoder = LatentOperator(dim, **self.step), AnyPointDecoder(dim, **self.reading)
        return PhysicsNetwork(GridEncoder(**self.latent), operator, decoder, **self.scales)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """The operator's squared error on latents, and the decoder's on true latents at random points."""
        size = batch["u0"].shape[1]
        width = size // self.queries  # one point in each of as many equal stretches: none twice
        stretch = torch.arange(0, size, width, device=batch["u0"].device)
        points = stretch + batch["random"].integers("points", 0, width, self.queries)
        out = network(batch["u0"], batch["u1"], points, predict=False)
        return self._loss(out, batch, points)

    def _loss(self, out: dict[str, Tensor], batch: Batch, points: Tensor | None = None) -> Loss:
        """Sums over samples of mean squares: the operator's in units of the RMS change, and the decoder's for the
        change in its units plus that for the field in standard deviations."""
        u0, u1 = (batch[name] if points is None else batch[name].gather(1, points) for name in ("u0", "u1"))
        scales, weight = self.scales, batch["weight"]
        forward = _squares(out["z1"] - out["z1_true"]) / scales["latent_change"] ** 2
        change = _squares(out["u1_true_latent"] - u1) / scales["field_change"] ** 2
        level0, level1 = (_squares(error) for error in (out["reconstruction"] - torch.cat((u0, u1))).chunk(2))
        decoder = change + (level0 + level1) / (2 * scales["field_std"] ** 2)
        forward, decoder = (forward * weight).sum(), (decoder * weight).sum()
        return Loss(forward + self.decoder_weight * decoder, {"forward_loss": forward, "decoder_loss": decoder})

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, network: nn.Module, batch: Batch, meters: dict[str, Metric]) -> dict[str, Tensor]:
        """Mean squares per sample, summed over samples: of errors, and of what they are relative to."""
        u0, u1, weight = batch["u0"], batch["u1"], batch["weight"]
        out = network(u0, u1)
        loss = self._loss(out, batch)
        squares = {
            "latent": out["z1_true"],
            "latent_error": out["z1"] - out["z1_true"],
            "latent_persistence": out["z0"] - out["z1_true"],
            "field": u1,
            "field_error": out["u1"] - u1,
            "field_persistence": u0 - u1,
            "field_floor": out["u1_true_latent"] - u1,
        }
        sums = {name: (_squares(value) * weight).sum() for name, value in squares.items()}
        return {"loss": loss.total, **loss.logs, "weight": weight.sum(), **sums}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """``nrmse`` of predicted latents, ``nrmse_physical`` of predicted fields; ``…_persistence``: of predicting
        no change; ``…_floor``: of decoding the true latents; ``…_ratio``: to persistence.

        NRMSE = sqrt(mean of squared errors) / (sqrt(mean of squares) + 1e-8), over the whole split.
        """
        n = sums["weight"]

        def nrmse(error: str) -> float:
            return math.sqrt(sums[error] / n) / (math.sqrt(sums[error.split("_")[0]] / n) + _TINY)

        figures = {name: sums[name] / n for name in ("loss", "forward_loss", "decoder_loss")}
        for space, name in (("latent", "nrmse"), ("field", "nrmse_physical")):
            error, persistence = nrmse(f"{space}_error"), nrmse(f"{space}_persistence")
            figures |= {name: error, f"{name}_persistence": persistence}
            figures[f"{name}_ratio"] = error / (persistence + _TINY)
        return figures | {"nrmse_physical_floor": nrmse("field_floor")}

    def predict(self, network: nn.Module, batch: Batch) -> dict[str, Tensor | list[str]]:
        """``u1``: (B, X), the field after the step, at the grid points, in its units."""
        return {"u1": network(batch["u0"])["u1"]}

    def pictures(self, network: nn.Module, device: torch.device) -> dict[str, Figure]:
        """A rollout of two validation trajectories. The network is trained on single steps: its own short waves grow
        slowly, and after some forty steps they show."""
        from models.physics.pictures import rollout_figure

        truth = self.data["val"][:2, :: self.stride][:, : ROLLOUT + 1].to(device)
        title = f"{truth.shape[1] - 1} steps from the first state of {len(truth)} validation trajectories"
        return {title: rollout_figure(network, truth, self.scales["dt"])}


def _squares(x: Tensor) -> Tensor:
    """Mean square of each row, in float32 at least: (B, ...) -> (B,)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).flatten(1).mean(1)
