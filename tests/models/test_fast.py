from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models.vision.fast import Block, FastNet, Layer


@pytest.mark.parametrize(("classes", "size"), [(10, 32), (7, 48), (10, 64)])
def test_logits_of_pictures_of_any_size_from_the_smallest(classes, size):
    assert FastNet(classes)(torch.randn(3, 3, size, size)).shape == (3, classes)
    small = FastNet(classes, stem=4, widths=(8, 8))
    assert small(torch.randn(2, 3, 4, 4)).shape == (2, classes)
    with pytest.raises(RuntimeError, match="too small"):
        small(torch.randn(2, 3, 3, 3))


def test_parameters():
    widths = (16, 48, 96, 192)
    kernels = 3 * 16 * 9 + sum(9 * (a * b + b * b) for a, b in pairwise(widths))
    norms = 2 * (16 + 2 * (48 + 96 + 192))
    found = sum(parameter.numel() for parameter in FastNet(10).parameters())
    assert found == kernels + norms + 192 * 10 == 653_456


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"widths": ()}, {"widths": (8, 0)}, {"stem": 0}])
def test_a_size_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        FastNet(**{"classes": 10} | wrong)


def reference(network: FastNet, x: Tensor) -> Tensor:
    """The same network from torch's own modules, in evaluation."""

    def layer(own: Layer, x: Tensor, pool: bool) -> Tensor:
        b, a = len(own.weight), own.weight.shape[1] // 9
        conv = nn.Conv2d(a, b, 3, padding=1, bias=False)
        conv.weight = nn.Parameter(own.weight.view(b, a, 3, 3))
        norm = nn.BatchNorm2d(b)
        norm.load_state_dict(own.norm.state_dict())
        return nn.Sequential(conv, nn.MaxPool2d(2) if pool else nn.Identity(), norm.eval(), nn.ReLU())(x)

    x = layer(network.stem, x, pool=False)
    for block in network.blocks:
        assert isinstance(block, Block)
        x = layer(block.widen, x, pool=True)
        x = x + layer(block.refine, x, pool=False)
    return nn.functional.linear(x.flatten(2).max(2).values, network.head.weight) * network.scale


def test_it_is_what_it_says():
    torch.manual_seed(0)
    network, x = FastNet(5, stem=4, widths=(8, 6), scale=0.5), torch.randn(3, 3, 16, 16)
    network.train()
    for _ in range(3):  # running statistics that are not the first ones
        network(torch.randn(8, 3, 16, 16) * 2 + 1)
    network.eval()
    torch.testing.assert_close(network(x), reference(network, x))
    laid_out = network(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(laid_out, network(x), rtol=1e-4, atol=1e-5)


def test_kernels_begin_as_torch_s():
    """Uniform within 1 / sqrt(9 a)."""
    torch.manual_seed(0)
    weight, bound = Layer(20, 50).weight, (9 * 20) ** -0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / 3**0.5) < 0.01 * bound


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = FastNet(10)
    cross_entropy(network(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_state_goes_from_one_to_another_strictly():
    torch.manual_seed(0)
    one, other, x = FastNet(10).eval(), FastNet(10).eval(), torch.randn(2, 3, 32, 32)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(x), other(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        FastNet(11).load_state_dict(one.state_dict())


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of stripes in four directions, of any phase and colour, under as much noise: (N, 3, 32, 32), (N,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    angle = labels * torch.pi / 4
    place = torch.arange(32.0)
    across = angle.cos()[:, None, None] * place + angle.sin()[:, None, None] * place[:, None]
    phase = torch.rand(count, 1, 1, generator=random) * 2 * torch.pi
    colour = torch.randn(count, 3, 1, 1, generator=random)
    pictures = (across + phase).sin()[:, None] * colour
    return pictures + torch.randn(count, 3, 32, 32, generator=random), labels


def test_it_learns():
    """The direction of stripes, from 256 pictures, on 200 others; guessing finds a quarter."""
    torch.manual_seed(0)
    network = FastNet(4, stem=8, widths=(16, 16))
    pictures, labels = stripes(256, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for step in range(48):
        rows = torch.arange(32) + 32 * (step % 8)
        cross_entropy(network(pictures[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    others, truth = stripes(200, 2)
    network.eval()
    with torch.no_grad():
        right = (network(others).argmax(1) == truth).float().mean().item()
    print(f"{right:.3f} of the others")
    assert right > 0.9
