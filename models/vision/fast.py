"""A small fast network for pictures of 32 to 64 pixels: a residual network with as few, as wide layers as will do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d


class FastNet(nn.Module):
    """Float pictures (B, 3, H, W), normalised, to logits (B, classes).

    In the manner of the networks that are trained on CIFAR-10 within minutes (ResNet-9, Page,
    myrtle.ai/how-to-train-your-resnet; airbench, Jordan, arXiv 2404.00498): few layers, max pooling early in each,
    residual ones between.

    stem: channels after the first convolution. widths: of the blocks, each of which halves H and W. scale: of the
    logits, which keeps the first losses, and with them the first updates, small.
    """

    def __init__(
        self, classes: int, *, stem: int = 16, widths: Sequence[int] = (48, 96, 192), scale: float = 0.125
    ) -> None:
        if classes < 1 or stem < 1 or not widths or min(widths) < 1:
            raise ValueError(f"needs classes, stem and widths of at least 1, not {classes=} {stem=} {widths=}")
        super().__init__()
        self.stem = Layer(3, stem)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip((stem, *widths), widths, strict=False)))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.scale = scale

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.blocks(self.stem(pictures))
        return self.head(features.amax((2, 3))) * self.scale  # where a thing is does not matter, that it is does


class Block(nn.Module):
    """(B, a, H, W) -> (B, b, H/2, W/2): more channels and half the size, then a residual layer."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.widen, self.refine = Layer(a, b, pool=True), Layer(b, b)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        return x + self.refine(x)


class Layer(nn.Module):
    """A 3 x 3 convolution, pooling, normalisation and ReLU: (B, a, H, W) -> (B, b, H, W), with ``pool`` half the size.

    weight: the kernels as a matrix (b, 9 a), which is what Muon steps.
    """

    def __init__(self, a: int, b: int, pool: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(b, a * 9))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Conv2d begins
        self.norm = nn.BatchNorm2d(b, momentum=0.3)  # runs are short
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.weight.view(len(self.weight), -1, 3, 3), padding=1)
        x = max_pool2d(x, 2) if self.pool else x  # first, as there is a quarter to normalise then
        return self.norm(x).relu_()
