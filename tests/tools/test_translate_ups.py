"""The original's configuration files become ours: every key is accounted for, and the runs run."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from small_ups import write_ups
from warm import run

from fabric_trainer import cli, command, schedule
from fabric_trainer.checkpoint import read_index
from fabric_trainer.config import flatten
from fabric_trainer.errors import InputError
from tools import pipeline_file, translate
from tools.translate_ups import Translation, configurations, converted
from tools.translate_ups import translate as ups

Tree = dict[str, Any]
NAMES = ("test_upt_all_stages_1epoch", "train_burgers_golden", "train_burgers_golden_light_diffusion",
         "train_burgers_muon", "train_burgers_upt_full_ddp", "train_pdebench_11task_ddp",
         "train_pdebench_2task_baseline", "train_pdebench_2task_baseline_ddp",
         "train_pdebench_2task_baseline_ddp_4gpu")  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def original(test_data: Path) -> Path:
    return test_data / "fixtures" / "ups_configs"


def tree(original: Path, name: str) -> Tree:
    read: Tree = yaml.safe_load((original / f"{name}.yaml").read_text())
    return read


def translated(given: Tree, stage: str | None = None, **options: Any) -> Translation:
    return converted(given, "given", stage, **options)


def changed(given: Tree, key: str, value: Any) -> Tree:
    """With one key, dotted, changed or added."""
    given = copy.deepcopy(given)
    *sections, last = key.split(".")
    into = given
    for section in sections:
        into = into.setdefault(section, {})
    into[last] = value
    return given


def of(made: Translation, stage: str = "operator") -> Tree:
    """A stage's keys, dotted, of a pipeline."""
    return flatten(configurations(made.config)[list(made.config["stages"]).index(stage)])


def refusal(given: Tree, stage: str | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        translated(given, stage, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- every file and every key -------------------------------------------------------------------------------------


STAGES = ("operator", "diff_residual", "consistency_distill", "evaluation")


CASES = [*((name, None) for name in NAMES), *(("train_burgers_golden", stage) for stage in STAGES)]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_file_becomes_configurations_that_are_ours_and_every_key_is_accounted_for(name, stage, original):
    made = ups(original / f"{name}.yaml", stage)
    if stage:
        cli.make_task(command.from_checkpoint(copy.deepcopy(made.config)))
    else:  # which makes every stage's task
        Path("pipeline.yaml").write_text(translate.to_yaml(made.config))
        root, stages = pipeline_file.read(Path("pipeline.yaml"), None)
        assert root == Path(made.config["common"]["run"]["root"], made.config["name"])
        assert [each.name for each in stages] == list(made.config["stages"])
    assert [line.key for line in made.report] == list(flatten(tree(original, name)))
    assert all(": " in line.text or " -> " in line.text for line in made.report)


OTHER = {
    "data.task": lambda value: "advection1d" if value == ["burgers1d"] or value == "burgers1d" else value[:-1],
    "data.task_sampling.strategy": "proportional",
    "operator.architecture_type": "pdet_unet",
    "operator.pdet.attention_type": "channel_separated",
    "training.amp_dtype": "float16",
    "training.compile_mode": "max-autotune",
    "training.latent_cache_dtype": lambda value: "float16" if value == "float32" else "float32",
    "training.query_sampling.strategy": "stratified",
    "training.physics_priors.bc_type": "left",
    "training.tau_distribution.type": "uniform",
    "evaluation.split": "val",
    "mass_field": lambda value: "rho" if value == "u" else "u",
    "optimizer.name": "sgd",
    "scheduler.name": lambda value: "steplr" if value.lower() != "steplr" else "plateau",
    "t_max": lambda value: 2 * value,  # beyond the run: a shorter one bends the curve where ours can't
}


def other(key: str, value: Any) -> Any:
    """Another value that is right."""
    for name, instead in OTHER.items():
        if key == name or key.endswith(f".{name}"):
            return instead(value) if callable(instead) else instead
    if isinstance(value, list):
        return [*value, "more"] if value and isinstance(value[0], str) else [each + 1 for each in value] or ["u"]
    if isinstance(value, str):
        return f"{value}-other"
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.5 * value or 0.5


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *((name, None) for name in NAMES if name != "train_burgers_golden_light_diffusion"),
        ("train_burgers_golden", "diff_residual"),
        ("train_pdebench_2task_baseline_ddp_4gpu", "operator"),
        ("train_burgers_muon", "evaluation"),
    ],
)
def test_a_key_that_is_translated_changes_what_comes_out_and_one_without_effect_does_not(name, stage, original):
    given = tree(original, name)
    before = translated(given, stage)
    values = flatten(given)
    for line in before.report:
        value = values[line.key]
        if line.key == "training.amp_dtype" and "fsdp" in str(before.config):
            continue  # which takes bfloat16 alone
        if line.used:
            after = translated(changed(given, line.key, other(line.key, value)), stage)
            assert (after.config, after.flags) != (before.config, before.flags), line
        elif value and line.key not in OTHER and not line.key.endswith(("_field", "scheduler.mode", "epochs")):
            instead = (
                value if isinstance(value[0] if isinstance(value, list) else value, dict) else other(line.key, value)
            )
            after = translated(changed(given, line.key, instead), stage)
            assert (after.config, after.flags) == (before.config, before.flags), line


