"""The configuration files of the Universal Physics Stack as ours: of one stage, or of the whole pipeline.

Every key of a file has a rule in ``keys.py`` and a line of the report: what it becomes, or why it has no
effect.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fabric_trainer.config import Config, flatten
from fabric_trainer.errors import InputError
from tools.translate_ups.keys import RULES, find, known, place
from tools.translate_ups.rules import EVALUATION, STAGES, Asked, Ours, Said
from tools.translate_ups.samples import Samples, look

ALIKE = 0.85  # of two words' letters, for one to be the other misspelt
FRAMES = 201  # of PDEBench's trajectories on a line
TASKS = {
    "operator": "models.physics.operator_stage.OperatorStage",
    "diff_residual": "models.physics.residual_stage.ResidualStage",
    "consistency_distill": "models.physics.distill_stage.DistillStage",
    "steady_prior": "models.physics.prior_stage.PriorStage",
    "evaluation": "models.physics.evaluation.EvaluationStage",
}
SHARED = ("seed", "data", "fabric", "compile", "loggers", "run", "checkpoint", "evaluate", "task")  # by stages
OF_A_STAGE = ("run.max_epochs", "checkpoint.name", "task.path")


class Line(NamedTuple):
    """Of the report: a key, whether it has an effect, and what is said of it."""

    key: str
    used: bool
    text: str


class Translation(NamedTuple):
    """config: a tree for train.py, or of a pipeline. flags: of train.py beside it. report: a line for every key."""

    config: dict[str, Any]
    flags: list[str]
    report: list[Line]


def translate(path: Path, stage: str | None = None, devices: int | None = None, frames: int = FRAMES) -> Translation:
    """A file of the original's, of ``stage`` alone or as a pipeline.

    devices: instead of the file's. frames: of a trajectory, where the files aren't in data.root. Raises InputError for
    a misspelt key, or a value that the original could not take.
    """
    tree, included = load(path)
    made = converted(tree, path.stem, stage, devices, frames)
    if included:
        made.report.insert(0, Line("include", True, f"-> the keys of {', '.join(included)}, under those of this file"))
    return made


def converted(
    tree: Mapping[str, Any], name: str, stage: str | None = None, devices: int | None = None, frames: int = FRAMES
) -> Translation:
    """The same of what is in a file of that name."""
    given = flatten(dict(tree))
    values, unknown = _typed(given)
    asked = _asked(values, devices, frames, alone=stage is not None)
    stages = [stage] if stage else _stages(asked(EVALUATION))
    if stage in STAGES and not asked(stage).epochs:
        raise InputError(f"stages.{stage}.epochs: there is nothing to train, it is 0 or left out")
    ours, said = {}, {}
    for name in stages:
        ours[name], said[name] = _of_stage(asked(name))
    report = []
    for key, value in given.items():
        if key in unknown:
            report.append(Line(key, False, f"{_flow(value)}: {unknown[key]}"))
            continue
        every = {name: said[name].get(key, "the section is empty") for name in stages}
        report.append(_line(key, value, every))
    if stage:
        return Translation(*_single(asked(stage), {"name": name} | ours[stage]), report)
    return Translation(_pipeline({stage: {"name": name} | own for stage, own in ours.items()}), [], report)


# ---- reading ------------------------------------------------------------------------------------------------------


def load(path: Path, within: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[str]]:
    """A file's keys over those of the files that it includes, and these files' names. Raises InputError for one that
    isn't there or includes itself."""
    path = path.resolve()
    if path in within:
        raise InputError(f"include: {' includes '.join(file.name for file in (*within, path))}")
    if not path.is_file():
        says = f"include: {within[-1]} includes {path.name}, but there is no {path}" if within else f"no file {path}"
        raise InputError(says)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: a file of sections and keys was expected, not {tree!r}")
    names = tree.pop("include", None) or []
    names = names if isinstance(names, list) else [names]
    merged: dict[str, Any] = {}
    for name in names:
        merged = _over(merged, load(path.parent / str(name), (*within, path))[0])
    return _over(merged, tree), [str(name) for name in names]


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees' keys; of a key that both have, ``above``'s."""
    both = dict(below)
    for key, value in above.items():
        deeper = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _over(both[key], value) if deeper else value
    return both


def _typed(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values, each of its rule's kind, and of every key that has no rule what is said of it; empty sections are in
    neither. Raises InputError for what is one of the keys but for its spelling, and for a section that is a value."""
    typed: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    names = known()
    for key, value in given.items():
        if (rule := find(key)) is not None:
            try:
                typed[key] = None if value is None else rule.kind(value)
            except ValueError as error:
                raise InputError(f"{key}: must be {error}, not {value!r}") from None
        elif any(name.startswith(f"{key}.") for name in names):
            if value not in (None, {}):
                raise InputError(f"{key}: is a section of keys, not {value!r}")
        else:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            if _misspelt(key, near):
                raise InputError(f"{key}: there is no such key; the nearest is {near}")
            unknown[key] = f"no key of the original's that is known here; the nearest is {near}"
    return typed, unknown


