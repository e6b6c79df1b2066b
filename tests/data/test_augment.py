"""Batched augmentation against slow references, a picture at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data.vision.augment import AREA, MEAN, RATIO, STD, cutout, erased, flipped, normalised, shifted
from fabric_trainer.random import SampleRandom

FUNCTIONS = {
    "shifted": lambda pictures, random: shifted(pictures, random, 3),
    "flipped": flipped,
    "normalised": lambda pictures, random: normalised(pictures, MEAN["cifar10"], STD["cifar10"]),
    "cutout": lambda pictures, random: cutout(pictures.float(), random, 5),
    "erased": lambda pictures, random: erased(pictures.float(), random, 0.6),
}


def pictures_of(batch: int, height: int, width: int) -> Tensor:
    """uint8, none of them 0, so that what was erased is seen."""
    generator = torch.Generator().manual_seed(batch * height * width)
    return torch.randint(1, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def random_of(batch: int, seed: int = 0, epoch: int = 1) -> SampleRandom:
    return SampleRandom(seed, epoch, torch.arange(batch) * 7 + 3)


sizes = st.tuples(st.integers(1, 9), st.integers(4, 12), st.integers(4, 12))


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 3), st.integers(0, 2**62))
def test_shifted_is_a_crop_of_the_mirrored_picture(shape, padding, seed):
    batch, height, width = shape
    pictures, random = pictures_of(*shape), random_of(batch, seed)
    starts = random.integers("shift", -padding, padding + 1, 2) + padding
    out = shifted(pictures, random, padding)
    assert out.dtype == torch.uint8
    for picture, start, got in zip(pictures.numpy(), starts.tolist(), out.numpy()):
        wide = np.pad(picture, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        assert (got == wide[:, start[0] : start[0] + height, start[1] : start[1] + width]).all()


def test_all_shifts_come_alike():
    """Pictures of their own coordinates say where they were cut: 25 places, chi-squared."""
    size, batch, padding = 9, 1 << 14, 2
    place = torch.arange(size * size, dtype=torch.uint8).view(1, 1, size, size).expand(batch, 1, size, size)
    centre = shifted(place, random_of(batch), padding)[:, 0, 4, 4].long()
    counts = torch.bincount(centre, minlength=size * size).view(size, size)
    assert counts.sum() == counts[2:7, 2:7].sum()
    expected = batch / 25
    assert ((counts[2:7, 2:7] - expected) ** 2 / expected).sum() < 51.2  # 24 degrees of freedom, one in a thousand


def test_a_padding_that_cannot_be_mirrored_is_refused():
    with pytest.raises(ValueError, match="4 x 4"):
        shifted(pictures_of(2, 4, 4), random_of(2), 4)


def test_half_of_the_pictures_are_flipped():
    pictures = pictures_of(4096, 4, 4)
    out = flipped(pictures, random_of(4096))
    mirrored = random_of(4096).uniform("flip", 1)[:, 0] < 0.5
    for picture, mirror, got in zip(pictures[:64], mirrored.tolist(), out):
        assert torch.equal(got, F.horizontal_flip(picture) if mirror else picture)
    assert torch.equal(out, torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures))
    assert abs(mirrored.sum() - 2048) < 4 * 32  # four standard deviations


@pytest.mark.parametrize("dataset", MEAN)
def test_normalised_is_torchvisions(dataset):
    pictures = pictures_of(5, 6, 7)
    expected = F.normalize(pictures.double() / 255, MEAN[dataset], STD[dataset])
    out = normalised(pictures, MEAN[dataset], STD[dataset])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_cifars_statistics_are_its_pictures(test_data):
    """Of 6,000 of the 50,000 pictures that the published figures are of."""
    import pickle

    folder = test_data / "data/images/cifar10/cifar-10-batches-py"
    if not folder.is_dir():
        pytest.skip(f"no CIFAR-10 at {folder}")
    batches = [pickle.loads(path.read_bytes(), encoding="latin1")["data"] for path in folder.glob("data_batch_*")]
    colours = np.concatenate(batches).reshape(-1, 3, 1024).transpose(1, 0, 2).reshape(3, -1) / 255
    assert np.abs(colours.mean(1) - MEAN["cifar10"]).max() < 0.005
    assert np.abs(colours.std(1) - STD["cifar10"]).max() < 0.005


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(1, 8), st.integers(0, 2**62))
def test_cutout_is_a_square_around_any_pixel(shape, size, seed):
    batch, height, width = shape
    pictures, random = pictures_of(*shape).float(), random_of(batch, seed)
    rows, columns = random.integers("cutout row", 0, height), random.integers("cutout column", 0, width)
    out = cutout(pictures, random, size)
    for picture, row, column, got in zip(pictures.numpy(), rows.tolist(), columns.tolist(), out.numpy()):
        expected, top, left = picture.copy(), row - size // 2, column - size // 2
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = 0
        assert (got == expected).all()


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 2**62))
def test_erased_is_the_papers_rectangle(shape, seed):
    batch, height, width = shape
    pictures, random = pictures_of(*shape).float(), random_of(batch, seed)
    out = erased(pictures, random, 0.7)
    for picture, draws, got in zip(pictures.numpy(), random.uniform("erase", 5).tolist(), out.numpy()):
        chance, area, ratio, row, column = draws
        expected = picture.copy()
        if chance < 0.7:
            pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
            sides = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
            rows, columns = min(round(math.sqrt(pixels * sides)), height), min(round(math.sqrt(pixels / sides)), width)
            top, left = int(row * (height - rows + 1)), int(column * (width - columns + 1))
            expected[:, top : top + rows, left : left + columns] = 0
        assert (got == expected).all()


def test_erasings_have_the_papers_areas_ratios_and_share():
    pictures = torch.ones(4096, 1, 100, 100)
    gone = erased(pictures, random_of(4096), 0.25)[:, 0] == 0
    hit = gone.flatten(1).any(1)
    assert abs(hit.sum() - 1024) < 4 * 28
    rows, columns = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    area, ratio = rows * columns / 1e4, (rows / columns).log()
    assert torch.equal(gone[hit].sum((1, 2)), rows * columns)  # whole rectangles, never cut by an edge
    assert AREA[0] - 0.005 < area.min() < AREA[0] + 0.01 and AREA[1] - 0.01 < area.max() < AREA[1] + 0.005
    assert abs(area.mean() - 0.175) < 4 * 0.0895 / 32  # standard deviations of uniform draws, over sqrt(1024)
    assert abs(ratio.mean() + 0.0053) < 4 * 0.692 / 32  # the mean of log 0.3 and log 3.3
    assert abs(ratio.std() - 0.692) < 0.03
    assert torch.equal(erased(pictures[:9], random_of(9), 0.0), pictures[:9])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_cut_of_a_batch_gives_the_same_bits(name):
    pictures, random = pictures_of(37, 11, 13), random_of(37)
    whole = FUNCTIONS[name](pictures, random)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 37), max_size=5))
    def check(cuts):
        edges = sorted({0, 37, *cuts})
        rows = [slice(a, b) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat([FUNCTIONS[name](pictures[part], random[part]) for part in rows]), whole)

    check()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_read_back_from_the_device(name):
    """On ``meta`` there is nothing to read: whatever would make the host wait for a GPU fails."""
    random = SampleRandom(0, 0, torch.arange(5, device="meta"))
    out = FUNCTIONS[name](pictures_of(5, 8, 8).to("meta"), random)
    assert out.device.type == "meta" and out.shape == (5, 3, 8, 8)


@pytest.mark.parametrize("name", ["flipped", "normalised", "cutout", "erased"])
def test_channels_last_stays(name):
    pictures, random = pictures_of(5, 8, 8), random_of(5)
    out = FUNCTIONS[name](pictures.to(memory_format=torch.channels_last), random)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, FUNCTIONS[name](pictures, random))


def test_an_evaluation_may_normalise_first():
    colours = (0.123, 0.2, 0.3), (0.4, 0.5, 0.6)
    with torch.inference_mode():
        normalised(pictures_of(1, 4, 4), *colours)
    pictures = normalised(pictures_of(1, 4, 4), *colours)
    weight = torch.ones(1, requires_grad=True)
    (pictures * weight).sum().backward()
    assert torch.equal(weight.grad, pictures.sum().view(1))
