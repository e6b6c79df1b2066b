"""The stages after the operator: what each is for, its losses against plain torch, and what it leaves alone."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from torch import Tensor

from fabric_trainer import Config, fit
from fabric_trainer.checkpoint import load, write
from fabric_trainer.config import BatchConfig, CheckpointConfig, EmaConfig, EvaluateConfig, OptimConfig, RunConfig
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluate
from fabric_trainer.order import Rows
from fabric_trainer.state import State
from fabric_trainer.window import MicroBatches
from models.physics import losses
from models.physics.distill_stage import DistillStage
from models.physics.evaluation import EvaluationStage
from models.physics.operator_stage import OperatorStage
from models.physics.prior_stage import PriorStage
from models.physics.residual import DiffusionResidual, bridged, refined
from models.physics.residual_stage import ResidualStage
from models.physics.stage import Stage

SYSTEM: dict[str, Any] = {
    "tasks": ["burgers1d"],
    "made": {"burgers1d": {"nu": 0.01, "nx": 64, "frames": 41}},
    "samples": {"train": 24, "val": 6},
    "time_stride": 2,
    "encoder": {"tokens": 16, "dim": 16, "patch": 4, "margin": 4},
    "operator": {"core": {"hidden_dim": 16, "depths": [1, 1], "group_size": 8, "num_heads": 2}},
    "decoder": {"hidden": 16, "layers": 1, "heads": 2, "mlp": 16},
    "reach": 50.0,
}
UPDATES = {OperatorStage: 30, ResidualStage: 150, DistillStage: 120, PriorStage: 60}  # too few for the operator


def made(kind: type[Stage], root: Path, start: Path | None = None, **more: Any) -> Stage:
    task = kind(**SYSTEM | more, start=str(start) if start else None)
    task.prepare(root)
    return task


def config(updates: int) -> Config:
    return Config(
        batch=BatchConfig(micro_batch_size=32),
        optim=OptimConfig(name="adamw", lr=5e-3, weight_decay=0.0),
        run=RunConfig(max_steps=updates),
        ema=EmaConfig(decay=0.9),
        evaluate=EvaluateConfig(every=f"{updates} steps", weights="ema"),
        checkpoint=CheckpointConfig(every=f"{updates} steps"),
    )


class Pipeline:
    """Every stage once, each from the file of the one before: its task, its file and its figures."""

    def __init__(self, root: Path) -> None:
        self.root, self.files, self.figures, self.fabric = root, {}, {}, Fabric(accelerator="cpu", devices=1)
        self.train("operator", OperatorStage)
        self.train("residual", ResidualStage, "operator", calls=2)
        self.train("residual original", ResidualStage, "operator", form="original")
        self.train("distill", DistillStage, "residual", teacher_steps=2)
        self.train("distill original", DistillStage, "residual", teacher_steps=2, form="original")
        self.train("prior", PriorStage, "distill")

    def train(self, name: str, kind: type[Stage], start: str | None = None, **more: Any) -> None:
        folder = self.root / name
        folder.mkdir()
        task = made(kind, self.root, self.files.get(start), **more)
        torch.manual_seed(0)
        state = fit(self.fabric, task, config(UPDATES[kind]), folder)
        self.files[name] = folder / "checkpoints" / "last.pt"
        self.figures[name] = {k.partition("/")[2]: v for k, v in state.history.evaluations[-1].items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Pipeline:
    torch.set_num_threads(1)
    return Pipeline(tmp_path_factory.mktemp("stages"))


def batch_of(task: Stage, rows: list[int], training: bool = True, epoch: int = 0) -> dict[str, Any]:
    micro_batches = MicroBatches(task, task.dataset("train"), seed=0, training=training)
    return micro_batches[Rows(epoch, np.array(rows), np.ones(len(rows), np.float32))]


# ---- levels -------------------------------------------------------------------------------------------------------


def test_bridge_goes_from_the_truth_to_the_noisy_prediction():
    z1, f, noise = torch.randn(3, 4, 5, 6)
    states = bridged(z1, f, torch.tensor([0.0, 0.25, 0.5, 1.0]), noise)
    torch.testing.assert_close(states[0], z1[0])
    torch.testing.assert_close(states[1], 0.75 * z1[1] + 0.25 * f[1] + 0.25 * noise[1])
    torch.testing.assert_close(states[3], f[3] + noise[3])


@settings(max_examples=20, deadline=None)
@given(calls=st.integers(1, 6), tau=st.floats(0.1, 1.0))
def test_refinement_is_the_papers_iteration(calls: int, tau: float):
    torch.manual_seed(calls)
    net, z, truth = DiffusionResidual(6, zero_init=False).double(), *torch.randn(2, 2, 5, 6).double()
    with torch.no_grad():
        x, levels = z, [tau * k / calls for k in range(calls, -1, -1)]
        for t, after in pairwise(levels):
            x = (1 - after / t) * (x + net(x, t)) + (after / t) * x
        torch.testing.assert_close(refined(net, z, calls, tau), x, atol=1e-12, rtol=1e-12)
        assert torch.equal(refined(net, z, 1, tau), z + net(z, tau))
    # who knows the truth gets there in any number of calls
    torch.testing.assert_close(refined(lambda state, t: truth - state, z, calls, tau), truth)


# ---- losses -------------------------------------------------------------------------------------------------------


def away(network: Any) -> Any:
    """From the start, where corrector and operator do nothing."""
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.startswith(("corrector.", "prior.", "operator.output_norm")):
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def step_of(network: Any, z0: Tensor) -> Tensor:
    return z0 + 50.0 * network.latent_change * (network.operator(z0, 0.1) - z0)


@pytest.mark.parametrize("form", ["bridge", "original"])
@pytest.mark.parametrize("ratio", ["sample", "batch"])
def test_residual_losses_are_their_formulas(trained, form, ratio):
    more = {"form": form, "ratio": ratio, "noise": 0.3, "spectral_weight": 0.05, "relative_weight": 0.2}
    task = made(ResidualStage, trained.root, **more)
    network, batch = away(task.network()), batch_of(task, [0, 40, 99])
    assert task.weights(0) == {"forward": 1.0, "spectral": 0.05, "relative": 0.2}
    rows = network(batch, ("forward", "spectral", "relative"))
    z0, z1, tau, change = batch["z0"], batch["z1"], batch["taus"][:, 0], network.latent_change.item()
    f, t = step_of(network, z0), tau[:, None, None]
    x = (1 - t) * z1 + t * (f + 0.3 * change * batch["noise"]) if form == "bridge" else f
    d = change * network.corrector.network(torch.cat((x, t.expand(-1, 16, 1)), 2))
    target = z1 - x
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(rows["forward"], ((d - target) / change).pow(2).mean((1, 2)), **close)
    dims = (0, 1, 2) if ratio == "batch" else (1, 2)
    e_d, e_t = (torch.fft.rfft(part, dim=1).abs().pow(2).mean(dims) for part in (d, target))
    torch.testing.assert_close(rows["spectral"], ((e_d - e_t).abs() / (e_t + 1e-8)).expand(3), **close)
    relative = ((d - target).pow(2).mean(dims) / (target.pow(2).mean(dims) + 1e-8)).sqrt()
    torch.testing.assert_close(rows["relative"], relative.expand(3), **close)
    loss = task.loss(network, batch)
    expected = sum(weight * rows[name].sum() for name, weight in task.weights(0).items())
    torch.testing.assert_close(loss.total, expected)


def test_without_a_reach_all_is_in_the_originals_units(trained):
    task = made(ResidualStage, trained.root, form="original", reach=None)
    network, batch = away(task.network()), batch_of(task, [3, 4])
    f = network.operator(batch["z0"], 0.1)
    d = network.corrector(f, batch["taus"][:, 0])
    rows = network(batch, ("forward",))
    torch.testing.assert_close(rows["forward"], (d - (batch["z1"] - f)).pow(2).mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["honest", "original"])
def test_distillation_losses_are_their_formulas(trained, form):
    schedule = [3, 2]
    task = made(
        DistillStage, trained.root, trained.files["residual"], form=form, teacher_steps=2, tau_schedule=schedule
    )
    network, batch = task.network(), batch_of(task, [0, 40, 99], epoch=1)
    assert batch["taus"].shape == (3, 2) and len(set(batch["taus"].flatten().tolist())) == 6
    assert batch_of(task, [0])["taus"].shape == (1, 3) and batch_of(task, [0], epoch=7)["taus"].shape == (1, 2)
    torch.nn.init.normal_(network.corrector.network[4].weight, std=0.3)  # the student goes, the teacher stays
    change, student = network.latent_change, network.corrector
    f = step_of(network, batch["z0"])
    teacher = made(ResidualStage, trained.root, trained.files["residual"]).network().corrector
    half = f + 0.5 * change * teacher(f, 1.0)
    target = half + change * teacher(half, 0.5) if form == "honest" else f
    each = [(f + change * student(f, tau) - target).pow(2).mean((1, 2)) for tau in batch["taus"].T]
    got = network(batch, ("distillation",))["distillation"]
    torch.testing.assert_close(got, torch.stack(each).mean(0) / change**2, rtol=1e-4, atol=1e-6)
    got.sum().backward()
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None} == {"corrector"}


@pytest.mark.parametrize("target", ["last", "next"])
def test_prior_is_shown_the_end_of_its_own_trajectory(trained, target):
    task = made(PriorStage, trained.root, target=target)
    network, rows = away(task.network()), [0, 19, 20, 45]
    batch = batch_of(task, rows)
    z = task.states["train"][0]["z"]
    for place, index in enumerate(rows):
        trajectory, start = divmod(index, 20)
        then = 40 if target == "last" else 2 * start + 2
        assert torch.equal(batch["z0"][place], z[trajectory, 2 * start])
        assert torch.equal(batch["z1"][place], z[trajectory, then])
        assert torch.equal(batch["u1"][place], task.states["train"][0]["u"][trajectory, then])
    expected = losses.forward_loss(network.prior(batch["z0"]), batch["z1"])
    assert torch.equal(network(batch, ("forward",))["forward"], expected)


# ---- what each is for ---------------------------------------------------------------------------------------------


def test_corrector_improves_an_operator_that_was_trained_too_little(trained):
    operator = trained.figures["operator"]
    for name in ("residual", "residual original"):
        figures = trained.figures[name]
        assert figures["nrmse_operator"] == pytest.approx(operator["nrmse"], rel=1e-5)
        assert figures["nrmse_persistence"] == pytest.approx(operator["nrmse_persistence"], rel=1e-6)
        assert figures["nrmse"] < 0.8 * figures["nrmse_operator"]
        assert figures["nrmse_physical"] < figures["nrmse_physical_operator"]
        assert figures["drift"] > 0.3
    figures = trained.figures["residual"]
    assert figures["nrmse_refined"] < figures["nrmse"]  # several calls say more than one


def test_student_does_in_one_call_what_the_teacher_does_in_several(trained):
    before, figures = trained.figures["residual"], trained.figures["distill"]
    assert figures["nrmse_teacher"] == pytest.approx(before["nrmse_refined"], rel=1e-5)
    assert figures["nrmse_teacher"] < 0.97 * before["nrmse"]  # there is something to learn
    assert figures["nrmse"] < 1.01 * figures["nrmse_teacher"]
    assert figures["drift"] > before["drift"]


def test_the_originals_distillation_collapses(trained):
    figures = trained.figures["distill original"]
    assert figures["drift"] < 0.2 * trained.figures["residual"]["drift"]
    assert figures["nrmse"] > 0.95 * figures["nrmse_operator"] > 1.3 * figures["nrmse_teacher"]


def test_prior_is_nearer_the_end_than_the_start_is(trained):
    figures = trained.figures["prior"]
    assert figures["nrmse"] < 0.8 * figures["nrmse_persistence"]
    assert figures["nrmse_physical"] < figures["nrmse_physical_persistence"]


@pytest.mark.parametrize(
    ("name", "start", "part"),
    [("residual", "operator", "corrector"), ("distill", "residual", "corrector"), ("prior", "distill", "prior")],
)
def test_only_its_own_part_changes(trained, name, start, part):
    before, after = (load(trained.files[each]) for each in (start, name))
    begun, ended = before["model"] | (before["ema"] or {}), after["model"]
    assert set(ended) - set(begun) <= {k for k in ended if k.startswith(f"{part}.")}  # and no teacher
    for key, value in begun.items():
        assert torch.equal(value, ended[key]) == (not key.startswith(f"{part}.")), key
        assert torch.equal(value, after["ema"][key]) or key.startswith(f"{part}."), key


def test_what_is_predicted_is_what_is_measured(trained):
    for name, kind in (("residual", ResidualStage), ("distill", DistillStage), ("prior", PriorStage)):
        start = trained.files["residual" if name == "distill" else name]
        task = made(kind, trained.root, start)
        network, batch = task.network().eval(), batch_of(task, [3, 60], training=False)
        with torch.no_grad():
            error = network(batch, tuple(task.weights(0)), measured=True)["field_error"]
            u1 = task.predict(network, batch)["u1"]
        torch.testing.assert_close((u1 - batch["u1"]).pow(2).mean((1, 2, 3)), error, rtol=1e-4, atol=1e-9)


def test_evaluation_measures_corrected_steps(trained):
    """From the residual stage's file the last stage finds that stage's figures, and beside them the operator's."""
    ttc = {"candidates": 2, "sampler": {"noise_std": 0.01}, "reward": {"mass_field": "u"}}
    found = []
    for tau in (1.0, None):
        task = made(EvaluationStage, trained.root, trained.files["residual"], corrector_tau=tau, ttc=ttc)
        network = trained.fabric.setup(task.network())
        found.append(evaluate(trained.fabric, task, network, Split(trained.fabric, task, task.dataset("val"), 6)))
    corrected, plain = found
    for name in ("nrmse", "nrmse_physical"):
        assert corrected[name] == pytest.approx(trained.figures["residual"][name], rel=1e-4)
        assert plain[name] == pytest.approx(trained.figures["residual"][f"{name}_operator"], rel=1e-4)
    for figures in found:
        assert figures["nrmse_ttc_plain"] == pytest.approx(figures["nrmse"], rel=1e-4)
        assert figures["nrmse_ttc"] != figures["nrmse_ttc_plain"]