def _misspelt(key: str, name: str) -> bool:
    """Whether they are the same but for a letter or so in some part."""
    parts = list(zip(key.split("."), name.split("."), strict=False))
    alike = all(difflib.SequenceMatcher(None, *pair).ratio() > ALIKE for pair in parts)
    return alike and key.count(".") == name.count(".")


def _asked(values: dict[str, Any], devices: int | None, frames: int, alone: bool) -> Callable[[str], Asked]:
    """What each stage's rules look at, by the stage's name."""
    defaults = {key: rule.default for key, rule in RULES.items() if "*" not in key and rule.default is not None}
    whole = defaults | {key: value for key, value in values.items() if value is not None}
    if not whole.get("data.task"):
        raise InputError("data.task: is missing; a name, or a list of names")
    if not whole.get("data.root"):
        raise InputError("data.root: is missing, the folder of <task>_<split>.h5")
    balanced = whole.get("data.task_sampling.strategy") == "balanced"
    tasks = look(whole["data.task"], Path(whole["data.root"]), frames)
    samples = Samples(tasks, whole["training.time_stride"], whole["training.rollout_horizon"], balanced)
    count = devices or whole["training.num_gpus"]

    def asked(stage: str) -> Asked:
        return Asked(stage, values, whole, count, samples, alone)

    return asked


def _stages(asked: Asked) -> list[str]:
    """Those that the file trains, and evaluation where it is enabled. Raises InputError where there are none."""
    trained = [stage for stage in STAGES if asked.get(f"stages.{stage}.epochs", 0) > 0]
    stages = trained + [EVALUATION] * bool(asked.get("evaluation.enabled"))
    if not stages:
        raise InputError("stages: none has epochs above 0, and evaluation.enabled is false")
    return stages


# ---- one stage ----------------------------------------------------------------------------------------------------


def _of_stage(asked: Asked) -> tuple[Ours, dict[str, Said]]:
    """Our keys of a stage, in the order of the rules, and what each key of the file says."""
    defaults = (
        pattern.replace(".*.", f".{asked.stage}.", 1) for pattern, rule in RULES.items() if rule.default is not None
    )
    own = [key for key in defaults if key.split(".")[:2] == ["stages", asked.stage] or not key.startswith("stages.")]
    keys = sorted({*(key for key in own if find(key)), *asked.given}, key=place)
    said = {key: _say(key, asked) for key in keys}
    ours: Ours = {"task.path": TASKS[asked.stage], "fabric.devices": asked.devices}
    for each in said.values():
        ours |= _keys(each)
    if asked.stage in STAGES:
        ours |= {"checkpoint.monitor": "val/nrmse", "checkpoint.mode": "min", "checkpoint.top_k": 3}
        ours["checkpoint.name"] = f"{asked.stage}-epoch={{epoch:02d}}-val_nrmse={{val/nrmse:.4f}}"
    return ours, said


def _say(key: str, asked: Asked) -> Said:
    rule, stage = find(key), key.split(".")[1] if key.startswith("stages.") else asked.stage
    assert rule is not None, key
    if stage != asked.stage:
        return f"for {stage}" if asked.get(f"stages.{stage}.epochs") else "the stage is left out"
    value = asked.given.get(key)
    if value is None and rule.default is None:
        return rule.null
    return rule.say(rule.default if value is None else value, asked)