# ---- what the keys become -----------------------------------------------------------------------------------------


def test_the_golden_file(original):
    made = ups(original / "train_burgers_golden.yaml")
    assert made.config["name"] == "burgers-golden"
    assert list(made.config["stages"]) == ["operator", "diff_residual", "consistency_distill", "evaluation"]
    operator, residual, distill = (of(made, stage) for stage in ("operator", "diff_residual", "consistency_distill"))
    expected = {
        "task.path": "models.physics.operator_stage.OperatorStage",
        "task.args.tasks": ["burgers1d"],
        "task.args.encoder.dim": 16,
        "task.args.encoder.tokens": 32,
        "task.args.operator.architecture": "pdet_unet",
        "task.args.operator.core.group_size": 12,
        "task.args.time_stride": 2,
        "task.args.dt": 0.1,
        "task.args.spectral_weight": 0.05,
        "task.args.spectral": "original",
        "task.args.decoder.layers": 3,
        "task.args.latent_cache_dtype": "float32",
        "seed": 42,
        "run.deterministic": True,
        "run.max_epochs": 25,
        "run.root": "checkpoints",
        "batch.micro_batch_size": 1200,  # 12 trajectories of 201 frames, every other one, and the last starts no pair
        "batch.accumulate": 4,
        "fabric.devices": 1,
        "fabric.precision": "bf16-mixed",
        "compile.scope": "blocks",
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.03,
        "optim.decay_everything": True,
        "optim.args.betas": [0.9, 0.999],
        "clip.norm": 1.0,
        "ema.decay": 0.999,
        "ema.warmup": False,
        "early_stopping.patience": 10,
        "checkpoint.monitor": "val/nrmse",
        "checkpoint.top_k": 3,
        "checkpoint.name": "operator-epoch={epoch:02d}-val_nrmse={val/nrmse:.4f}",
        "loggers.wandb.project": "universal-simulator",
        "loggers.wandb.name": "burgers-golden",
        "loggers.wandb.tags": ["16dim", "golden", "practical", "efficient"],
    }
    assert {key: operator.get(key) for key in expected} == expected
    assert "schedule.name" not in operator
    assert residual["schedule.name"] == distill["schedule.name"] == "cosine"
    assert residual["schedule.final"] * residual["optim.lr"] == pytest.approx(3e-6)
    assert distill["schedule.final"] * distill["optim.lr"] == pytest.approx(2e-6)
    assert residual["task.args.tau"] == [1.2, 1.2] and distill["task.args.tau_schedule"] == [5, 4, 3]
    # 6 trajectories an update, in pieces of 3 pairs; the stage's own accum_steps does nothing
    assert distill["batch.micro_batch_size"] * distill["batch.accumulate"] == 600
    evaluation = of(made, "evaluation")
    assert evaluation["task.args.ttc.candidates"] == 16 and evaluation["task.args.ttc.reward.mass_field"] == 0


