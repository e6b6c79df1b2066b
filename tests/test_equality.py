"""Ten updates of the loop are bit-equal to a plain torch loop that imports nothing of ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toys import Points, Regression, config

from fabric_trainer import fit
from fabric_trainer.checkpoint import load


def plain_loop(fused: bool, steps: int = 10) -> tuple[dict, dict, list[float], list[float]]:
    """AdamW, clipping, accumulation of 3 x 4, cosine, EMA; 50 samples, so the fifth window of an epoch is ragged."""
    torch.manual_seed(42)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Dropout(0.0), torch.nn.Linear(16, 2))
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0, fused=fused)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    data, step, losses, norms = Points(50, 0), 0, [], []
    while step < steps:
        order = np.random.default_rng((42, step // 5)).permutation(50)
        for start in range(0, 50, 12):
            window, loss_sum = order[start : start + 12], 0.0
            for i in range(0, len(window), 4):
                rows = torch.from_numpy(window[i : i + 4])
                error = (net(data.x[rows]) - data.y[rows]).square().sum(1)
                loss = (error * torch.ones(len(rows))).sum()
                (loss / len(window)).backward()
                loss_sum += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5).item())
            opt.param_groups[0]["lr"] = 3e-3 * (0.5 * (1 + math.cos(math.pi * step / steps)))
            opt.step()
            opt.zero_grad()
            step += 1
            losses.append(loss_sum / len(window))
            decay = min(0.95, (1 + step) / (10 + step))
            for name, p in net.named_parameters():
                ema[name].lerp_(p.detach(), 1 - decay)
    return net.state_dict(), ema, losses, norms


@pytest.mark.parametrize("fused", [True, False])
def test_ten_updates_are_bit_equal_to_a_plain_loop(fabric, tmp_path, fused):
    settings = config(
        **{
            "batch.accumulate": 3,
            "optim.lr": 3e-3,
            "optim.args": {"fused": fused},
            "clip.norm": 0.5,
            "schedule.name": "cosine",
            "ema.decay": 0.95,
            "run.max_epochs": None,
            "run.max_steps": 10,
            "run.log_every_n_steps": 4,
        }
    )
    weights, ema, losses, norms = plain_loop(fused)
    state = fit(fabric, Regression(50), settings, tmp_path)
    saved = load(tmp_path / "checkpoints" / "last.pt")
    assert saved["counters"]["step"] == 10 and saved["counters"]["samples"] == 100
    for name, expected in weights.items():
        assert torch.equal(saved["model"][name], expected), name
        assert torch.equal(state.module.state_dict()[name], expected), name
        assert torch.equal(saved["ema"][name], ema[name]), name
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    assert [float(x) for x in column["train/loss"]] == losses
    assert [float(x) for x in column["grad_norm"]] == norms
    assert [int(x) for x in column["samples"]] == [12, 24, 36, 48, 50, 62, 74, 86, 98, 100]


def test_the_reference_trains_at_all():
    _, _, losses, norms = plain_loop(fused=False)
    assert losses[-1] < losses[0] and max(norms) > 0.5, "clipping must bite in the comparison"
