"""The operator stage on made and mixed tasks: its losses against plain torch, its data, what it hands on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from data.normalise import fit as fit_normaliser
from fabric_trainer import fit
from fabric_trainer.config import BatchConfig, Config, EvaluateConfig, OptimConfig, RunConfig
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluate
from fabric_trainer.order import Rows
from fabric_trainer.window import MicroBatches
from models.physics import losses
from models.physics.operator_stage import OperatorStage

BURGERS: dict[str, Any] = {
    "tasks": ["burgers1d"],
    "made": {"burgers1d": {"nu": 0.01, "nx": 32, "frames": 9}},
    "samples": {"train": 6, "val": 3},
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 2},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
    "queries": 8,
}
MIXED: dict[str, Any] = BURGERS | {
    "tasks": ["burgers1d", "darcy2d"],
    "made": BURGERS["made"] | {"darcy2d": {"nx": 8}},
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def made(root, settings: dict[str, Any], **more: Any) -> OperatorStage:
    task = OperatorStage(**settings | more)
    task.prepare(root)
    return task


def batch_of(task: OperatorStage, rows: list[int], split: str = "train") -> dict[str, Any]:
    micro_batches = MicroBatches(task, task.dataset(split), seed=0, training=True)
    return micro_batches[Rows(0, np.array(rows), np.ones(len(rows), np.float32))]


def test_terms_are_their_formulas(root):
    task = made(
        root,
        BURGERS,
        rollout_horizon=3,
        rollout_weight=0.5,
        spectral_weight=0.05,
        inverse_encoding=1.0,
        inverse_decoding=1.0,
        inverse_warmup=0,
        priors={"boundary": 0.1, "latent_norm": 0.1, "conservation": 0.1},
    )
    torch.manual_seed(0)
    network = task.network()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    batch = batch_of(task, [0, 3, 17])
    rows = network(batch, tuple(task.weights(0.0)))

    u0, u1 = batch["u0"], batch["u1"]
    normaliser, encoder = fit_normaliser(task.sets["train"][0]), network.encoders["burgers1d"]
    z0, z1 = encoder(normaliser(u0)), encoder(normaliser(u1))
    torch.testing.assert_close(batch["z0"], z0, rtol=1e-5, atol=1e-6)
    f1 = network.operator(z0, 0.1)
    f2 = network.operator(f1, 0.1)
    f3 = network.operator(f2, 0.1)
    expected = {
        "forward": (f1 - z1).pow(2).mean((1, 2)),
        "rollout": (torch.stack((f2, f3), 1) - batch["z_future"]).pow(2).mean((1, 2, 3)),
        "spectral": losses.spectral_amplitude_loss(f1, z1),
    }
    change = fit_normaliser(task.sets["train"][0]).std.item()
    places = encoder.places(1, 32)
    x = (torch.arange(32) + 0.5) / 32
    xy = torch.stack((x, torch.full_like(x, 0.5)), -1).expand(3, -1, -1)
    d0, d1 = (network.decoder(xy, z, places)[..., 0] for z in (z0, f1))
    predicted = u0.flatten(1) + change * (d1 - d0)
    ends = predicted[:, [0, -1]]
    expected["boundary"] = ends.pow(2).mean(1)
    points = batch["points"]
    read = d0.gather(1, points)
    truth = normaliser(u0).flatten(1).gather(1, points)
    expected["inverse_encoding"] = (read - truth).pow(2).mean(1)
    expected["inverse_decoding"] = (encoder(d0[:, None, None]) - z0).pow(2).mean((1, 2))
    expected["conservation"] = (predicted.sum(1) - u0.flatten(1).sum(1)).abs() / u0.flatten(1).sum(1).abs()
    for name, value in expected.items():
        torch.testing.assert_close(
            rows[name], value, rtol=2e-4, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize(
    ("spectral", "formula", "relative"),
    [
        ("space", losses.spectral_amplitude_loss, False),
        ("energy", losses.spectral_energy_loss, True),
        ("original", losses.feature_spectral_loss, False),
    ],
)
def test_spectral_losses_have_the_unit_of_a_step_but_for_the_ratio(root, spectral, formula, relative):
    task = made(root, BURGERS, reach=20.0, spectral=spectral, spectral_weight=1.0)
    network = task.network()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    batch = batch_of(task, [0, 3, 17])
    unit = 1.0 if relative else network.latent_change[0] ** 2
    expected = formula(network.step(batch["z0"], 0), batch["z1"]) / unit
    torch.testing.assert_close(network(batch, ("spectral",))["spectral"], expected)
    assert expected.min() > 0


def test_gradients_reach_what_each_term_is_for(root):
    def learns(term: str, train_encoder: bool) -> set[str]:
        weights = {"inverse_encoding": 1e-9, "inverse_decoding": 0.0, "decoder_weight": 0.0} | {term: 1.0}
        task = made(root, BURGERS, train_encoder=train_encoder, inverse_warmup=0, inverse_cap=1, **weights)
        network = task.network()
        torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
        rows = network(batch_of(task, [1, 2]), tuple(task.weights(0)))
        rows[term.removesuffix("_weight")].sum().backward()
        return {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}

    assert learns("inverse_encoding", False) == {"decoder"}
    assert learns("inverse_encoding", True) == {"encoders", "decoder"}
    assert learns("inverse_decoding", True) == {"encoders", "decoder"}
    assert learns("decoder_weight", False) == {"decoder"}
    assert learns("physical_weight", False) == {"operator", "decoder"}


def test_mixed_batch_equals_its_tasks_alone(root):
    """Whatever the other rows of a batch are, a row's losses and figures are its own."""
    task = made(root, MIXED, physical_weight=1.0, priors={"boundary": 1.0, "conservation": 1.0})
    network = task.network()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    first_of_darcy = task.dataset("train").sizes[0]
    whole = [0, first_of_darcy + 1, 5, first_of_darcy]
    terms = tuple(task.weights(0))
    together = network(batch_of(task, whole), terms, measured=True)
    for place, index in enumerate(whole):
        alone = network(batch_of(task, [index]), terms, measured=True)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][place], value[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [BURGERS, MIXED], ids=["one task", "two grids"])