def test_muon_steps_all_matrices_at_its_own_rate(original):
    operator = of(ups(original / "train_burgers_muon.yaml"))
    assert {key: value for key, value in operator.items() if key.startswith("optim.")} == {
        "optim.name": "muon_hybrid",
        "optim.decay_everything": True,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.03,
        "optim.args.betas": [0.9, 0.999],
        "optim.args.eps": 1e-8,
        "optim.muon.matrices": "all",
        "optim.muon.adjust_lr_fn": "original",
        "optim.muon.args.momentum": 0.95,
        "optim.muon.args.ns_steps": 5,
    }
    assert "clip.norm" not in operator


def test_a_key_of_the_stage_stands_in_place_of_the_training_section_even_where_it_is_null(original):
    given = tree(original, "train_burgers_golden")
    for name, theirs in (
        ("grad_clip", "clip.norm"),
        ("ema_decay", "ema.decay"),
        ("patience", "early_stopping.patience"),
    ):
        assert theirs in of(translated(given))
        assert theirs not in of(translated(changed(given, f"stages.operator.{name}", None)))
        assert of(translated(changed(given, f"stages.operator.{name}", 2)))[theirs] == 2


@pytest.mark.parametrize(
    ("gpus", "fsdp2", "devices", "expected"),
    [
        (1, False, None, {"fabric.devices": 1}),
        (1, True, None, {"fabric.devices": 1}),
        (None, None, None, {"fabric.devices": 1}),
        (2, False, None, {"fabric.devices": 2, "fabric.strategy": "ddp"}),
        (2, None, None, {"fabric.devices": 2, "fabric.strategy": "ddp"}),
        (4, True, None, {"fabric.devices": 4, "fabric.strategy": "fsdp"}),
        (4, True, 1, {"fabric.devices": 1}),
        (1, True, 2, {"fabric.devices": 2, "fabric.strategy": "fsdp"}),
        (1, False, 3, {"fabric.devices": 3, "fabric.strategy": "ddp"}),
    ],
)
def test_strategies(gpus, fsdp2, devices, expected):
    made = translated(small(num_gpus=gpus, use_fsdp2=fsdp2), devices=devices)
    assert {key: value for key, value in of(made).items() if key in ("fabric.devices", "fabric.strategy")} == expected


def small(**training: Any) -> Tree:
    """A file as short as can be; what is None is left out."""
    training = {"batch_size": 4} | {key: value for key, value in training.items() if value is not None}
    operator = {"epochs": 4, "optimizer": {"lr": "1e-3"}}
    return {"data": {"task": "burgers1d", "root": "data"}, "training": training, "stages": {"operator": operator}}


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, {"fabric.precision": "32-true"}),
        ({"amp": True}, {"fabric.precision": "bf16-mixed"}),
        ({"amp": True, "amp_dtype": "float16"}, {"fabric.precision": "16-mixed"}),
        ({"amp": True, "amp_dtype": "float16", "num_gpus": 2, "use_fsdp2": True}, {"fabric.precision": "bf16-mixed"}),
        ({"compile": True, "compile_mode": "reduce-overhead"}, {"compile.mode": "reduce-overhead"}),
        ({"compile": True, "compile_mode": "reduce-overhead", "num_gpus": 2}, {"compile.mode": None}),
        (
            {"compile": True, "compile_mode": "max-autotune", "num_gpus": 2},
            {"compile.mode": "max-autotune-no-cudagraphs"},
        ),
        ({"compile": True, "compile_mode": "fastest"}, {"compile.mode": None, "compile.scope": "blocks"}),
        ({"compile": False, "compile_mode": "max-autotune"}, {"compile.mode": None, "compile.scope": None}),
        (
            {"compile": True, "compile_mode": "reduce-overhead", "torch_inductor_disable_cudagraphs": True},
            {"compile.mode": "default"},
        ),
        ({"lightning_profile": "profiler"}, {"profiler.name": "simple"}),
        ({"lightning_profile": "none", "tune_lr": True, "skip_lightning_val": True}, {"profiler.name": None}),
        ({"cpu_offload_optimizer": True, "num_gpus": 2}, {"fabric.fsdp.cpu_offload": None}),
        ({"cpu_offload_optimizer": True, "num_gpus": 2, "use_fsdp2": True}, {"fabric.fsdp.cpu_offload": True}),
        ({"lambda_rollout": 0.1}, {"task.args.rollout_weight": None}),
        ({"lambda_rollout": "1e-1", "rollout_horizon": 3}, {"task.args.rollout_weight": 0.1}),
        ({"use_inverse_losses": False, "lambda_inv_enc": 0.5}, {"task.args.inverse_encoding": None}),
        (
            {"use_inverse_losses": True, "lambda_inv_enc": 0.5, "inverse_loss_frequency": 5},
            {"task.args.inverse_encoding": 0.1, "task.args.inverse_cap": 0.01, "task.args.inverse_warmup": 15},
        ),
        ({"ema_decay": 0}, {"ema.decay": None}),
        ({"patience": 0}, {"early_stopping.patience": 1}),
        ({"latent_cache_dir": None}, {"task.args.latent_cache_dir": None, "task.args.latent_cache_dtype": "float16"}),
    ],
)
def test_what_a_key_becomes(training, expected):
    operator = of(translated(small(**training)))
    command.from_checkpoint(configurations(translated(small(**training)).config)[0])
    assert {key: operator.get(key) for key in expected} == expected


