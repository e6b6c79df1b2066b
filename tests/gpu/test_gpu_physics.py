"""On one GPU: the operator learns where every algorithm has to be deterministic."""

from __future__ import annotations

import pytest
import torch
from gpus import needs
from torch import Tensor

from models.physics.operator import UNetCore

pytestmark = [pytest.mark.gpu, needs(1)]


def learned(device: str, deterministic: bool) -> list[Tensor]:
    """The output of a token U-Net on 13 tokens, which are halved to 7, and the gradients of its weights."""
    torch.manual_seed(0)
    core = UNetCore(8, 16, depths=(1, 1), group_size=8, num_heads=2).to(device)
    x = torch.randn(3, 13, 8).to(device)
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = core(x)
        out.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach().cpu(), *(weight.grad.cpu() for weight in core.parameters() if weight.grad is not None)]


def test_the_token_unet_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    expected = learned("cpu", False)
    for deterministic in (True, False):
        for got, wanted in zip(learned("cuda", deterministic), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