def test_predict_is_what_is_measured(root, settings):
    """The field after a step in its own units, of any mixture of tasks, from ``u0`` alone."""
    task = made(root, settings)
    network = task.network()
    torch.nn.init.normal_(network.operator.output_norm.weight, std=0.1)
    rows = [0, 7, 2] if len(task.grids) == 1 else [0, (first := task.dataset("train").sizes[0]), 5, first + 1]
    batch = batch_of(task, rows)
    found = task.predict(network, batch)
    assert set(found) == ({"u1"} if len(task.grids) == 1 else {"u1", "task"})
    assert found["u1"].shape == batch["u0"].shape
    error = network(batch, (), measured=True)["field_error"]
    for row, number in enumerate(batch["tasks"]):
        size = task.grids[number].channels * task.grids[number].points
        difference = (found["u1"] - batch["u1"])[row].flatten()
        torch.testing.assert_close(difference[:size].pow(2).mean(), error[row], rtol=1e-4, atol=1e-9)
        assert not found["u1"][row].flatten()[size:].any()


def test_val_every_thins_each_tasks_pairs(root):
    task, thin = made(root, MIXED, samples={"train": 6, "val": 3}), made(root, MIXED, val_every=3)
    assert len(thin.dataset("train")) == len(task.dataset("train")) and task.dataset("val").sizes == [24, 3]
    assert thin.dataset("val").sizes == [8, 1]
    for place, index in enumerate([*range(0, 24, 3), 24]):
        one, other = thin.dataset("val")[place], task.dataset("val")[index]
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(InputError, match=r"task.args.val_every: must be at least 1, not 0"):
        OperatorStage(**BURGERS, val_every=0)


def test_pdebench_files_are_read_as_they_are(root):
    """What our generators make is in PDEBench's layout: read as files it is the same data."""
    task = made(root, MIXED)
    paths = {
        name: {split: str(sets[split][number].paths[0]) for split in ("train", "val")}
        for sets in [task.sets]
        for number, name in enumerate(MIXED["tasks"])
    }
    settings = {key: value for key, value in MIXED.items() if key not in ("made", "samples")}
    read = made(root, settings, files=paths)
    assert read.grids == task.grids and read.latent_change == task.latent_change
    for key, value in task.dataset("val")[-1].items():
        assert torch.equal(read.dataset("val")[-1][key], value)
    assert read.missing(root) == [] and read.dataset("test") is None
    paths["darcy2d"]["val"] = "none.hdf5"
    assert OperatorStage(**settings, files=paths).missing(root) == [
        "task.args.files.darcy2d.val: there is no file none.hdf5"
    ]