def test_numbers_without_a_point_are_numbers():
    assert of(translated(small()))["optim.lr"] == 0.001  # "1e-3" to YAML is text


def test_the_optimizer_of_all_stages():
    given = small() | {"optimizer": {"name": "SGD", "lr": 0.1}}
    del given["stages"]["operator"]["optimizer"]
    expected = {"optim.name": "sgd", "optim.lr": 0.1, "optim.args.momentum": 0.9}
    assert {key: of(translated(given))[key] for key in expected} == expected
    given["stages"]["operator"]["optimizer"] = {"lr": 0.01}  # in its place, whole
    assert of(translated(given))["optim.name"] == "adam" and of(translated(given))["optim.lr"] == 0.01


# ---- schedules ----------------------------------------------------------------------------------------------------


def rates(make: Any, epochs: int) -> list[float]:
    """Of torch's scheduler, in each epoch and after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, found = make(optimizer), []
    for _ in range(epochs + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(given: Tree, updates: int) -> list[float]:
    """The rates of the translation at the starts of the epochs, each so many updates long."""
    config = command.from_checkpoint(configurations(translated(given).config)[0])
    share = schedule.share(config.schedule, config.run.max_epochs * updates)
    return [config.optim.lr * share(epoch * updates) for epoch in range(config.run.max_epochs + 1)]


def scheduled(name: str, **keys: Any) -> Tree:
    given = small()
    given["stages"]["operator"] = {"epochs": 4, "optimizer": {"lr": 0.1}, "scheduler": {"name": name, **keys}}
    return given


def test_cosine():
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = rates(lambda optimizer: cosine(optimizer, 4, 1e-3), 4)
    assert ours(scheduled("CosineAnnealingLR", t_max=4, eta_min="1e-3"), 7) == pytest.approx(expected)
    longer = rates(lambda optimizer: cosine(optimizer, 10, 1e-3), 4)  # the end alone fits
    assert ours(scheduled("cosineannealinglr", t_max=10, eta_min=1e-3), 7)[::4] == pytest.approx(longer[::4])
    for t_max, says in ((10, "another curve"), (3, "rises again")):
        made = translated(scheduled("cosineannealinglr", t_max=t_max))
        (line,) = (line for line in made.report if line.key.endswith("t_max"))
        assert line.used and says in line.text


@pytest.mark.parametrize("files", [True, False])
def test_steps(files, home):
    """With the files at hand the drops are where torch's are; else at those epochs the rate is the same."""
    expected = rates(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.25), 4)
    given = scheduled("steplr", step_size=2, gamma=0.25)
    if not files:
        assert ours(given, 7)[::2] == pytest.approx(expected[::2])
        return
    write_ups(home / "data", "burgers1d")  # 6 trajectories x 8 pairs, in batches of 4 x 8: 2 updates
    assert of(translated(given))["schedule.every"] == 4
    assert ours(given, 2) == pytest.approx(expected)


