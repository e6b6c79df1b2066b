"""The original's configuration files become ours: every key is accounted for, and the runs run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fabric_trainer import cli, command
from fabric_trainer.config import flatten
from fabric_trainer.errors import InputError
from tools.translate_ups import Translation, configurations, converted
from tools.translate_ups import translate as ups

Tree = dict[str, Any]
NAMES = ("test_upt_all_stages_1epoch", "train_burgers_golden", "train_burgers_golden_light_diffusion",
         "train_burgers_muon", "train_burgers_upt_full_ddp", "train_pdebench_11task_ddp",
         "train_pdebench_2task_baseline", "train_pdebench_2task_baseline_ddp",
         "train_pdebench_2task_baseline_ddp_4gpu")  # fmt: skip
files = pytest.mark.parametrize("name", NAMES)


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


@files
@pytest.mark.parametrize("stage", [None, "operator", "evaluation"])
def test_a_file_becomes_configurations_that_are_ours_and_every_key_is_accounted_for(name, stage, original):
    made = ups(original / f"{name}.yaml", stage)
    for config in configurations(made.config):
        read = command.from_checkpoint(copy.deepcopy(config))
        if "operator_stage" in read.task.path:
            cli.make_task(read)
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