def _keys(said: Said) -> Ours:
    return {} if isinstance(said, str) else said[0] if isinstance(said, tuple) else said


def _line(key: str, value: Any, said: Mapping[str, Said]) -> Line:
    """said: by the stages' names."""
    used: dict[str, list[str]] = {}
    reasons: list[str] = []
    for stage, each in said.items():
        if isinstance(each, str):
            reasons.append(each)
            continue
        keys, remark = each if isinstance(each, tuple) else (each, "")
        text = ", ".join(f"{name}: {_flow(value)}" for name, value in keys.items()) + (f" ({remark})" if remark else "")
        used.setdefault(text, []).append(stage)
    if used:
        alike = len(used) == 1 and not reasons
        parts = (text if alike else f"{text} [{', '.join(names)}]" for text, names in used.items())
        return Line(key, True, f"{_flow(value)} -> {'; '.join(parts)}")
    own = [reason for reason in reasons if not reason.startswith("for ")] or reasons
    return Line(key, False, f"{_flow(value)}: {'; '.join(dict.fromkeys(own))}")


def _flow(value: Any) -> str:
    """On one line, as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(_flow(each) for each in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# ---- what is written ----------------------------------------------------------------------------------------------


def _single(asked: Asked, ours: Ours) -> tuple[dict[str, Any], list[str]]:
    """The configuration of one stage, which starts where the stage before has left its best, and train.py's flags."""
    root = f"{ours['run.root']}/{ours['name']}"
    before = [stage for stage in STAGES if asked.get(f"stages.{stage}.epochs", 0) > 0]
    if asked.stage in before:
        before = before[: before.index(asked.stage)]
    start = {"task.args.start": f"{root}/{before[-1]}/checkpoints/best.pt"} if before else {}
    ours |= {"name": f"{ours['name']}/{asked.stage}"} | start
    if asked.stage in STAGES:
        return _tree(ours), []
    ours.setdefault("run.max_epochs", 1)  # of which it makes no use
    measured = ours.get("task.args.start", "FILE")
    return _tree(ours), ["--evaluate", measured, "--split", ours["--split"], "--out", f"{root}/evaluation/metrics.json"]


def _pipeline(ours: Mapping[str, Ours]) -> dict[str, Any]:
    """What all stages have alike under ``common``, the rest by stage."""
    (name,) = {own.pop("name") for own in ours.values()}
    trained = [own for stage, own in ours.items() if stage in STAGES] or list(ours.values())

    def alike(key: str, value: Any) -> bool:
        """Of the task's arguments all stages have to take them; what only trains leaves an evaluation as it is."""
        among = list(ours.values()) if key.startswith("task.") else trained
        return key not in OF_A_STAGE and all(own.get(key) == value for own in among)

    common = {k: v for k, v in trained[0].items() if k.split(".")[0] in SHARED and alike(k, v)}
    stages = {
        stage: _tree({key: value for key, value in own.items() if common.get(key, own) != value})
        for stage, own in ours.items()
    }
    return {"name": name, "common": _tree(common), "stages": stages}


def _tree(ours: Ours) -> dict[str, Any]:
    """Sections of dotted keys, in the order in which train.py lists them."""
    tree: dict[str, Any] = {}
    for key in sorted(ours, key=_place):
        *sections, last = key.split(".")
        if key.startswith("--") or key == "stages.evaluation":
            continue
        into = tree
        for section in sections:
            into = into.setdefault(section, {})
        into[last] = ours[key]
    return tree


def _place(key: str) -> int:
    names = [each.name for each in fields(Config)]
    return names.index(key.split(".")[0]) if key.split(".")[0] in names else len(names)


def configurations(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What train.py reads of a translation: of a pipeline, a configuration of each stage."""
    if "stages" not in tree:
        return [dict(tree)]
    common, stages = tree["common"], dict(tree["stages"])
    if EVALUATION in stages:
        stages[EVALUATION] = _over({"run": {"max_epochs": 1}}, stages[EVALUATION])
    return [_over(common, own) for own in stages.values()]
