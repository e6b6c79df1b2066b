"""The operator stage as a hand-written torch loop, which imports nothing of fabric_trainer.

``python plain_operator.py FILE OUT SETTINGS``: the trajectories' HDF5 file, where the weights go, and a JSON object.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.losses import spectral_amplitude_loss
from models.physics.operator import LatentOperator

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def query_points(seed: int, epoch: int, rows: np.ndarray, points: int, queries: int) -> Tensor:
    """Those with the largest of random 62-bit keys of each sample's own."""
    keys = rows.astype(np.uint64)
    for part in (seed, epoch, zlib.crc32(b"queries")):
        keys = mixed(keys + GOLDEN * np.array(part + 1, np.uint64))
    bits = mixed(keys[:, None] + np.arange(1, points + 1, dtype=np.uint64) * GOLDEN)
    order = np.argsort(-((bits >> np.uint64(1)) % np.uint64(1 << 62)).astype(np.int64), axis=1)
    return torch.from_numpy(order[:, :queries].copy())


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).flatten(1).mean(1)


def train(u: np.ndarray, given: dict[str, Any]) -> dict[str, Any]:
    """u: float32 (N, T, X)."""
    stride, horizon, queries = given["time_stride"], given["rollout_horizon"], given["queries"]
    size, wide = u.shape[2], u.astype(np.float64)
    mean = wide.mean()
    std = np.sqrt(((wide - mean) ** 2).sum() / wide.size)
    encoder = GridEncoder(**given["encoder"])
    normal = (torch.from_numpy(u)[:, :, None, None] - np.float32(mean).item()) / np.float32(std).item()
    with torch.no_grad():
        z = torch.cat([encoder(states) for states in normal.flatten(0, 1).split(256)]).unflatten(0, normal.shape[:2])
    change = (normal[:, stride:] - normal[:, :-stride]).double().pow(2).flatten(1).mean(1).sum().item()
    field_change = torch.tensor(math.sqrt(change / len(u)), dtype=torch.float32)

    torch.manual_seed(given["seed"])
    operator = LatentOperator(given["dim"], core=given["core"])
    decoder = AnyPointDecoder(given["dim"], 1, **given["decoder"])
    network = nn.ModuleDict({"operator": operator, "decoder": decoder})
    network.train()
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": given["weight_decay"]},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=given["lr"], fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    places = encoder.places(1, size)

    starts = -(-u.shape[1] // stride) - horizon
    pairs, effective = len(u) * starts, given["micro"] * given["accumulate"]
    step, epoch, losses, norms = 0, 0, [], []
    while step < given["steps"]:
        order = np.random.default_rng((given["seed"], epoch)).permutation(pairs)
        for begin in range(0, pairs, effective):
            window, loss_sum = order[begin : begin + effective], 0.0
            for first in range(0, len(window), given["micro"]):
                rows = window[first : first + given["micro"]]
                sample, frame = rows // starts, rows % starts * stride
                z0, z1_true = z[sample, frame], z[sample, frame + stride]
                z_future = z[sample[:, None], frame[:, None] + stride * np.arange(2, horizon + 1)]
                z1 = operator(z0, torch.tensor(given["dt"]))
                forward = mean_square(z1 - z1_true)
                spectral = spectral_amplitude_loss(z1, z1_true)
                states = [z1]
                for _ in range(horizon - 1):
                    states.append(operator(states[-1], torch.tensor(given["dt"])))
                errors = [mean_square(state - z_future[:, k]) for k, state in enumerate(states[1:])]
                rollout = torch.stack(errors, 1).mean(1)

                points = query_points(given["seed"], epoch, rows, size, queries)
                u0, u1 = (normal[sample, at].flatten(1).gather(1, points)[..., None] for at in (frame, frame + stride))
                x = (points % size + 0.5) / size
                xy = torch.stack((x, torch.full_like(x, 0.5)), -1)
                read = decoder(torch.cat((xy, xy)), torch.cat((z0, z1_true)), places)
                error0, error1 = (read - torch.cat((u0, u1))).chunk(2)
                level = (mean_square(error0) + mean_square(error1)) / 2
                reading = level + mean_square(error1 - error0) / field_change**2

                weights = (1.0, given["spectral_weight"], given["rollout_weight"], 1.0)
                terms = (forward, spectral, rollout, reading)
                loss = sum(weight * term.sum() for weight, term in zip(weights, terms, strict=True))
                (loss / len(window)).backward()
                loss_sum += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(trained, given["clip"]).item())
            for group in optimizer.param_groups:
                group["lr"] = given["lr"] * (0.5 * (1 + math.cos(math.pi * step / given["steps"])))
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss_sum / len(window))
            decay = min(given["ema"], (1 + step) / (10 + step))
            for name, p in network.named_parameters():
                average[name].lerp_(p.detach(), 1 - decay)
            if step == given["steps"]:
                break
        epoch += 1
    return {"model": network.state_dict(), "ema": average, "losses": losses, "norms": norms}


def main() -> None:
    source, out, given = sys.argv[1:]
    torch.set_num_threads(2)
    with h5py.File(source) as file:
        u = file["tensor"][:]
    torch.save(train(u, json.loads(given)), out)
    ours = [name for name in sys.modules if name.split(".")[0] in ("fabric_trainer", "lightning")]
    assert not ours, ours


if __name__ == "__main__":
    main()
