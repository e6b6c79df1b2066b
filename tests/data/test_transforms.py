"""Pictures on the host: a pure function of the picture and its seed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data.vision.transforms import AUTOAUGMENT, POLICIES, EvalTransform, TrainTransform, seeds
from fabric_trainer.errors import InputError
from fabric_trainer.random import SampleRandom

CASES = [("cifar10", True, 32), ("mnist", True, 28), ("folder", False, 24)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that a shift of a pixel changes little and an inversion much."""
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 1, 1))
    y, x = np.mgrid[:height, :width] / max(width, height)
    return Image.fromarray((127 + 120 * np.sin(phase + 5 * x + 3 * y)).astype(np.uint8).transpose(1, 2, 0))


def of_case(fixed_size: bool, number: int) -> Image.Image:
    return picture(32, 32, number) if fixed_size else picture(40 + 3 * number, 60 - number, number)


class Transformed(Dataset[Tensor]):
    def __init__(self, transform: TrainTransform, fixed_size: bool) -> None:
        self.transform, self.fixed_size = transform, fixed_size

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(of_case(self.fixed_size, index), 1000 + index)


@pytest.mark.parametrize(("dataset", "fixed_size", "size"), CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_pure_function_of_picture_and_seed(policy, dataset, fixed_size, size):
    """Forwards, backwards and after other draws, which it leaves as they were."""
    transform = TrainTransform(size, policy, dataset, fixed_size)
    pictures = [of_case(fixed_size, number) for number in range(12)]
    first = [transform(picture, 1000 + number) for number, picture in enumerate(pictures)]
    assert all(out.dtype == torch.uint8 and out.shape == (3, size, size) for out in first)

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    again = [transform(pictures[number], 1000 + number) for number in reversed(range(12))]
    assert torch.equal(torch.stack(again[::-1]), torch.stack(first))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()

    others = torch.stack([transform(picture, 77) for picture in pictures])
    nothing_drawn = policy == "none" or (policy == "default" and fixed_size)
    assert torch.equal(others, torch.stack(first)) == nothing_drawn


def test_workers_change_nothing():
    """The strongest draws of each kind, in this process and in two others."""
    for policy, (dataset, fixed_size, size) in zip(("autoaugment", "randaugment", "strong"), CASES):
        samples = Transformed(TrainTransform(size, policy, dataset, fixed_size), fixed_size)
        here = torch.cat(list(DataLoader(samples, 4)))
        torch.manual_seed(1)
        assert torch.equal(here, torch.cat(list(DataLoader(samples, 4, num_workers=2))))


def test_threads_change_nothing():
    for policy, (dataset, fixed_size, size) in zip(("autoaugment", "randaugment", "strong"), CASES):
        samples = Transformed(TrainTransform(size, policy, dataset, fixed_size), fixed_size)
        torch.set_num_threads(1)
        one = torch.stack([samples[i] for i in range(12)])
        torch.set_num_threads(2)
        assert torch.equal(one, torch.stack([samples[i] for i in range(12)]))


@pytest.mark.parametrize("policy", ["none", "default"])
def test_pictures_of_one_size_are_left_to_the_batch(policy):
    same = picture(32, 32)
    out = TrainTransform(32, policy, "cifar10", True)(same, 3)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(same))
    bigger = TrainTransform(48, policy, "cifar10", True)(same, 3)
    assert np.array_equal(bigger.permute(1, 2, 0).numpy(), np.asarray(same.resize((48, 48), Image.BILINEAR)))


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (64, 64), (32, 32), (20, 31)])
def test_evaluation_sees_the_centre_of_seven_eighths(width, height):
    """PIL's own resize and crop; 32 / 0.875 is 37 (36.57), and the longer side keeps the ratio, rounded down."""
    seen = EvalTransform(32, False)(picture(width, height)).permute(1, 2, 0).numpy()
    if (width, height) == (32, 32):
        assert np.array_equal(seen, np.asarray(picture(32, 32)))
        return
    short = min(width, height)
    resized = picture(width, height).resize((int(37 * width / short), int(37 * height / short)), Image.BILINEAR)
    left, top = (round((side - 32) / 2) for side in resized.size)
    assert np.array_equal(seen, np.asarray(resized.crop((left, top, left + 32, top + 32))))
    assert np.array_equal(
        TrainTransform(32, "none", "folder", False)(picture(width, height), 9), seen.transpose(2, 0, 1)
    )


def test_random_crops_take_their_share_of_the_picture():
    """A picture whose red is x and whose green is y tells how much of it is left: 35 to 100% of the area."""
    y, x = np.mgrid[:200, :200] * 255 / 199
    ramp = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    out = torch.stack([TrainTransform(50, "default", "folder", False)(ramp, seed) for seed in range(400)]).float()
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / 255 * 50 / 49
    height = (out[:, 1, -1, 0] - out[:, 1, 0, 0]) / 255 * 50 / 49
    share, ratio = width * height, width / height
    assert 0.33 < share.min() < 0.4 and 0.9 < share.max() < 1.03
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.37


@pytest.mark.parametrize(("dataset", "fixed_size", "size"), CASES)
def test_policies_are_torchvisions(dataset, fixed_size, size):
    """The same draws by torchvision's own classes, after the crop where there is one."""
    fill = [0] * 3 if dataset == "mnist" else {"cifar10": [125, 123, 114], "folder": [124, 116, 104]}[dataset]
    smooth = v2.InterpolationMode.BILINEAR
    references = {
        "autoaugment": v2.AutoAugment(AUTOAUGMENT[dataset], smooth, fill),
        "randaugment": v2.RandAugment(2, 9, interpolation=smooth, fill=fill),
    }
    for policy, reference in references.items():
        crop = v2.Resize((size, size)) if fixed_size else v2.RandomResizedCrop(size, (0.35, 1.0))
        for seed in range(6):
            torch.manual_seed(seed)
            expected = v2.functional.pil_to_tensor(reference(crop(of_case(fixed_size, seed))))
            got = TrainTransform(size, policy, dataset, fixed_size)(of_case(fixed_size, seed), seed)
            assert torch.equal(got, expected)


def test_another_policy_is_refused():
    with pytest.raises(InputError, match=r"task\.args\.transforms: 'weak' is none of none, default, strong"):
        TrainTransform(32, "weak", "cifar10", True)


def test_seeds_belong_to_the_samples():
    together = seeds(SampleRandom(1, 2, torch.arange(50)))
    assert len(set(together)) == 50 and together[7:9] == seeds(SampleRandom(1, 2, torch.arange(7, 9)))
    assert together != seeds(SampleRandom(1, 3, torch.arange(50)))
