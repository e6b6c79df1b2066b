"""Augmentation of a whole batch at once, on the device that holds it.

Every draw belongs to a sample (SampleRandom), so that a picture comes out the same whatever batch it is in, and no
function here makes the host wait for the device. The order that makes sense: crop and flip in uint8, a quarter of the
bytes, then ``normalised``, then ``cutout`` or ``erased``, which fill with 0, the mean colour.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fabric_trainer.random import SampleRandom

Colour = tuple[float, float, float]  # red, green, blue, in [0, 1]

# of each set's training pictures; ImageNet's for folders, as pretrained networks expect
MEAN: dict[str, Colour] = {
    "cifar10": (0.4914, 0.4822, 0.4465),
    "cifar100": (0.5071, 0.4865, 0.4409),
    "mnist": (0.1307, 0.1307, 0.1307),
    "fashionmnist": (0.2860, 0.2860, 0.2860),
    "folder": (0.485, 0.456, 0.406),
}
STD: dict[str, Colour] = {
    "cifar10": (0.2470, 0.2435, 0.2616),
    "cifar100": (0.2673, 0.2564, 0.2762),
    "mnist": (0.3081, 0.3081, 0.3081),
    "fashionmnist": (0.3530, 0.3530, 0.3530),
    "folder": (0.229, 0.224, 0.225),
}

AREA = (0.02, 0.33)  # of a random erasing, as a share of the picture
RATIO = (0.3, 3.3)  # its height by its width


def shifted(pictures: Tensor, random: SampleRandom, padding: int) -> Tensor:
    """Random crops, at their old size, of pictures padded by ``padding`` < H, W: (B, C, H, W), any dtype.

    The padding mirrors the picture at its edge pixel, which makes no border that a network could learn.
    """
    batch, channels, height, width = pictures.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"a picture of {height} x {width} can't be mirrored {padding} pixels beyond its edge")
    start = random.integers("shift", -padding, padding + 1, 2)
    rows, columns = _mirrored(start[:, :1], height), _mirrored(start[:, 1:], width)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1)
    return pictures.flatten(2).gather(2, places.expand(-1, channels, -1)).view(batch, channels, height, width)


def flipped(pictures: Tensor, random: SampleRandom) -> Tensor:
    """Half of the pictures mirrored left to right: (B, C, H, W), any dtype."""
    mirror = random.uniform("flip", 1, 1, 1) < 0.5
    return torch.where(mirror, pictures.flip(3), pictures)


def normalised(pictures: Tensor, mean: Colour, std: Colour) -> Tensor:
    """(pictures / 255 - mean) / std: uint8 (B, 3, H, W) -> float32, in the memory format it came in."""
    centre, scale = _constants(tuple(mean), tuple(std), pictures.device)
    return pictures.to(torch.float32).sub_(centre).mul_(scale)


def cutout(pictures: Tensor, random: SampleRandom, size: int) -> Tensor:
    """A square of ``size`` pixels set to 0 in each picture: float (B, C, H, W), normalised.

    Its centre is any pixel, so that part of it may lie outside (DeVries & Taylor, arXiv 1708.04552).
    """
    height, width = pictures.shape[2:]
    top = random.integers("cutout row", 0, height) - size // 2
    left = random.integers("cutout column", 0, width) - size // 2
    return torch.where(inside(pictures, top, left, top + size, left + size), 0, pictures)


def erased(pictures: Tensor, random: SampleRandom, probability: float) -> Tensor:
    """A rectangle set to 0 in this share of the pictures: float (B, C, H, W), normalised.

    Random erasing (Zhong et al., arXiv 1708.04896): area and place are uniform, the ratio of its sides is
    log-uniform as in torchvision. A side that would be longer than the picture's is as long.
    """
    height, width = pictures.shape[2:]
    # float64, where there is one: there the last digit of exp, which depends on a row's place, never shows
    wide = torch.float32 if pictures.device.type == "mps" else torch.float64
    chance, area, ratio, row, column = random.uniform("erase", 5).to(wide).unbind(1)
    area = (AREA[0] + area * (AREA[1] - AREA[0])) * (height * width)
    ratio = (math.log(RATIO[0]) + ratio * math.log(RATIO[1] / RATIO[0])).exp()
    rows = (area * ratio).sqrt().round().clamp(max=height) * (chance < probability)  # none: an empty rectangle
    columns = (area / ratio).sqrt().round().clamp(max=width)
    top, left = (row * (height - rows + 1)).floor(), (column * (width - columns + 1)).floor()
    return torch.where(inside(pictures, top, left, top + rows, left + columns), 0, pictures)


def inside(pictures: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Which pixels lie in each picture's rectangle, from top and left up to bottom and right without these: the
    bounds (B,), in pixels -> bool (B, 1, H, W)."""
    height, width = pictures.shape[2:]
    rows = torch.arange(height, device=pictures.device)[:, None]
    columns = torch.arange(width, device=pictures.device)
    top, left, bottom, right = (bound.view(-1, 1, 1, 1) for bound in (top, left, bottom, right))
    return ((top <= rows) & (rows < bottom)) & ((left <= columns) & (columns < right))


def _mirrored(start: Tensor, size: int) -> Tensor:
    """The pixels start … start + size - 1 of a line that is mirrored at both ends: int64 (B, 1) -> (B, size)."""
    last = size - 1
    return last - (last - (start + torch.arange(size, device=start.device)).abs()).abs()


@lru_cache
def _constants(mean: Colour, std: Colour, device: torch.device) -> tuple[Tensor, Tensor]:
    """What to subtract from pixels of 0 … 255 and to multiply them by then; kept, as a copy to a GPU would wait."""
    centre, spread = (255 * torch.tensor(colour, device=device).view(3, 1, 1) for colour in (mean, std))
    return centre, 1 / spread
