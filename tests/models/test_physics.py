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

from fabric_trainer.errors import InputError
from fabric_trainer.order import Rows
from fabric_trainer.window import MicroBatches
from models.physics.decoder import AnyPointDecoder
from models.physics.encoder import GridEncoder
from models.physics.operator import LatentOperator
from models.physics.operator_stage import OperatorNetwork, OperatorStage

TINY: dict[str, Any] = {
    "tasks": ["burgers1d"],
    "made": {"burgers1d": {"nx": 64, "frames": 21}},
    "samples": {"train": 6, "val": 3},
    "time_stride": 2,
    "val_every": 4,
    "symmetries": {"burgers1d": ["shift", "mirror"]},
    "encoder": {"tokens": 32, "dim": 24, "patch": 2, "margin": 4, "frequencies": [1, 2, 4]},
    "operator": {"core": {"hidden_dim": 32, "depths": [1, 1], "group_size": 16, "num_heads": 2}, "norm_eps": 10.0},
    "reach": 50.0,
    "dt": 0.02,
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 32, "frequencies": [1, 2, 4, 8]},
    "physical_weight": 0.5,
    "queries": 8,
    "stratified": True,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> OperatorStage:
    made = OperatorStage(**TINY)
    made.prepare(tmp_path_factory.mktemp("data"))
    return made


def moved(task: OperatorStage) -> OperatorNetwork:
    """Away from its start, where the operator does nothing yet."""
    torch.manual_seed(0)
    made = task.network()
    nn.init.normal_(made.operator.output_norm.weight, std=0.1)
    return made


@pytest.fixture
def network(task: OperatorStage) -> OperatorNetwork:
    return moved(task)


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


# ---- the operator stage, as configs/burgers.yaml has it -------------------------------------------------------------


def batch_of(task: OperatorStage, split: str, index: list[int], turned: bool = False) -> dict[str, Any]:
    dataset = task.dataset(split)
    assert dataset is not None
    micro_batches = MicroBatches(task, dataset, seed=1, training=turned)
    return micro_batches[Rows(0, np.array(index), np.ones(len(index), np.float32))]


def test_splits(task: OperatorStage, tmp_path: Path) -> None:
    assert len(task.dataset("train")) == 6 * 10 and len(task.dataset("val")) == 8  # type: ignore[arg-type]
    assert task.dataset("test") is None
    bare = OperatorStage(**TINY)
    for early in (bare.network, lambda: bare.dataset("train")):
        with pytest.raises(ValueError, match="prepare"):
            early()
    bare.prepare(tmp_path)
    assert (bare.latent_change, bare.field_change) == (task.latent_change, task.field_change)
    assert torch.equal(bare.states["val"][0]["u"], task.states["val"][0]["u"])  # type: ignore[arg-type]


def test_scales_are_those_of_the_training_states(task: OperatorStage, network: OperatorNetwork) -> None:
    """Over every pair of frames a step apart."""
    u = task.sets["train"][0].tensor()
    z = network.encode(u.flatten(0, 1), 0).unflatten(0, u.shape[:2])
    change = (z[:, 2:] - z[:, :-2]).pow(2).mean().sqrt()
    torch.testing.assert_close(network.latent_change[0], change, rtol=1e-4, atol=0)
    change = (u[:, 2:] - u[:, :-2]).pow(2).mean().sqrt() / u.std(correction=0)
    torch.testing.assert_close(network.field_change[0], change, rtol=1e-4, atol=0)