def test_untrained_is_persistence_and_training_beats_it(root):
    more = {"made": {"burgers1d": {"nx": 32, "frames": 41}}, "samples": {"train": 48, "val": 8}, "time_stride": 4}
    task = made(root, BURGERS, reach=50.0, **more, encoder=BURGERS["encoder"] | {"tokens": 16, "dim": 16, "margin": 4})
    fabric = Fabric(accelerator="cpu", devices=1)
    network = fabric.setup(task.network())
    before = evaluate(fabric, task, network, Split(fabric, task, task.dataset("val"), 64))
    assert before["nrmse"] == before["nrmse_persistence"]
    config = Config(
        batch=BatchConfig(micro_batch_size=16),
        optim=OptimConfig(name="adamw", lr=5e-3, weight_decay=0.0),
        run=RunConfig(max_steps=200),
        evaluate=EvaluateConfig(every="200 steps"),
    )
    state = fit(fabric, task, config)
    after = state.history.evaluations[-1]
    assert after["val/nrmse"] < 0.9 * before["nrmse_persistence"]
    assert after["val/nrmse_physical"] < 0.95 * after["val/nrmse_physical_persistence"]
    assert after["val/nrmse_physical_floor"] < after["val/nrmse_physical"]


def test_stage_starts_with_the_one_before(root, tmp_path):
    task = made(root, BURGERS)
    network = task.network()
    path = tmp_path / "operator.pt"
    from fabric_trainer import checkpoint

    checkpoint.write(path, {"format": 1, "model": network.state_dict(), "ema": {}, "counters": {}, "config": {}})
    again = made(root, BURGERS, start=str(path)).network()
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    state = network.state_dict()
    state.pop("operator.core.final_norm.weight")
    checkpoint.write(tmp_path / "cut.pt", {"format": 1, "model": state, "ema": {}, "counters": {}, "config": {}})
    with pytest.raises(InputError, match=r"task.args.start: .*cut.pt .*missing: operator.core.final_norm.weight"):
        made(root, BURGERS, start=str(tmp_path / "cut.pt")).network()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ["heat1d"], "made": None}, "task.args.tasks: 'heat1d' is none of the tasks"),
        ({"encoder": {"token": 8}}, "task.args.encoder: no token"),
        ({"operator": {"core": {"depth": 2}}}, "task.args.operator.core: no depth"),
        ({"sampling": "even"}, "task.args.sampling: 'even' is none of"),
        ({"made": {"burgers1d": {"mu": 1}}}, "task.args.made.burgers1d: no mu"),
        ({"made": {"darcy2d": {}}}, "task.args.made: darcy2d is none of tasks"),
        ({"files": {"burgers1d": {"train": "a", "val": "b"}}}, "task.args.files.burgers1d: is in task.args.made too"),
        ({"made": None, "files": {"burgers1d": {"train": "a"}}}, "task.args.files.burgers1d: needs a file for val"),
        (
            {"made": None, "files": {"burgers1d": {"train": "a", "val": "b", "key": "u"}}},
            "burgers1d: no key, only train",
        ),
        ({"made": None, "files": {"burgers1d": {"train": "a", "val": "b", "given": "u"}}}, "burgers1d is not steady"),
        ({"spectral": "time"}, "task.args.spectral: 'time' is none of space, energy, original"),
        ({"priors": {"energy": 1.0}}, "task.args.priors: energy is none of"),
        ({"train_encoder": True}, "task.args.train_encoder: needs inverse_encoding above 0"),
        ({"rollout_weight": 1.0}, "task.args.rollout_weight: needs a task.args.rollout_horizon"),
    ],
)
def test_wrong_settings_are_one_line(change, said):
    with pytest.raises(InputError) as caught:
        OperatorStage(**BURGERS | change)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_training_figures_are_ratios_of_sums():
    task = OperatorStage(**BURGERS)
    task.grids = [type("G", (), {"name": "burgers1d"})()]
    means = {"loss": 1.0, "burgers1d/latent_error": 0.04, "burgers1d/latent": 4.0}
    assert task.training_figures(means) == {"loss": 1.0, "burgers1d/nrmse": pytest.approx(0.1, rel=1e-6)}
    means["burgers1d/latent"] = 0.0
    assert math.isnan(task.training_figures(means)["burgers1d/nrmse"])
