"""Mixup and CutMix: their distributions, their arithmetic, and that nothing depends on the batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from data.vision.augment import erased, flipped, normalised, shifted
from data.vision.mix import drawn, mixed, partners_random, soft_loss
from fabric_trainer.random import SampleRandom
from fabric_trainer.window import cut

N = 4096
ALPHAS = [(0.2, 0.0), (0.0, 1.0), (0.8, 0.3)]


def random_of(batch: int, seed: int = 0) -> SampleRandom:
    return SampleRandom(seed, 3, torch.arange(batch) * 5 + 1)


def pictures_of(batch: int, size: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def area(box: Tensor) -> Tensor:
    top, left, bottom, right = box.unbind(1)
    return (bottom - top) * (right - left)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])  # of smaller ones float32 rounds too many to 1
def test_mixups_lambda_is_beta(alpha):
    mix = drawn(random_of(N), 100, 8, 8, alpha, 0.0)
    assert stats.kstest(mix["blend"].numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert torch.equal(mix["share"], mix["blend"]) and not area(mix["box"]).any()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_cutmixs_area_is_what_the_edges_leave(alpha):
    """Of a box of side s around a point that is anywhere, the edges leave s - s^2 / 4 on average, in each direction."""
    mix = drawn(random_of(N), 100, 1000, 3000, 0.0, alpha)
    expected = stats.beta(alpha, alpha).expect(lambda x: (np.sqrt(x) - x / 4) ** 2)
    share = 1 - mix["share"]
    assert abs(share.mean() - expected) < 4 * share.std() / N**0.5 + 1e-3  # whole pixels
    assert (mix["blend"] == 1).all()


def slow_share(box: list[int], size: int) -> float:
    picture = np.ones((size, size))
    picture[box[0] : box[2], box[1] : box[3]] = 0
    return picture.mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(2, 20), st.floats(0.1, 5), st.integers(0, 2**62))
def test_cutmix_is_the_papers(batch, size, alpha, seed):
    """Its box and its corrected lambda, from the same draws, a sample at a time."""
    random = random_of(batch, seed)
    mix = drawn(random, 10, size, size, 0.0, alpha)
    lambdas = stats.beta.ppf(random.uniform("lambda").double().numpy(), alpha, alpha)
    rows, columns = random.integers("box row", 0, size).tolist(), random.integers("box column", 0, size).tolist()
    pictures, partners = pictures_of(batch, size, 1), pictures_of(batch, size, 2)
    out = mixed(pictures, partners, mix)
    for i in range(batch):
        side = int(size * np.sqrt(1 - lambdas[i]))
        top, left = rows[i] - side // 2, columns[i] - side // 2
        box = [max(top, 0), max(left, 0), min(top + side, size), min(left + side, size)]
        assert mix["box"][i].tolist() == box
        assert mix["share"][i].item() == pytest.approx(slow_share(box, size), abs=1e-6)
        expected = pictures[i].clone()
        expected[:, box[0] : box[2], box[1] : box[3]] = partners[i][:, box[0] : box[2], box[1] : box[3]]
        assert torch.equal(out[i], expected)


def test_mixup_blends_by_lambda():
    mix = drawn(random_of(64), 10, 6, 6, 0.4, 0.0)
    pictures, partners = pictures_of(64, 6, 1), pictures_of(64, 6, 2)
    expected = torch.stack([b * x + (1 - b) * y for b, x, y in zip(mix["blend"], pictures, partners)])
    assert torch.equal(mixed(pictures, partners, mix), expected)


def test_with_both_each_sample_takes_either():
    mix = drawn(random_of(N), 10, 32, 32, 1.0, 0.5)
    cuts = mix["blend"] == 1
    assert abs(cuts.sum() - N / 2) < 4 * N**0.5 / 2
    assert not area(mix["box"])[~cuts].any()
    assert stats.kstest(mix["blend"][~cuts].numpy(), stats.uniform.cdf).pvalue > 0.01
    torch.testing.assert_close(mix["share"][cuts], 1 - area(mix["box"])[cuts] / 1024)


def test_partners_are_drawn_from_the_whole_set():
    counts = torch.bincount(drawn(random_of(N), 64, 8, 8, 1.0, 0.0)["partner"], minlength=64)
    assert len(counts) == 64 and stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize(("mixup", "cutmix"), ALPHAS)
def test_any_cut_of_a_batch_gives_the_same_bits(mixup, cutmix):
    """Cut by rows before it is drawn, and after, as the loop cuts a batch that it holds."""
    random, pictures, partners = random_of(29), pictures_of(29, 9, 1), pictures_of(29, 9, 2)
    mix = drawn(random, 50, 9, 9, mixup, cutmix)
    whole = mixed(pictures, partners, mix)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, 28), max_size=4, unique=True))
    def check(cuts):
        rows = [slice(a, b) for a, b in pairwise([0, *sorted(cuts), 29])]
        pieces = [drawn(random[part], 50, 9, 9, mixup, cutmix) for part in rows]
        assert all(torch.equal(torch.cat([piece[name] for piece in pieces]), mix[name]) for name in mix)
        outs = [mixed(pictures[part], partners[part], piece) for part, piece in zip(rows, pieces)]
        assert torch.equal(torch.cat(outs), whole)

    check()
    for size in (1, 4, 28):
        held = {"index": random.index, "pictures": pictures, "partners": partners, "mix": mix}
        outs = [mixed(piece["pictures"], piece["partners"], piece["mix"]) for piece in cut(held, size)]
        assert torch.equal(torch.cat(outs), whole)


def test_a_partner_comes_out_as_it_does_by_itself():
    """A set of 12 pictures, of which 5 are mixed: their partners are augmented as in a batch of the whole set."""
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def augmented(random: SampleRandom) -> Tensor:
        pictures = flipped(shifted(pixels[random.index], random, 2), random)
        return erased(normalised(pictures, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), random, 0.5)

    batch = SampleRandom(4, 7, torch.tensor([9, 0, 3, 3, 11]))
    mix = drawn(batch, 12, 16, 16, 0.3, 0.3)
    partners = augmented(partners_random(batch, mix))
    assert torch.equal(partners, augmented(SampleRandom(4, 7, torch.arange(12)))[mix["partner"]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_loss_is_torchs(smoothing):
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(40, 7, generator=generator, dtype=torch.float64).requires_grad_()
    labels, others = (torch.randint(0, 7, (40,), generator=generator) for _ in range(2))
    share = torch.rand(40, generator=generator, dtype=torch.float64)
    share[:3] = torch.tensor([0.0, 1.0, 0.5])
    targets = share[:, None] * F.one_hot(labels, 7) + (1 - share)[:, None] * F.one_hot(others, 7)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    got = soft_loss(logits, labels, others, share, smoothing)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (got, expected)))
    alone = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    assert torch.equal(soft_loss(logits, labels, others, torch.ones(40), smoothing), alone)


def test_nothing_is_read_back_from_the_device():
    mix = {name: rows.to("meta") for name, rows in drawn(random_of(5), 9, 8, 8, 1.0, 1.0).items()}
    pictures = pictures_of(5, 8, 1).to("meta")
    assert mixed(pictures, pictures, mix).device.type == "meta"
    labels = torch.zeros(5, dtype=torch.int64, device="meta")
    assert soft_loss(torch.zeros(5, 3, device="meta"), labels, labels, mix["share"], 0.1).shape == (5,)
