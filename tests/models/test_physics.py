from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import default_collate

from fabric_trainer.random import SampleRandom
from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.operator import LatentOperator
from models.physics.task import BurgersOperator, Pairs

TINY: dict[str, Any] = {
    "nx": 64,
    "frames": 21,
    "train_samples": 6,
    "val_samples": 3,
    "tokens": 32,
    "dim": 24,
    "margin": 4,
    "queries": 8,
    "core": {"hidden_dim": 32, "depths": [1, 1], "group_size": 16, "num_heads": 2},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "frequencies": [1, 2, 4, 8]},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> BurgersOperator:
    made = BurgersOperator(**TINY)
    made.prepare(tmp_path_factory.mktemp("data"))
    return made


@pytest.fixture
def network(task: BurgersOperator) -> nn.Module:
    """Away from its start, where the operator does nothing yet."""
    torch.manual_seed(0)
    made = task.network()
    nn.init.normal_(made.operator.output_norm.weight, std=0.1)
    return made


def batch_of(task: BurgersOperator, split: str, index: list[int]) -> dict[str, Any]:
    batch: dict[str, Any] = task.dataset(split).__getitems__(index)  # type: ignore[union-attr]
    random = SampleRandom(1, 0, torch.tensor(index))
    return batch | {"index": torch.tensor(index), "weight": torch.ones(len(index)), "random": random}


# ---- encoder ------------------------------------------------------------------------------------------------------


def test_encoder_is_the_same_everywhere_and_frozen() -> None:
    torch.manual_seed(1)
    one = GridEncoder(16, 8)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # building it left the global generator alone
    torch.manual_seed(2)
    two, other = GridEncoder(16, 8), GridEncoder(16, 8, seed=7)
    assert all(torch.equal(one.state_dict()[k], v) for k, v in two.state_dict().items())
    assert not torch.equal(one.project.weight, other.project.weight)
    assert len(one.state_dict()) == 6 and not any(p.requires_grad for p in one.parameters())


def test_encoder_without_margin_is_a_mean_of_points() -> None:
    encoder, u = GridEncoder(8, 6), torch.randn(3, 1, 1, 32)
    field_part = encoder(u) - encoder(torch.zeros_like(u))
    expected = u.reshape(3, 8, 4).mean(2, keepdim=True) * encoder.project.weight[:, 0]
    torch.testing.assert_close(field_part, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 15), patch=st.sampled_from([1, 2]), margin=st.integers(0, 5))
def test_encoder_moves_with_the_field(shift: int, patch: int, margin: int) -> None:
    encoder = GridEncoder(16, 20, patch=(1, patch), margin=(0, margin))
    u = torch.randn(2, 1, 1, 16 * patch, generator=torch.Generator().manual_seed(shift))
    still = encoder(torch.zeros_like(u))
    moved = encoder(u.roll(shift * patch, 3)) - still
    torch.testing.assert_close(moved, (encoder(u) - still).roll(shift, 1), atol=1e-5, rtol=1e-5)


def test_encoder_in_two_dimensions() -> None:
    encoder = GridEncoder(12, 10, channels=2, patch=(2, 2), margin=(1, 1))
    assert encoder(torch.randn(2, 2, 6, 8)).shape == (2, 12, 10)
    places = encoder.places(6, 8)
    torch.testing.assert_close(places[:5, 0], torch.tensor([0.125, 0.375, 0.625, 0.875, 0.125]))
    torch.testing.assert_close(places[[0, 3, 4, 11], 1], torch.tensor([1 / 6, 1 / 6, 0.5, 5 / 6]))
    with pytest.raises(ValueError, match="7 x 8 points"):
        encoder(torch.randn(1, 2, 7, 8))


def test_encoder_keeps_its_precision_under_autocast() -> None:
    encoder, u = GridEncoder(8, 6), torch.randn(3, 1, 1, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(u), encoder(u.clone()))
        inside = encoder(u)
    assert inside.dtype == torch.float32 and torch.equal(inside, encoder(u))


# ---- operator -----------------------------------------------------------------------------------------------------

GOLDEN = {"hidden_dim": 96, "depths": [1, 1, 1], "group_size": 12, "num_heads": 6}
TWO_TASKS = {"hidden_dim": 384, "depth": 12, "num_heads": 8, "attention_type": "standard", "qk_norm": True}


def names(*stems: str) -> set[str]:
    return {f"{stem}.{part}" for stem in stems for part in ("weight", "bias")}


def unet_layer(stem: str) -> set[str]:
    attention = [f"{stem}.attn.{part}_proj" for part in ("q", "k", "v", "out")]
    nets = [f"{stem}.ff.net.{i}" for i in (0, 1, 4)]
    return names(f"{stem}.attn_norm", *attention, *nets) | {f"{stem}.attn.{part}_norm.weight" for part in ("q", "k")}