def test_plateau_with_its_least_rate():
    given = scheduled("ReduceLROnPlateau", mode="min", factor=0.5, patience=2, threshold=0.01, min_lr=0.02)
    operator = of(translated(given))
    expected = {"name": "plateau", "factor": 0.5, "patience": 2, "threshold": 0.01, "final": pytest.approx(0.2)}
    assert {key: operator[f"schedule.{key}"] for key in expected} == expected
    assert "scheduler.mode" in refusal(scheduled("plateau", mode="max"))


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "training", "frames", "size"),
    [
        ("burgers1d", {}, 201, 4 * 200),
        ("burgers1d", {"time_stride": 2}, 201, 4 * 100),
        ("burgers1d", {"time_stride": 2}, 200, 4 * 99),
        ("burgers1d", {"time_stride": 2, "rollout_horizon": 3}, 101, 4 * 48),
        ("darcy2d", {"time_stride": 2, "rollout_horizon": 1}, 201, 4),
        (["burgers1d", "darcy2d"], {"time_stride": 2}, 201, 202),  # 4 x (100 + 1) / 2
    ],
)
def test_a_batch_of_trajectories_in_pairs(task, training, frames, size):
    given = changed(small(**training), "data.task", task)
    made = translated(given, frames=frames)
    assert of(made)["batch.micro_batch_size"] == size
    (line,) = (line for line in made.report if line.key == "training.batch_size")
    assert "4 trajectories x" in line.text and str(size) in line.text and "(assumed)" in line.text


def test_frames_are_those_of_the_files_that_are_there(home):
    write_ups(home / "data", "burgers1d", samples={"train": 6}, frames=9)
    write_ups(home / "data", "darcy2d", samples={"train": 2})
    assert of(translated(small()))["batch.micro_batch_size"] == 4 * 8
    both = changed(small(), "data.task", ["burgers1d", "darcy2d"])
    assert of(translated(both))["batch.micro_batch_size"] == 25  # 4 x (6 x 8 + 2 x 1) / 8
    balanced = changed(both, "data.task_sampling.strategy", "balanced")
    assert of(translated(balanced))["batch.micro_batch_size"] == 18  # 4 x (8 + 1) / 2
    assert "too few" in refusal(small(time_stride=9))


# ---- includes, wrong files, the command ---------------------------------------------------------------------------


def test_includes(home, original):
    (home / "sub").mkdir()
    (home / "sub/top.yaml").write_text("include: ../middle.yaml\nstages: {operator: {epochs: 3}}\n")
    (home / "middle.yaml").write_text("include: [low.yaml]\ntraining: {batch_size: 2}\n")
    (home / "low.yaml").write_text(yaml.safe_dump(small(batch_size=1, dt=0.5)))
    made = ups(home / "sub/top.yaml")
    assert of(made)["run.max_epochs"] == 3 and of(made)["optim.lr"] == 0.001
    assert of(made)["batch.micro_batch_size"] == 2 * 200 and of(made)["task.args.dt"] == 0.5
    assert made.report[0].key == "include" and made.report[0].used
    (home / "low.yaml").write_text("include: sub/top.yaml\n")
    with pytest.raises(InputError, match=r"top\.yaml includes middle\.yaml includes low\.yaml includes top\.yaml"):
        ups(home / "sub/top.yaml")


