"""One update is the same update however it is split over micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import Points, Regression

from fabric_trainer.order import Order, Shuffled
from fabric_trainer.window import windows


def gradient(task: Regression, network: nn.Module, batches: list[dict], weight: float) -> Tensor:
    network.zero_grad()
    for batch in batches:
        (task.loss(network, batch).total / weight).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


class Weighted(Regression):
    def __init__(self, weights: Tensor) -> None:
        super().__init__(len(weights))
        self.points = Points(len(weights), 0, weights)
        self.points.x, self.points.y = self.points.x.double(), self.points.y.double()


@settings(max_examples=60, deadline=None)
@given(
    micro=st.integers(1, 7),
    accumulate=st.integers(1, 5),
    ranks=st.integers(1, 4),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0]), min_size=1, max_size=60),
    seed=st.integers(0, 5),
)
def test_gradient_of_every_window_equals_one_full_batch(micro, accumulate, ranks, weights, seed):
    weights = torch.tensor(weights, dtype=torch.float64)
    task, points = Weighted(weights), None
    points = task.points
    torch.manual_seed(0)
    network = task.network().double()
    plan = Shuffled(len(points), seed)
    orders = [Order(plan, micro, accumulate, ranks, rank) for rank in range(ranks)]
    effective = micro * accumulate * ranks
    updates = math.ceil(len(points) / effective)
    assert orders[0].first_window(1) == updates
    streams = [windows(task, points, order, seed) for order in orders]
    for number in range(updates):
        pieces = [next(stream) for stream in streams]
        assert len({len(piece.micro_batches) for piece in pieces}) == 1, "a rank would wait for another"
        total = sum(piece.weight for piece in pieces)
        rows = plan(0)[number * effective : (number + 1) * effective]
        assert total == weights[rows].sum()
        if total == 0:
            continue
        # the loop divides each rank's loss by total / ranks, and DDP averages over ranks
        mean = sum(gradient(task, network, p.micro_batches, total / ranks) for p in pieces) / ranks
        full = {"x": points.x[rows], "y": points.y[rows], "weight": weights[rows]}
        torch.testing.assert_close(mean, gradient(task, network, [full], float(total)), rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    samples=st.integers(1, 200),
    micro=st.integers(1, 9),
    accumulate=st.one_of(
        st.integers(1, 6),
        st.dictionaries(st.integers(1, 60), st.integers(1, 6), max_size=3).map(lambda d: {"window": {0: 2, **d}}),
        st.dictionaries(st.integers(1, 4), st.integers(1, 6), max_size=3).map(lambda d: {"epoch": {0: 2, **d}}),
    ),
    ranks=st.integers(1, 5),
)
def test_every_sample_once_an_epoch_whatever_the_cut(samples, micro, accumulate, ranks):
    plan = Shuffled(samples, 3)
    orders = [Order(plan, micro, accumulate, ranks, rank) for rank in range(ranks)]
    window = 0
    for epoch in range(4):
        seen: list[int] = []
        while window < orders[0].first_window(epoch + 1):
            span = orders[0].span(window)
            assert span.epoch == epoch and span.samples <= orders[0].effective_batch_size(window, epoch)
            pieces = [order.micro_batches(span) for order in orders]
            assert all(len(piece) == orders[0].micro_batch_count(span) for piece in pieces)
            sizes = {tuple(len(rows.index) for rows in piece) for piece in pieces}
            assert len(sizes) == 1 and max(sizes.pop()) <= micro, "ranks would run different shapes"
            real = np.concatenate([rows.index[rows.weight > 0] for piece in pieces for rows in piece])
            assert sum(len(rows.index) for piece in pieces for rows in piece) - len(real) < ranks
            # the global batch does not depend on the number of ranks
            assert sorted(real) == sorted(plan(epoch)[span.start : span.stop])
            seen.extend(real)
            window += 1
        assert sorted(seen) == list(range(samples))
        assert span.last


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 5), st.integers(0, 300))
def test_a_window_is_found_without_the_ones_before_it(samples, micro, window):
    accumulate = {"window": {0: 1, 7: 3, 20: 2}}
    walked = Order(Shuffled(samples, 0), micro, accumulate)
    for number in range(window + 1):
        span = walked.span(number)
    assert Order(Shuffled(samples, 0), micro, accumulate).span(window) == span
    planned = Order(Shuffled(samples, 0), micro, accumulate)
    planned.first_window(400)  # as a run that counts epochs asks at its start
    assert planned.span(window) == span
