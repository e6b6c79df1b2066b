"""Which folder a run gets: fresh, continued, or its own again after a scheduler restarted it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fabric_trainer import run
from fabric_trainer.command import Command
from fabric_trainer.config import Config, OptimConfig, OtherConfig
from fabric_trainer.errors import InputError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    config = Config()
    config.run.root = str(tmp_path / "runs")
    return config


def choose(config: Config, **flags: object) -> run.Choice:
    return run.choose(Command(config="configs/toy.yaml", **flags), config, lambda line: None)


def begin(config: Config, **flags: object) -> Path:
    """Choose a folder and open it, as a real run does."""
    choice = choose(config, **flags)
    run.open_folder(choice, Command(config="configs/toy.yaml"), config, {"command": "first"})
    return choice.folder


def test_names_without_a_name_are_of_the_configuration_and_never_taken(place):
    folders = {begin(place) for _ in range(3)}
    assert len(folders) == 3 and all(folder.name.startswith("toy-") for folder in folders)


@pytest.mark.parametrize("who", ["SLURM", "TORCHELASTIC"])
def test_a_restarted_job_finds_its_own_run(place, monkeypatch, who):
    monkeypatch.setenv("SLURM_JOB_ID" if who == "SLURM" else "TORCHELASTIC_RUN_ID", "job/17")
    mine = begin(place)
    monkeypatch.delenv("SLURM_JOB_ID" if who == "SLURM" else "TORCHELASTIC_RUN_ID")
    other = begin(place)  # a newer run of the same configuration, by somebody else
    assert other != mine
    monkeypatch.setenv("SLURM_JOB_ID" if who == "SLURM" else "TORCHELASTIC_RUN_ID", "job/17")
    monkeypatch.setenv(f"{who}_RESTART_COUNT", "1")
    assert choose(place).folder == mine


def test_a_launch_that_may_be_restarted_needs_an_id_or_a_name(place, monkeypatch):
    run.refuse_nameless_restart(place)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says without --rdzv-id
    with pytest.raises(InputError, match="give --name, or the launcher's --rdzv-id"):
        run.refuse_nameless_restart(place)
    place.name = "a"
    run.refuse_nameless_restart(place)


def test_a_resume_keeps_what_the_run_began_with(place):
    place.name = "a"
    folder = begin(place)
    began = run.read_status(folder)["created"]
    run.open_folder(run.Choice(folder), Command(config="configs/toy.yaml"), place, {"command": "second"})
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"] == "second" and environment["earlier"] == [{"command": "first"}]
    assert run.read_status(folder)["created"] == began


OTHER = OtherConfig(["head"], "sgd", lr=0.1)


def test_the_rates_of_several_optimizers_may_change_and_older_checkpoints_know_none():
    began, now = (Config(optim=OptimConfig(others=[replace(OTHER, lr=lr)])) for lr in (0.1, 0.2))
    saved, told = asdict(began), []
    run.compare_configs(saved, now, told.append)
    assert len(told) == 1 and "optim.others" in told[0]
    del saved["optim"]["others"], saved["optim"]["muon"]
    run.compare_configs(saved, now, told.append)


def test_configs_that_differ(place):
    saved, told = asdict(Config()), []
    place.optim.lr, place.schedule.name, place.run.root = 0.5, "cosine", "runs"
    run.compare_configs(saved, place, told.append)
    assert told == [
        "resumed with another optim.lr: 0.5 (was 0.001)",
        "resumed with another schedule.name: cosine (was constant)",
    ]
    for key, value in (("seed", 3), ("optim", OptimConfig("sgd")), ("optim", OptimConfig(others=[OTHER]))):
        other = Config()
        setattr(other, key, value)
        with pytest.raises(InputError, match="a resume can't change it"):
            run.compare_configs(saved, other, told.append)
