"""Query points and taus: their distributions, and that each sample has its own whatever it came with."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from fabric_trainer.random import SampleRandom
from models.physics.draws import at_points, query_points, taus

GRIDS = [(1, 32, 8), (6, 8, 16), (6, 8, 11), (5, 7, 20), (2, 64, 30), (1, 10, 7), (3, 3, 9), (3, 3, 100), (4, 4, 1)]


def random_of(batch: int) -> SampleRandom:
    return SampleRandom(3, 2, torch.arange(batch) * 5 + 1)


def rows(random: SampleRandom, cut: int) -> tuple[SampleRandom, SampleRandom]:
    return random[:cut], random[cut:]


# ---- points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, queries", GRIDS)
@pytest.mark.parametrize("stratified", [False, True])
def test_query_points_are_different_points(height: int, width: int, queries: int, stratified: bool) -> None:
    points = query_points(random_of(50), height, width, queries, stratified)
    assert points.dtype == torch.int64 and points.shape == (50, min(queries, height * width))
    assert points.min() >= 0 and points.max() < height * width
    assert all(len(set(row)) == len(row) for row in points.tolist())
    if 1 < queries < height * width / 2:
        assert len({tuple(sorted(row)) for row in points.tolist()}) > 40  # each sample's own


@pytest.mark.parametrize("stratified", [False, True])
def test_query_points_do_not_depend_on_the_split(stratified: bool) -> None:
    random = random_of(7)
    parts = [query_points(part, 6, 8, 11, stratified) for part in rows(random, 3)]
    assert torch.equal(torch.cat(parts), query_points(random, 6, 8, 11, stratified))
    assert not torch.equal(query_points(random, 6, 8, 11, stratified, name="other"), torch.cat(parts))


@pytest.mark.parametrize("height, width, queries", [(4, 6, 5), (4, 6, 4), (1, 24, 6), (4, 6, 7)])
@pytest.mark.parametrize("stratified", [False, True])
def test_every_point_is_as_likely(height: int, width: int, queries: int, stratified: bool) -> None:
    """Where blocks are equal, those of strata too: also the points beyond the blocks are uniform by symmetry."""
    points = query_points(random_of(4000), height, width, queries, stratified)
    counts = torch.bincount(points.flatten(), minlength=height * width)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize("height, width, queries, blocks", [(6, 8, 4, (2, 2)), (6, 8, 11, (3, 3)), (1, 10, 5, (1, 5))])
def test_each_block_has_its_point(height: int, width: int, queries: int, blocks: tuple[int, int]) -> None:
    points = query_points(random_of(200), height, width, queries, stratified=True)
    y, x = points // width, points % width

    def block(place: Tensor, size: int, count: int) -> Tensor:
        edges = torch.tensor([size * i // count for i in range(1, count)])
        return torch.bucketize(place, edges, right=True)

    which = block(y, height, blocks[0]) * blocks[1] + block(x, width, blocks[1])
    count = blocks[0] * blocks[1]
    assert (which[:, :count].sort(1).values == torch.arange(count)).all()


def test_fields_at_points() -> None:
    fields = torch.randn(3, 2, 4, 5)
    points = query_points(random_of(3), 4, 5, 6)
    values = at_points(fields, points)
    assert values.shape == (3, 6, 2)
    for b, row in enumerate(points.tolist()):
        for q, point in enumerate(row):
            assert torch.equal(values[b, q], fields[b, :, point // 5, point % 5])


# ---- taus ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (1.2, 1.2), (0.5, 2.0)])
def test_taus_are_betas(alpha: float, beta: float) -> None:
    drawn = taus(random_of(2000), 3, alpha, beta)
    assert drawn.shape == (2000, 3) and drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert stats.kstest(drawn.flatten().numpy(), stats.beta(alpha, beta).cdf).pvalue > 0.01
    assert abs(stats.pearsonr(drawn[:, 0], drawn[:, 1]).statistic) < 0.1


def test_taus_do_not_depend_on_the_split() -> None:
    random = random_of(9)
    assert torch.equal(torch.cat([taus(part, 4, 1.2, 1.2) for part in rows(random, 4)]), taus(random, 4, 1.2, 1.2))