def test_conditioning_with_a_stand_in_include(original, home, capsys):
    """Of the original's own file: what it includes was kept back."""
    text = (original / "inference_ttc.yaml").read_text()
    (home / "inference_ttc.yaml").write_text(text)
    assert translate.main(["ups", "inference_ttc.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "inference_ttc.yaml includes inference_transient.yaml" in error
    stand_in = small()
    del stand_in["stages"]
    (home / "inference_transient.yaml").write_text(yaml.safe_dump(stand_in))
    made = ups(home / "inference_ttc.yaml")
    assert list(made.config["stages"]) == ["evaluation"]
    evaluation = of(made, "evaluation")
    asked = {key.removeprefix("task.args.ttc."): value for key, value in evaluation.items() if ".ttc." in key}
    assert asked == {
        "candidates": 6,
        "beam_width": 2,
        "horizon": 2,
        "gamma": 1.0,
        "max_evaluations": 100,
        "sampler.tau_range": [0.2, 0.8],
        "sampler.noise_std": 0.01,
        "sampler.noise_unit": "absolute",
        "reward.mass_field": 0,
        "reward.momentum_field": [],
        "reward.weights.mass": 1.0,
        "reward.weights.energy": 0.1,
        "reward.weights.penalty_negative": 0.5,
    }
    assert evaluation["task.args.decoder.hidden"] == 256
    cli.make_task(command.from_checkpoint(configurations(made.config)[0]))


def test_a_key_of_another_branch_is_said_to_be_unknown():
    """It stops nothing, and is not taken for one that is like it."""
    more = changed(small(), "stages.operator.optimizer.kernels", "fast")
    more = changed(changed(more, "outputs.path", "x"), "outputs.formats", ["png"])
    made, plain = converted(more, "golden", "operator"), converted(small(), "golden", "operator")
    assert made.config == plain.config
    said = {line.key: line.text for line in made.report if line not in plain.report}
    assert set(said) == {"stages.operator.optimizer.kernels", "outputs.path", "outputs.formats"}
    assert all("no key of the original's that is known here; the nearest is " in text for text in said.values())
    assert not any(line.used for line in made.report if line.key in said)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("training.batchsize", 3, "training.batchsize: there is no such key; the nearest is training.batch_size"),
        ("stages.operators.epochs", 3, "the nearest is stages.operator.epochs"),
        ("latent", 3, "latent: is a section of keys, not 3"),
        ("training.batch_size", "many", "training.batch_size: must be a whole number, not 'many'"),
        ("training.amp", "on please", "training.amp: must be true or false"),
        ("training.dt", True, "training.dt: must be a number"),
        ("training.amp_dtype", "float8", "training.amp_dtype: 'float8' is none of"),
        ("stages.operator.optimizer.name", "lion", "stages.operator.optimizer.name: 'lion' is none of"),
        ("stages.operator.scheduler.name", "cyclic", "stages.operator.scheduler.name: 'cyclic' is none of"),
        ("data.task", None, "data.task: is missing"),
        ("data.task", "mars", "data.task: 'mars' is none of the tasks"),
        ("data.task", "cfd3d", "data.task: cfd3d is on a grid of three dimensions"),
    ],
)
def test_wrong_files(key, value, says):
    assert says in refusal(changed(small(amp=True), key, value))


def test_nothing_to_do():
    assert "stages.steady_prior.epochs" in refusal(small(), "steady_prior")
    off = small() | {"stages": {}, "evaluation": {"enabled": False}}
    assert "none has epochs above 0" in refusal(off)