class OnlyForward(nn.Module):
    """What DDP and FSDP leave of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = [module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner[0](*args, **kwargs)


def test_loss_is_a_sum_that_any_split_gives(task: OperatorStage, network: nn.Module) -> None:
    index = [0, 12, 24, 36, 48]
    whole = task.loss(OnlyForward(network), batch_of(task, "train", index, turned=True))
    parts = [task.loss(network, batch_of(task, "train", part, turned=True)) for part in (index[:2], index[2:])]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total, rtol=1e-5, atol=0)
    forward, decoder, physical = (whole.logs[f"{name}_loss"] for name in ("forward", "decoder", "physical"))
    torch.testing.assert_close(whole.total, forward + decoder + 0.5 * physical)


def test_padding_adds_exactly_nothing(task: OperatorStage, network: nn.Module) -> None:
    def gradient(extra: int) -> tuple[Tensor, list[Tensor]]:
        batch = batch_of(task, "train", [5, 25, 35 + extra])
        batch["weight"] = torch.tensor([1.0, 1.0, 0.0])
        network.zero_grad()
        loss = task.loss(network, batch).total
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]

    (loss, grads), (other_loss, other_grads) = gradient(0), gradient(20)
    assert torch.equal(loss, other_loss)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss, task.loss(network, batch_of(task, "train", [5, 25])).total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(task: OperatorStage, network: nn.Module, precision: str) -> None:
    batch = batch_of(task, "train", [1, 30, 50])
    expected = task.loss(network, batch).total.item()
    if precision == "64-true":
        got = task.loss(network.double(), batch).total
        assert got.item() == pytest.approx(expected, rel=1e-4) and got.dtype == torch.float64
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = task.loss(network, batch).total
        assert got.item() == pytest.approx(expected, rel=0.05) and got.dtype == torch.float32
    got.backward()


def test_gradients_reach_all_but_the_encoder(task: OperatorStage, network: OperatorNetwork) -> None:
    task.loss(network, batch_of(task, "train", [1, 2, 3])).total.backward()
    silent = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert silent == {f"encoders.{name}" for name, _ in network.encoders.named_parameters()}


def figures(task: OperatorStage, network: nn.Module, cuts: list[int]) -> dict[str, float]:
    sums: dict[str, float] = {}
    network.eval()
    with torch.no_grad():
        for start, stop in pairwise(cuts):
            got = task.evaluate(network, batch_of(task, "val", list(range(start, stop))), {})
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in got.items()}
    return task.figures(sums)


@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 7)))
def test_metrics_are_exact_however_batched(task: OperatorStage, cuts: set[int]) -> None:
    network = moved(task)
    got = figures(task, network, [0, *sorted(cuts), 8])
    batch = batch_of(task, "val", list(range(8)))
    u0, u1 = batch["u0"], batch["u1"]
    with torch.no_grad():
        z0, z1_true = network.encode(u0, 0), network.encode(u1, 0)
        z1 = network.step(z0, 0)
        before, after, after_true = (network.decode(z, 0) for z in (z0, z1, z1_true))

    def nrmse(a: Tensor, b: Tensor) -> float:
        return ((a - b).double().pow(2).mean().sqrt() / (b.double().pow(2).mean().sqrt() + 1e-8)).item()

    expected = {
        "nrmse": nrmse(z1, z1_true),
        "nrmse_persistence": nrmse(z0, z1_true),
        "nrmse_physical": nrmse(u0 + after - before, u1),
        "nrmse_physical_persistence": nrmse(u0, u1),
        "nrmse_physical_floor": nrmse(u0 + after_true - before, u1),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert got["nrmse_ratio"] == pytest.approx(expected["nrmse"] / expected["nrmse_persistence"], rel=1e-5)
    more = {"loss", "forward_loss", "decoder_loss", "physical_loss", "nrmse_ratio", "nrmse_physical_ratio"}
    assert set(got) - set(expected) == more


def test_untrained_system_is_persistence(task: OperatorStage) -> None:
    network = task.network()
    got = figures(task, network, [0, 8])
    assert got["nrmse_ratio"] == pytest.approx(1, abs=1e-6)
    assert got["nrmse_physical_ratio"] == pytest.approx(1, abs=1e-4)
    truth = network.encode(batch_of(task, "val", list(range(8)))["u1"], 0).pow(2).mean() / network.latent_change[0] ** 2
    assert got["forward_loss"] == pytest.approx(got["nrmse_persistence"] ** 2 * truth.item(), rel=1e-4)


def test_state_dict_carries_encoder_and_scales(task: OperatorStage, network: OperatorNetwork, tmp_path: Path) -> None:
    other = OperatorStage(**TINY | {"samples": {"train": 1, "val": 1}, "encoder": TINY["encoder"] | {"seed": 7}})
    other.prepare(tmp_path)
    copy, u0 = other.network(), task.states["val"][0]["u"][:, 0]  # type: ignore[index]
    assert not torch.equal(copy(batch := {"u0": u0})["u1"], network(batch)["u1"])
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy(batch)["u1"], network(batch)["u1"])


def test_a_hundred_updates_beat_persistence(task: OperatorStage) -> None:
    torch.manual_seed(0)
    network = task.network()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=5e-3)
    for step in range(100):
        index = np.random.default_rng(step).integers(0, 6 * 10, 8)
        batch = batch_of(task, "train", index.tolist(), turned=True)
        (task.loss(network, batch).total / 8).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    got = figures(task, network, [0, 8])
    assert got["nrmse_ratio"] < 0.9 and got["nrmse_physical_floor"] < got["nrmse_physical_persistence"]
    assert math.isfinite(got["loss"])


def test_pictures(task: OperatorStage, network: nn.Module) -> None:
    """A rollout of two trajectories, of the steps that there are, and how its error grows."""
    rollout, growth = task.pictures(network.eval(), torch.device("cpu")).items()
    assert rollout[0] == "burgers1d, val: 10 steps from the first state of 2 trajectories"
    assert len([axis for axis in rollout[1].axes if axis.get_xlabel() == "x"]) == 8
    assert growth[0] == "burgers1d, val: error and spectrum of 3 trajectories"
    for _, figure in (rollout, growth):
        figure.clear()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"queries": 0}, "task.args.queries"),
        ({"encoder": {"tokens": 65}}, "task.args.encoder: burgers1d: a grid of 1 x 64 points does not give 65 tokens"),
        ({"time_stride": 0}, "time_stride"),
        ({"time_stride": 21}, "time_stride 21"),
    ],
)
def test_wrong_arguments(task: OperatorStage, tmp_path: Path, wrong: dict[str, int], word: str) -> None:
    with pytest.raises(InputError, match=word):
        made = OperatorStage(**TINY | wrong)
        made.prepare(tmp_path)
        made.dataset("train")
