"""Random numbers that belong to samples: their definition, their independence and their distributions."""

from __future__ import annotations

import math
import pickle
import zlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fabric_trainer.random import SampleRandom, mixed, seed_torch

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 1 << 16
KS = 1.95 / math.sqrt(N)  # a true sample lies above with probability 0.001; the numbers below are fixed


def mix(x: int) -> int:
    """The finaliser of SplitMix64, in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def splitmix(state: int, draw: int) -> int:
    """The draw-th output (1, 2, …) of SplitMix64 from this state."""
    return mix((state + draw * GOLDEN) & MASK)


def reference_bits(seed: int, epoch: int, index: int, name: str, draws: int) -> list[int]:
    key = index
    for part in (seed, epoch, zlib.crc32(name.encode())):
        key = splitmix(key, part + 1)
    return [splitmix(key, draw) for draw in range(1, draws + 1)]


def test_the_reference_is_splitmix64():
    # the first outputs for state 1234567, as published at rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert [splitmix(1234567, k) for k in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


many = st.one_of(st.integers(0, 100), st.integers(0, 2**63 - 1))


@settings(max_examples=60, deadline=None)
@given(
    seed=many,
    epoch=st.integers(0, 10**6),
    index=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    name=st.text(max_size=8),
    shape=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
)
def test_values_are_those_of_a_plain_python_splitmix64(seed, epoch, index, name, shape):
    rows = SampleRandom(seed, epoch, torch.tensor(index))
    bits = [x for i in index for x in reference_bits(seed, epoch, i, name, math.prod(shape))]
    full = (len(index), *shape)
    uniform, normal, integers = (
        rows.uniform(name, *shape),
        rows.normal(name, *shape),
        rows.integers(name, -3, 7, *shape),
    )
    assert uniform.shape == normal.shape == integers.shape == full
    assert (uniform.dtype, normal.dtype, integers.dtype) == (torch.float32, torch.float32, torch.int64)
    assert uniform.flatten().tolist() == [(x >> 40) * 2.0**-24 for x in bits]
    assert integers.flatten().tolist() == [-3 + (x >> 1) % 10 for x in bits]
    expected = [
        math.sqrt(-2 * math.log(((x >> 32) + 0.5) * 2.0**-32)) * math.cos(2 * math.pi * (x & 0xFFFFFFFF) * 2.0**-32)
        for x in bits
    ]
    torch.testing.assert_close(normal.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-7)


# ---- whose numbers they are ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(40)), st.lists(st.integers(1, 39), max_size=4), st.sampled_from(["uniform", "normal"]))
def test_a_sample_has_its_numbers_in_any_batch_split_and_order(order, cuts, kind):
    whole = getattr(SampleRandom(3, 2, torch.arange(40)), kind)("noise", 2, 3)
    edges = [0, *sorted(cuts), 40]
    for start, stop in pairwise(edges):
        piece = torch.tensor(order[start:stop], dtype=torch.int64)
        assert torch.equal(getattr(SampleRandom(3, 2, piece), kind)("noise", 2, 3), whole[piece])


@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, None, 3), torch.tensor([4, 0, 4]), torch.arange(9) > 5])
def test_rows_of_a_batch(rows):
    index = torch.tensor([5, 1, 8, 8, 2, 0, 100, 3, 7])
    whole = SampleRandom(1, 0, index)
    assert torch.equal(whole[rows].normal("x", 3), whole.normal("x", 3)[rows])
    assert len(whole[rows]) == len(index[rows]) and len(whole) == 9


def test_drawing_keeps_no_state_and_touches_no_generator():
    before = torch.random.get_rng_state()
    rows = SampleRandom(1, 2, torch.arange(5))
    first = rows.uniform("a", 4)
    rows.normal("b")
    assert torch.equal(rows.uniform("a", 4), first)
    assert torch.equal(rows.uniform("a", 2, 2).flatten(1), first)
    assert torch.equal(rows.uniform("a", 3), first[:, :3]), "more numbers don't change the first ones"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_pickles_and_moves():
    rows = SampleRandom(1, 2, torch.arange(5))
    copy = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copy.normal("x", 2), rows.normal("x", 2))
    assert torch.equal(rows.to(torch.device("cpu"), non_blocking=True).normal("x", 2), rows.normal("x", 2))


def test_seed_epoch_index_and_name_each_give_other_numbers():
    index = torch.arange(1000)
    base = SampleRandom(1, 2, index).uniform("a")
    others = {
        "seed": SampleRandom(2, 2, index).uniform("a"),
        "epoch": SampleRandom(1, 3, index).uniform("a"),
        "swapped": SampleRandom(2, 1, index).uniform("a"),
        "name": SampleRandom(1, 2, index).uniform("b"),
        "index": SampleRandom(1, 2, index + 1).uniform("a"),
    }
    for what, other in others.items():
        assert (base == other).sum() <= 1, what
    assert len(torch.unique(SampleRandom(1, 2, index)._bits("a", (50,)))) == 50_000


# ---- distributions --------------------------------------------------------------------------------------------------


def samples(kind: str, along: str) -> Tensor:
    """N numbers along the samples, along one sample's draws, or along epochs."""
    if along == "samples":
        return getattr(SampleRandom(7, 0, torch.arange(N)), kind)("x").double()
    if along == "draws":
        return getattr(SampleRandom(7, 0, torch.tensor([0])), kind)("x", N).double().flatten()
    return torch.cat([getattr(SampleRandom(7, e, torch.arange(64)), kind)("x") for e in range(N // 64)]).double()


def distance(x: Tensor, cdf: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic; cdf: of x sorted."""
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())


@pytest.mark.parametrize("along", ["samples", "draws", "epochs"])
def test_uniform(along):
    x = samples("uniform", along)
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 4 * math.sqrt(1 / 12 / N)
    assert abs(x.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / N)
    assert distance(x, x.sort().values) < KS
    assert abs(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]) < 4 / math.sqrt(N)


@pytest.mark.parametrize("along", ["samples", "draws", "epochs"])
def test_normal(along):
    x = samples("normal", along)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(x.pow(power).mean() - moment) < 4 * math.sqrt(variance / N), power
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    assert distance(x, cdf) < KS
    assert 3.5 < x.abs().max() < 6
    assert abs(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]) < 4 / math.sqrt(N)


@pytest.mark.parametrize("low, high", [(0, 1), (0, 7), (-5, 5), (10, 266), (0, 1000)])
def test_integers(low, high):
    x = SampleRandom(7, 0, torch.arange(N)).integers("x", low, high)
    assert x.min() >= low and x.max() < high
    counts = torch.bincount(x - low, minlength=high - low).double()
    expected, freedom = N / (high - low), high - low - 1
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - freedom) <= 4 * math.sqrt(2 * freedom)


def test_neighbours_are_uncorrelated():
    def centred(seed: int, epoch: int, index: Tensor, name: str) -> Tensor:
        return SampleRandom(seed, epoch, index).normal(name).double()

    index = torch.arange(N)
    base = centred(0, 0, index, "a")
    others = {
        "index": centred(0, 0, index + 1, "a"),
        "epoch": centred(0, 1, index, "a"),
        "seed": centred(1, 0, index, "a"),
        "name": centred(0, 0, index, "b"),
        "number in the name": centred(0, 0, index, "a1"),
    }
    for what, other in others.items():
        assert abs((base * other).mean()) < 4 / math.sqrt(N), what
        assert abs((base.square() * other.square()).mean() - 1) < 4 * math.sqrt(8 / N), what
    bits = SampleRandom(0, 0, index)._bits("a", ())
    flipped = SampleRandom(0, 0, index ^ 1)._bits("a", ()) ^ bits
    share = torch.stack([(flipped >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(N / 2), "one bit of the index flips half of the bits"


# ---- torch's generators ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(many, min_size=1, max_size=4), st.data())
def test_mixed_depends_on_every_part_and_its_place(parts, data):
    expected = 0
    for part in parts:
        expected = splitmix(expected, part + 1)
    assert mixed(*parts) == expected >> 1 < 2**63
    place = data.draw(st.integers(0, len(parts) - 1))
    changed = [part + (place == i) for i, part in enumerate(parts)]
    assert mixed(*changed) != mixed(*parts)
    assert mixed(*parts, 0) != mixed(*parts)
    if parts != parts[::-1]:
        assert mixed(*parts[::-1]) != mixed(*parts)


def test_seeds_of_many_windows_and_ranks_differ():
    seeds = {mixed(42, window, rank) for window in range(2000) for rank in range(8)}
    assert len(seeds) == 16000


def test_seed_torch_makes_dropout_reproducible():
    dropout, x, cpu = nn.Dropout(0.5), torch.ones(1000), torch.device("cpu")

    def dropped(*parts: int) -> Tensor:
        seed_torch(cpu, *parts)
        return dropout(x)

    first = dropped(42, 7, 0)
    assert torch.equal(dropped(42, 7, 0), first)
    for other in [(43, 7, 0), (42, 8, 0), (42, 7, 1)]:
        agreement = (dropped(*other) == first).double().mean()
        assert 0.4 < agreement < 0.6, other
    assert torch.initial_seed() == mixed(42, 7, 1)