def test_what_is_printed_and_written(home, original, capsys):
    file = str(original / "train_burgers_golden.yaml")
    assert translate.main(["ups", file, "--stage", "operator", "-o", "a.yaml"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python train.py --config a.yaml\ntranslated:\n")
    assert err.count("\n") == 3 + len(flatten(tree(original, "train_burgers_golden")))
    assert "12 trajectories x 100 pairs" in err and "batch.micro_batch_size: 1200" in err
    assert "  benchmark: false: cuDNN" in err
    assert command.load("a.yaml").batch.micro_batch_size == 1200
    assert translate.main(["ups", file]) == 0
    out, err = capsys.readouterr()
    assert list(yaml.safe_load(out)) == ["name", "common", "stages"]
    assert err.startswith("saved as ups.yaml: python -m tools.pipeline --stage all --config ups.yaml")
    for words, says in (
        ([file, "-o", "a.yaml"], "-o a.yaml exists"),
        (["none.yaml"], "no file"),
        ([file, "--", "--epochs"], "takes a file"),
        ([file, "--colour"], "takes a file and no --colour"),
    ):
        assert translate.main(["ups", *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_one_stage_starts_where_the_one_before_left_its_best(original):
    made = ups(original / "train_burgers_golden.yaml", "consistency_distill")
    assert made.config["name"] == "burgers-golden/consistency_distill" and made.flags == []
    start = made.config["task"]["args"]["start"]
    assert start == "checkpoints/burgers-golden/diff_residual/checkpoints/best.pt"
    made = ups(original / "train_burgers_golden.yaml", "evaluation")
    last = "checkpoints/burgers-golden/consistency_distill/checkpoints/best.pt"
    metrics = "checkpoints/burgers-golden/evaluation/metrics.json"
    assert made.flags == ["--evaluate", last, "--split", "test", "--out", metrics]
    assert "start" not in ups(original / "train_burgers_golden.yaml", "operator").config["task"]["args"]


# ---- runs ---------------------------------------------------------------------------------------------------------


def shrunk(config: Tree, root: Path) -> Tree:
    """A stage's configuration as it can run here. Replaced are: where the data and latents lie, GPUs by at most two
    processes on the CPU, inductor by eager, W&B by nothing, the loader's processes, all sizes of the networks and of
    batches, and the number of updates, two."""
    args = config["task"]["args"]
    core = args["operator"]["core"] | {"hidden_dim": 16, "num_heads": 2}
    core |= {name: value for name, value in {"group_size": 8, "depth": 2, "depths": [1, 1]}.items() if name in core}
    networks: Tree = {
        "encoder": args["encoder"] | {"tokens": 8, "dim": 8},
        "operator": args["operator"] | {"core": core},
        "decoder": {"hidden": 16, "mlp": 16, "layers": 1, "heads": 2, "frequencies": [1]},
        "latent_cache_dir": str(root / "latents"),
    }
    config["task"]["args"] = args | networks | ({"queries": 8} if "queries" in args else {})
    config["data"] = {"root": str(root), "num_workers": 0}
    config["fabric"] |= {"accelerator": "cpu", "devices": min(2, config["fabric"]["devices"])}
    if "compile" in config:
        config["compile"] = {"scope": config["compile"]["scope"], "backend": "eager"}
    config.setdefault("batch", {})["micro_batch_size"] = config["evaluate"]["micro_batch_size"] = 4
    config["run"] |= {"max_steps": 2}
    config["loggers"] = {"tensorboard": False}
    return config


FAST = ("train_burgers_golden", "train_pdebench_2task_baseline_ddp", "train_burgers_upt_full_ddp")


@pytest.fixture(scope="module")
def trained(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained(name): the checkpoints of a file's operator after two updates, on small files of the tasks that it
    names; by one process, by two of ddp or by two of fsdp, as it says."""

    @cache
    def run_of(name: str) -> Path:
        home = tmp_path_factory.mktemp("run")
        config = ups(original / f"{name}.yaml", "operator").config
        root = write_ups(home / "data", *config["task"]["args"]["tasks"], samples={"train": 6, "val": 2})
        config = shrunk(config, root)
        several = config["fabric"]["devices"] > 1
        config["run"]["root"] = str(home / config["run"]["root"])
        (home / "a.yaml").write_text(translate.to_yaml(config))
        if several:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(home / "a.yaml")]
            done = run(command, home, environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "x 2 ranks" in done.stdout
        else:
            assert cli.main(["--config", str(home / "a.yaml")]) == 0
        return Path(config["run"]["root"], config["name"], "checkpoints")

    return run_of


@pytest.mark.distributed
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_file_trains_two_updates(name, trained):
    checkpoints = trained(name)
    (best,) = {path.resolve() for path in checkpoints.glob("best.pt")}
    entry = read_index(checkpoints)[best.name]
    shown = re.fullmatch(r"operator-epoch=(\d\d)-val_nrmse=(\d\.\d{4})\.pt", best.name)
    assert shown and shown[2] == f"{entry['metrics']['val/nrmse']:.4f}"
    state = torch.load(checkpoints / "last.pt", weights_only=True)
    assert state["counters"]["step"] == 2 and all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_the_file_of_test_time_conditioning_drives_an_evaluation(original, trained, home):
    """With the golden file as what it includes, whose operator it starts with."""
    (home / "inference_ttc.yaml").write_text((original / "inference_ttc.yaml").read_text())
    (home / "inference_transient.yaml").write_text((original / "train_burgers_golden.yaml").read_text())
    best = str(trained("train_burgers_golden") / "best.pt")
    made = ups(home / "inference_ttc.yaml", "evaluation")
    assert made.flags[:4] == ["--evaluate", made.config["task"]["args"]["start"], "--split", "test"]
    config = shrunk(made.config, write_ups(home / "data", "burgers1d"))
    config["task"]["args"]["start"] = best
    Path("a.yaml").write_text(translate.to_yaml(config))
    words = ["--evaluate", best, "--split", "test", "--out", "metrics.json"]
    assert cli.main(["--config", "a.yaml", *words]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    conditioned = {key: value for key, value in metrics["metrics"].items() if "ttc" in key}
    assert conditioned and all(math.isfinite(value) for value in conditioned.values()), metrics