TWO: dict[str, Any] = SYSTEM | {
    "tasks": ["burgers1d", "darcy2d"],
    "made": SYSTEM["made"] | {"darcy2d": {"nx": 8}},
    "encoder": {"tokens": 8, "dim": 8, "patch": 2, "margin": 1},
    "samples": {"train": 3, "val": 2},
}


@pytest.mark.parametrize("kind", [ResidualStage, DistillStage, PriorStage])
def test_rows_of_two_tasks_are_as_each_alone(trained, tmp_path, kind):
    """Whatever the other rows of a batch are, and steady tasks beside ones with a time."""
    start = None
    if kind is DistillStage:
        start = tmp_path / "residual.pt"
        network = away(made(ResidualStage, trained.root, **TWO).network())
        write(start, {"format": 1, "model": network.state_dict(), "ema": {}, "counters": {}, "config": {}})
    task = made(kind, trained.root, start, **TWO)
    network, first_of_darcy = away(task.network()).eval(), task.dataset("train").sizes[0]
    rows, terms = [2, first_of_darcy + 1, 5, first_of_darcy], tuple(task.weights(0))
    together = network(batch_of(task, rows), terms, measured=True)
    for place, index in enumerate(rows):
        for name, value in network(batch_of(task, [index]), terms, measured=True).items():
            torch.testing.assert_close(together[name][place], value[0], rtol=1e-4, atol=1e-6)
    sums = {name: value.item() for name, value in task.evaluate(network, batch_of(task, rows), {}).items()}
    figures = task.figures(sums)
    assert {"darcy2d/nrmse", *(f"burgers1d/nrmse_{name}" for name in task.compared)} <= figures.keys()


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_a_resumed_distillation_has_its_first_teacher(trained, tmp_path):
    """Stopped half-way and continued, against one that never stopped: weights, averages and figures bit by bit."""
    task = made(DistillStage, trained.root, trained.files["residual"], tau_schedule=[2, 1])
    ended = []

    class Stop:
        def on_update_end(self, state: State, metrics: dict) -> None:
            if state.counters.window == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    for name in ("whole", "parts"):
        folder, saved = tmp_path / name, None
        folder.mkdir()
        if name == "parts":
            trained.fabric._callbacks.append(Stop())
            assert fit(trained.fabric, task, config(25), folder).stopped
            trained.fabric._callbacks.clear()
            saved = load(folder / "checkpoints" / "last.pt")
            assert saved["counters"]["step"] == 9
        fit(trained.fabric, task, config(25), folder, saved=saved)
        ended.append(load(folder / "checkpoints" / "last.pt"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, ended[1][part][key]) for key, value in ended[0][part].items())
    whole, parts = (saved["states"]["history"]["evaluations"][-1] for saved in ended)
    assert {k: v for k, v in whole.items() if k.startswith("val")} == {
        k: parts[k] for k in whole if k.startswith("val")
    }