OUTSIDE = names("time_embed.proj.0", "time_embed.proj.2", "time_to_latent", "core.input_proj", "core.output_proj")
OUTSIDE |= names("output_norm")


def test_golden_operator_has_the_published_names_and_size() -> None:
    operator = LatentOperator(16, "pdet_unet", GOLDEN)
    expected = OUTSIDE | names("core.final_norm") | unet_layer("core.bottleneck.0")
    for i in (0, 1):
        expected |= unet_layer(f"core.down_layers.{i}.0.0") | names(f"core.down_layers.{i}.1")
        expected |= unet_layer(f"core.up_layers.{i}.1.0") | names(f"core.up_layers.{i}.0")
    assert set(operator.state_dict()) == expected
    assert sum(p.numel() for p in operator.parameters()) == 232_152
    assert operator.core.bottleneck[0].attn.q_proj.weight.shape == (12, 12)


def test_two_task_operator_has_the_published_names_and_size() -> None:
    with torch.device("meta"):
        operator = LatentOperator(128, "pdet_stack", TWO_TASKS)
    layer = names(*(f"core.layers.3.{part}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.0", "mlp.3")))
    layer |= {"core.layers.3.attn.q_norm.weight", "core.layers.3.attn.k_norm.weight"}
    keys = set(operator.state_dict())
    assert {k for k in keys if k.startswith("core.layers.3.")} == layer
    assert {k for k in keys if not k.startswith("core.layers.")} == OUTSIDE | names("core.output_norm")
    assert sum(p.numel() for p in operator.parameters()) == 21_427_840


