"""From a picture to the uint8 tensor that a batch is stacked of: on the host, one at a time, by torchvision.

What can be done to a whole batch at once, crops of small pictures, flips, erasing and normalisation, is in
``augment``.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.vision.augment import MEAN
from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom

POLICIES = ("none", "default", "strong", "autoaugment", "randaugment")
SCALE = (0.35, 1.0)  # of a random crop, as a share of the picture: what is to be recognised is mostly still in it
MARGIN = 0.875  # of the shorter side, what an evaluation sees: 224 of 256 pixels

# AutoAugment was searched for CIFAR-10, SVHN and ImageNet. The MNISTs have no policy of their own: digits take that of
# the house numbers, clothes that of CIFAR-10
AUTOAUGMENT = {
    "cifar10": v2.AutoAugmentPolicy.CIFAR10,
    "cifar100": v2.AutoAugmentPolicy.CIFAR10,
    "mnist": v2.AutoAugmentPolicy.SVHN,
    "fashionmnist": v2.AutoAugmentPolicy.CIFAR10,
    "folder": v2.AutoAugmentPolicy.IMAGENET,
}


class EvalTransform:
    """picture -> uint8 (3, size, size), nothing drawn.

    fixed_size: all pictures of the set have one size, and are only resized; else the shorter side becomes size / 0.875
    and the centre is cut out. A picture of size x size is left as it is.
    """

    def __init__(self, size: int, fixed_size: bool) -> None:
        self.size, self.fixed_size = size, fixed_size

    def __call__(self, picture: Image.Image) -> Tensor:
        return F.pil_to_tensor(self.fitted(picture))

    def fitted(self, picture: Image.Image) -> Image.Image:
        """The same, as a picture."""
        size = [self.size, self.size]
        if picture.size == (self.size, self.size):
            return picture
        if self.fixed_size:
            return F.resize(picture, size)
        return F.center_crop(F.resize(picture, [round(self.size / MARGIN)]), size)


class TrainTransform:
    """(picture, seed) -> uint8 (3, size, size), a pure function of both.

    policy:
      none         what an evaluation does
      default      a random crop of 35 to 100% of the area, sides 3:4 to 4:3, resized; where all pictures have one size
                   (``fixed_size``) nothing: those are cropped as a batch, see ``augment.shifted``
      strong       default; rotation, shift, scale and shear; brightness, contrast, saturation and hue
      autoaugment  default; the policy found for the set or for one like it (Cubuk et al., arXiv 1805.09501)
      randaugment  default; 2 operations of magnitude 9 of 30 (Cubuk et al., arXiv 1909.13719)

    dataset: a name in ``augment.MEAN``, the colour that fills what comes into the picture; black for the MNISTs, as
    around their figures. InputError for another policy.
    """

    def __init__(self, size: int, policy: str, dataset: str, fixed_size: bool) -> None:
        if policy not in POLICIES:
            raise InputError(f"task.args.transforms: {policy!r} is none of {', '.join(POLICIES)}")
        cropped = policy != "none" and not fixed_size
        fit = v2.RandomResizedCrop(size, scale=SCALE) if cropped else EvalTransform(size, fixed_size).fitted
        fill = [0 if "mnist" in dataset else round(255 * share) for share in MEAN[dataset]]
        self.steps = [fit, *_policy(policy, dataset, fill)]

    def __call__(self, picture: Image.Image, seed: int) -> Tensor:
        # torchvision draws from torch's generator of the host, which dropout of the same process draws from too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for step in self.steps:
                picture = step(picture)
        return F.pil_to_tensor(picture)


def seeds(random: SampleRandom) -> list[int]:
    """Each sample's seed for its TrainTransform."""
    return random.integers("transform", 0, 2**62).tolist()


def _policy(policy: str, dataset: str, fill: list[int]) -> list[v2.Transform]:
    """What follows the crop. All of it is PIL's arithmetic, the same on any number of threads, which torch's
    convolutions, such as those of v2.GaussianBlur, don't promise."""
    smooth = v2.InterpolationMode.BILINEAR
    if policy == "strong":
        moved = v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), 10, smooth, fill)
        return [moved, v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)]
    if policy == "autoaugment":
        return [v2.AutoAugment(AUTOAUGMENT[dataset], smooth, fill)]
    if policy == "randaugment":
        return [v2.RandAugment(2, 9, interpolation=smooth, fill=fill)]
    return []