def test_figures_are_those_of_any_split(trained):
    task = made(DistillStage, trained.root, trained.files["residual"])
    network = trained.fabric.setup(away(task.network()))
    one, other = (
        evaluate(trained.fabric, task, network, Split(trained.fabric, task, task.dataset("val"), size))
        for size in (120, 7)
    )
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (ResidualStage, {"form": "noise"}, "task.args.form: 'noise' is none of bridge, original"),
        (ResidualStage, {"ratio": "row"}, "task.args.ratio: 'row' is none of sample, batch"),
        (ResidualStage, {"noise": -1.0}, "task.args.noise: must be at least 0, not -1.0"),
        (ResidualStage, {"tau": [1.0]}, "task.args.tau: needs [alpha, beta]"),
        (ResidualStage, {"calls": 0}, "task.args.calls: must be at least 1, not 0"),
        (DistillStage, {"tau": [0, 1]}, "task.args.tau: needs [alpha, beta]"),
        (DistillStage, {"tau_schedule": []}, "task.args.tau_schedule: needs numbers of at least 1"),
        (DistillStage, {"teacher_steps": 0}, "task.args.teacher_steps: must be at least 1, not 0"),
        (PriorStage, {"target": "first"}, "task.args.target: 'first' is none of last, next"),
    ],
)
def test_wrong_settings_are_one_line(kind, change, said):
    with pytest.raises(InputError) as caught:
        kind(**SYSTEM | change)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_summary_says_what_depends_on_the_split():
    said = "spectral and relative loss of a micro-batch: it depends on how an update is split"
    weighed = SYSTEM | {"spectral_weight": 0.1, "relative_weight": 0.1}
    assert ResidualStage(**weighed, ratio="batch").describe()["by batch"] == said
    for args in (weighed, SYSTEM | {"ratio": "batch"}):
        assert "by batch" not in ResidualStage(**args).describe()


def test_distillation_needs_a_corrector(trained):
    for start in (None, trained.files["operator"]):
        with pytest.raises(InputError, match=r"task.args.start: .*starts with a file that has a corrector"):
            made(DistillStage, trained.root, start).network()