@pytest.mark.parametrize(
    ("architecture", "core", "tokens"),
    [
        ("pdet_unet", GOLDEN, 32),
        ("pdet_unet", GOLDEN, 31),
        ("pdet_unet", None, 5),
        ("pdet_stack", {"hidden_dim": 16, "depth": 2, "num_heads": 4}, 9),
        ("pdet_stack", {"hidden_dim": 32, "depth": 2, "num_heads": 4, "attention_type": "channel_separated"}, 9),
        ("pdet_stack", {"hidden_dim": 32, "depth": 2, "drop_path": 0.1, "use_activation_checkpoint": True}, 9),
    ],
)
def test_operator_starts_as_no_change_and_can_learn(
    architecture: str, core: dict[str, Any] | None, tokens: int
) -> None:
    torch.manual_seed(0)
    operator = LatentOperator(16, architecture, core)
    z = torch.randn(3, tokens, 16)
    assert torch.equal(operator(z, 0.02), z)
    nn.init.ones_(operator.output_norm.weight)
    operator(z, torch.tensor([0.1, 0.2, 0.3])).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in operator.parameters())
    operator.eval()
    assert not torch.equal(operator(z, 0.02), operator(z, 1.0))  # it hears the time
    together, alone = operator(z, 0.1), operator(z[1:2], 0.1)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_recomputed_blocks_give_the_same_gradient() -> None:
    core = {"hidden_dim": 16, "depth": 2, "num_heads": 4}
    plain = LatentOperator(16, "pdet_stack", core)
    again = LatentOperator(16, "pdet_stack", {**core, "use_activation_checkpoint": True})
    nn.init.ones_(plain.output_norm.weight)
    again.load_state_dict(plain.state_dict())
    z = torch.randn(2, 7, 16)
    for operator in (plain, again):
        operator(z, 0.1).pow(2).sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("architecture", "core", "word"),
    [
        ("transformer", None, "pdet_unet, pdet_stack"),
        ("pdet_unet", {"hidden_dim": 32, "group_size": 12, "num_heads": 4}, "group_size 12"),
        ("pdet_stack", {"hidden_dim": 30, "num_heads": 4}, "num_heads 4"),
        ("pdet_stack", {"hidden_dim": 32, "attention_type": "linear"}, "attention_type"),
    ],
)
def test_wrong_operator(architecture: str, core: dict[str, Any] | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LatentOperator(16, architecture, core)


# ---- decoder ------------------------------------------------------------------------------------------------------


def test_decoder_starts_by_leaning_to_the_querys_own_place() -> None:
    torch.manual_seed(0)
    decoder = AnyPointDecoder(8, hidden=32, layers=1, heads=2, frequencies=(1, 2, 4, 8, 16))
    marks = decoder._mark(GridEncoder(64, 8).places(1, 64))[None]
    weights = decoder.layers[0].attn(marks, marks, marks)[1][0]  # (queries, tokens)
    by_distance = torch.stack([weights[q].roll(-q) for q in range(64)]).mean(0)
    assert by_distance.argmax() == 0 and by_distance[0] > 2 / 64


def test_decoder_answers_each_point_by_itself() -> None:
    decoder, z, places = AnyPointDecoder(8, fields=2), torch.randn(2, 5, 8), torch.rand(5, 2)
    points = torch.rand(2, 7, 2)
    torch.testing.assert_close(decoder(points[:, 2:4], z, places), decoder(points, z, places)[:, 2:4])
    assert decoder(points, z, places).shape == (2, 7, 2)


# ---- data ---------------------------------------------------------------------------------------------------------


def test_pairs() -> None:
    u = torch.arange(2 * 7).float().view(2, 7, 1)
    pairs = Pairs(u, stride=2, every=2)
    got = [(int(pairs[i]["u0"]), int(pairs[i]["u1"])) for i in range(len(pairs))]
    assert got == [(0, 2), (2, 4), (4, 6), (7, 9), (9, 11), (11, 13)]
    one_by_one = default_collate([pairs[i] for i in (5, 0)])
    assert all(torch.equal(one_by_one[k], v) for k, v in pairs.__getitems__([5, 0]).items())
    with pytest.raises(ValueError, match="time_stride 7"):
        Pairs(u, stride=7)


def test_splits(task: BurgersOperator, tmp_path: Path) -> None:
    assert len(task.dataset("train")) == 6 * 19 and len(task.dataset("val")) == 3 * 3  # type: ignore[arg-type]
    assert task.dataset("test") is None
    bare = BurgersOperator(**TINY)
    for early in (bare.network, lambda: bare.dataset("train")):
        with pytest.raises(ValueError, match="prepare"):
            early()
    bare.prepare(tmp_path)
    assert bare.scales == task.scales and torch.equal(bare.data["val"], task.data["val"])


def test_scales_are_those_of_the_training_pairs(task: BurgersOperator, network: nn.Module) -> None:
    batch = batch_of(task, "train", list(range(6 * 19)))
    out = network(batch["u0"], batch["u1"])
    change = (out["z1_true"] - out["z0"]).pow(2).mean().sqrt()
    torch.testing.assert_close(change, network.latent_change, rtol=1e-4, atol=0)
    change = (batch["u1"] - batch["u0"]).pow(2).mean().sqrt()
    torch.testing.assert_close(change, network.field_change, rtol=1e-4, atol=0)


def test_augmentation_is_a_symmetry_and_belongs_to_the_sample(task: BurgersOperator) -> None:
    plain, batch = batch_of(task, "train", [3, 50, 7, 90]), task.augment(batch_of(task, "train", [3, 50, 7, 90]))
    for row in range(4):
        images = [(m, s) for m in (False, True) for s in range(64)]

        def image(u: Tensor, mirror: bool, shift: int) -> Tensor:
            u = u.roll(shift)
            return -u.flip(0) if mirror else u

        hits = [i for i in images if torch.equal(image(plain["u0"][row], *i), batch["u0"][row])]
        assert any(torch.equal(image(plain["u1"][row], *i), batch["u1"][row]) for i in hits)
    alone = task.augment(batch_of(task, "train", [7]))
    assert torch.equal(alone["u0"][0], batch["u0"][2]) and not torch.equal(plain["u0"], batch["u0"])


# ---- loss and metrics ---------------------------------------------------------------------------------------------


class OnlyForward(nn.Module):
    """What DDP and FSDP leave of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = [module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


def test_loss_is_a_sum_that_any_split_gives(task: BurgersOperator, network: nn.Module) -> None:
    index = [0, 20, 40, 60, 80]
    whole = task.loss(OnlyForward(network), batch_of(task, "train", index))
    parts = [task.loss(network, batch_of(task, "train", part)) for part in (index[:2], index[2:])]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total, rtol=1e-5, atol=0)
    torch.testing.assert_close(whole.total, whole.logs["forward_loss"] + whole.logs["decoder_loss"])


def test_padding_adds_exactly_nothing(task: BurgersOperator, network: nn.Module) -> None:
    def gradient(extra: int) -> tuple[Tensor, list[Tensor]]:
        batch = batch_of(task, "train", [5, 25, 45 + extra])
        batch["weight"] = torch.tensor([1.0, 1.0, 0.0])
        network.zero_grad()
        loss = task.loss(network, batch).total
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]

    (loss, grads), (other_loss, other_grads) = gradient(0), gradient(30)
    assert torch.equal(loss, other_loss)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, task.loss(network, batch_of(task, "train", [5, 25])).total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(task: BurgersOperator, network: nn.Module, precision: str) -> None:
    batch = batch_of(task, "train", [1, 30, 60])
    expected = task.loss(network, batch).total.item()
    if precision == "64-true":
        got = task.loss(network.double(), batch).total
        assert got.item() == pytest.approx(expected, rel=1e-4) and got.dtype == torch.float64
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = task.loss(network, batch).total
        assert got.item() == pytest.approx(expected, rel=0.05) and got.dtype == torch.float32
    got.backward()


def test_gradients_reach_all_but_the_encoder(task: BurgersOperator, network: nn.Module) -> None:
    task.loss(network, batch_of(task, "train", [1, 2, 3])).total.backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {f"encoder.{name}" for name, _ in network.encoder.named_parameters()}


def figures(task: BurgersOperator, network: nn.Module, cuts: list[int]) -> dict[str, float]:
    sums: dict[str, float] = {}
    network.eval()
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            got = task.evaluate(network, batch_of(task, "val", list(range(start, stop))), {})
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in got.items()}
    return task.figures(sums)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 8)))
def test_metrics_are_exact_however_batched(task: BurgersOperator, cuts: set[int]) -> None:
    torch.manual_seed(0)
    network = task.network()
    nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    got = figures(task, network, [0, *sorted(cuts), 9])
    batch = batch_of(task, "val", list(range(9)))
    with torch.no_grad():
        out = network(batch["u0"], batch["u1"])

    def nrmse(a: Tensor, b: Tensor) -> float:
        return ((a - b).double().pow(2).mean().sqrt() / (b.double().pow(2).mean().sqrt() + 1e-8)).item()

    expected = {
        "nrmse": nrmse(out["z1"], out["z1_true"]),
        "nrmse_persistence": nrmse(out["z0"], out["z1_true"]),
        "nrmse_physical": nrmse(out["u1"], batch["u1"]),
        "nrmse_physical_persistence": nrmse(batch["u0"], batch["u1"]),
        "nrmse_physical_floor": nrmse(out["u1_true_latent"], batch["u1"]),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert got["nrmse_ratio"] == pytest.approx(expected["nrmse"] / expected["nrmse_persistence"], rel=1e-5)
    assert set(got) - set(expected) == {"loss", "forward_loss", "decoder_loss", "nrmse_ratio", "nrmse_physical_ratio"}


def test_untrained_system_is_persistence(task: BurgersOperator) -> None:
    got = figures(task, task.network(), [0, 9])
    assert got["nrmse_ratio"] == pytest.approx(1, abs=1e-6)
    assert got["nrmse_physical_ratio"] == pytest.approx(1, abs=1e-4)
    assert got["forward_loss"] == pytest.approx(got["nrmse_persistence"] ** 2 * forward_unit(task), rel=1e-4)


def forward_unit(task: BurgersOperator) -> float:
    """The val latents' mean square in units of the training changes' mean square."""
    batch = batch_of(task, "val", list(range(9)))
    out = task.network()(batch["u0"], batch["u1"])
    return (out["z1_true"].pow(2).mean() / task.scales["latent_change"] ** 2).item()


def test_state_dict_carries_encoder_and_scales(task: BurgersOperator, network: nn.Module) -> None:
    other = BurgersOperator(**TINY)
    other.scales |= {"field_mean": 9.0, "field_std": 9.0, "field_change": 9.0, "latent_change": 9.0}
    copy = other.network()
    copy.load_state_dict(network.state_dict())
    u0 = task.data["val"][:, 0]
    assert torch.equal(copy(u0)["u1"], network(u0)["u1"])


def test_a_hundred_updates_beat_persistence(task: BurgersOperator) -> None:
    torch.manual_seed(0)
    network = task.network()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    for step in range(100):
        index = np.random.default_rng(step).integers(0, 6 * 19, 8)
        batch = task.augment(batch_of(task, "train", index.tolist()))
        (task.loss(network, batch).total / 8).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    got = figures(task, network, [0, 9])
    assert got["nrmse_ratio"] < 0.9 and got["nrmse_physical_floor"] < got["nrmse_physical_persistence"]
    assert math.isfinite(got["loss"])


def test_picture(task: BurgersOperator, network: nn.Module) -> None:
    network.train()
    (figure,) = task.pictures(network, torch.device("cpu")).values()
    assert len([axis for axis in figure.axes if axis.get_xlabel() == "x"]) == 8
    assert network.training
    figure.clear()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"queries": 7}, "queries"), ({"time_stride": 0}, "time_stride"), ({"time_stride": 21}, "time_stride")],
)
def test_wrong_arguments(wrong: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BurgersOperator(**{**TINY, **wrong})
