"""The configuration: dataclasses are its keys, jsonargparse its command line.

Imports neither torch nor lightning, so that ``--help`` and every complaint about a key come at once. What needs the
task's class (its arguments) or a device (precision, memory) is checked where that is built, still before training.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import yaml

from fabric_trainer.errors import InputError
from fabric_trainer.every import Every
from fabric_trainer.order import check_accumulate

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

DEFAULT_CONFIG = "configs/burgers.yaml"


@dataclass
class TaskConfig:
    """What to train."""

    path: str = "models.physics.task.BurgersOperator"
    """Import path of a fabric_trainer.Task."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments; an unknown one is an error."""


@dataclass
class DataConfig:
    """Where data lies and who reads it."""

    root: str | None = None
    """Folder of data sets; else $FABRIC_TRAINER_DATA, else ~/.cache/fabric_trainer."""
    num_workers: int = 0
    """Processes per rank that prepare batches; 0 prepares them in the training process."""


@dataclass
class BatchConfig:
    """How many samples an update sees: micro_batch_size x accumulate x ranks."""

    micro_batch_size: int = 32
    """Samples per device and forward."""
    accumulate: int | dict[str, Any] = 1
    """Micro-batches per update: 4, {window: {0: 8, 500: 4}} or {epoch: {0: 8, 5: 4}}."""
    global_batch_size: int | None = None
    """Samples per update; accumulation follows from it."""


@dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    name: str = "adamw"
    """A name of torch.optim or torch_optimizer, in any case, or an import path."""
    lr: float = 1e-3
    """Peak learning rate; the schedule gives the share of it."""
    weight_decay: float = 0.0
    """For weights; norms, biases and other vectors get none."""
    decay_everything: bool = False
    """Give norms and biases the weight decay too."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, such as betas."""


@dataclass
class ScheduleConfig:
    """The learning rate as a share of optim.lr, by applied updates."""

    name: Literal["constant", "linear", "cosine", "one_cycle", "step", "exponential", "plateau"] = "constant"
    """Its form after the warm-up."""
    warmup: int = 0
    """Updates that rise linearly to the full rate."""
    final: float = 0.0
    """linear, cosine, one_cycle: the share at the last update."""
    start: float = 0.04
    """one_cycle: the share at the first update."""
    peak: float = 0.3
    """one_cycle: the share of the run at which the full rate is reached."""
    every: int = 1000
    """step: updates between two drops."""
    factor: float = 0.1
    """step, plateau: what a drop multiplies by; exponential: what the whole run multiplies by."""
    patience: int = 3
    """plateau: evaluations without improvement before a drop."""
    threshold: float = 1e-3
    """plateau: the relative change that counts as an improvement."""


@dataclass
class ClipConfig:
    """Gradient clipping; nothing set means none."""

    norm: float | None = None
    """Largest global norm."""
    value: float | None = None
    """Largest absolute value of an element."""
    p: float = 2.0
    """Which norm is measured, logged and clipped; .inf for the largest element."""


@dataclass
class EmaConfig:
    """Exponential moving average of the weights."""

    decay: float | None = None
    """Such as 0.999; nothing keeps no average."""
    warmup: bool = True
    """Start with min(decay, (1 + step) / (10 + step)), so that early weights are soon forgotten."""


@dataclass
class FaultsConfig:
    """What to do about a gradient that is not finite."""

    nonfinite: Literal["skip", "raise"] = "skip"
    """skip: leave the update out, all ranks alike; raise: end the run before it."""
    budget: int = 10
    """Skipped updates after which the run ends with an error."""


@dataclass
class FabricConfig:
    """Devices, precision and strategy: handed to Lightning Fabric."""

    accelerator: str = "auto"
    """auto, cpu, cuda, gpu or mps."""
    devices: int | str | list[int] = "auto"
    """How many, or which; auto means one without a launcher, and the launcher's number under one."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto, single or ddp."""
    precision: str = "auto"
    """32-true (which auto means), 16-mixed, bf16-mixed, bf16-true or 64-true."""


@dataclass
class RunConfig:
    """How long, and where to."""

    root: str = "runs"
    """Folder of the runs' folders."""
    max_epochs: int | None = None
    """Passes over the plan."""
    max_steps: int | None = None
    """Applied updates; with max_epochs, whichever comes first."""
    log_every_n_steps: int = 50
    """Updates between two fetches of the logged values from the device."""


@dataclass
class EvaluateConfig:
    """Evaluation on the val split."""

    every: str = "1 epochs"
    """'100 steps', '1 epochs', '0.5 epochs'; the end of the run is always evaluated."""
    micro_batch_size: int | None = None
    """Samples per device and forward; else batch.micro_batch_size."""
    weights: Literal["raw", "ema", "both"] = "both"
    """Which weights: raw gives val/..., ema gives val_ema/... where there is an average."""


@dataclass
class CheckpointConfig:
    """What is saved, when, and what is kept."""

    every: str = "1 epochs"
    """'1000 steps', '1 epochs', '10 minutes'; the end of the run is always saved."""
    keep_last: int = 2
    """The newest ones kept."""
    keep_every: str | None = None
    """Those kept for good, such as '10000 steps'."""
    top_k: int = 1
    """The best by monitor kept."""
    monitor: str | None = None
    """The metric that best.pt follows, such as val/loss."""
    mode: Literal["min", "max"] = "min"
    """Which end of it is good."""
    name: str = "step-{step:08d}"
    """File name; any counter and metric: '{step}-{val/nrmse:.4f}' (a slash becomes an underscore)."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass
class LoggersConfig:
    """Where per-update values and metrics go."""

    csv: bool = True
    """metrics.csv, a row per update."""
    tensorboard: bool = True
    """TensorBoard events."""
    wandb: WandbConfig | None = None
    """Weights & Biases: {project, entity, name, group, tags, notes, mode}."""


@dataclass
class Config:
    """Every key of a run. Each section has the name of the file it configures."""

    name: str | None = None
    """The run's name, runs/<name>/; else <config>-<date>-<time>."""
    seed: int = 42
    """Of weights, order, augmentation and dropout."""
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    callbacks: list[str] = field(default_factory=list)
    """Import paths of classes with any of on_update_end, on_epoch_end, on_evaluation_end, on_checkpoint_saved,
    on_fit_end."""


@dataclass
class Command:
    """What a command line asks for beside its configuration."""

    config: str = DEFAULT_CONFIG
    resume: str | None = None
    init_from: str | None = None
    overwrite: bool = False
    evaluate: str | None = None
    split: str = "val"
    dry_run: bool = False
    fast_dev_run: bool = False
    given: frozenset[str] = frozenset()  # configuration keys set on the command line itself

    @property
    def config_name(self) -> str:
        return Path(self.config).stem


def parse(argv: Sequence[str]) -> tuple[Command, Config]:
    """The command and its configuration. Raises InputError; ``--help`` and ``--print_config`` print and exit 0."""
    flags, rest = _command_parser().parse_known_args(list(argv))
    parser = _config_parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(["--help"])
    if not Path(flags.config).is_file():
        raise InputError(f"--config {flags.config}: there is no such file")
    config = _dataclass(parser, parser.parse_args([f"--config={flags.config}", *rest]))
    given = {arg[2:].split("=")[0].rstrip("+") for arg in rest if arg.startswith("--")}
    return Command(**vars(flags), given=frozenset(given)), config


def load(path: Path | str) -> Config:
    """The configuration in a YAML file. Raises InputError."""
    parser = _config_parser()
    return _dataclass(parser, parser.parse_args([f"--config={path}"]))


def check(config: Config) -> None:
    """Raise InputError for values that no run can have; cheap, and before anything else is imported."""
    _at_least("batch.micro_batch_size", config.batch.micro_batch_size, 1)
    _at_least("run.log_every_n_steps", config.run.log_every_n_steps, 1)
    _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    _at_least("data.num_workers", config.data.num_workers, 0)
    _at_least("seed", config.seed, 0)
    _at_least("fabric.num_nodes", config.fabric.num_nodes, 1)
    _at_least("schedule.warmup", config.schedule.warmup, 0)
    _at_least("schedule.every", config.schedule.every, 1)
    _at_least("schedule.patience", config.schedule.patience, 0)
    _at_least("faults.budget", config.faults.budget, 0)
    _at_least("checkpoint.top_k", config.checkpoint.top_k, 0)
    for key, length in (
        ("run.max_epochs", config.run.max_epochs),
        ("run.max_steps", config.run.max_steps),
        ("batch.global_batch_size", config.batch.global_batch_size),
        ("evaluate.micro_batch_size", config.evaluate.micro_batch_size),
    ):
        if length is not None:
            _at_least(key, length, 1)
    for key, limit in (("norm", config.clip.norm), ("value", config.clip.value), ("p", config.clip.p)):
        if limit is not None and not limit > 0:
            raise InputError(f"clip.{key} must be above 0, not {limit}")
    for section, value in (("evaluate.every", config.evaluate.every), ("checkpoint.every", config.checkpoint.every)):
        _interval(section, value)
    if config.checkpoint.keep_every is not None:
        _interval("checkpoint.keep_every", config.checkpoint.keep_every)
    if config.clip.norm is not None and config.clip.value is not None:
        raise InputError("clip.norm and clip.value are both set: clip by one of them")
    if config.run.max_epochs is None and config.run.max_steps is None:
        raise InputError("run.max_epochs or run.max_steps must say how long to train")
    if config.schedule.name == "plateau" and config.checkpoint.monitor is None:
        raise InputError("schedule.name: plateau follows checkpoint.monitor, which is not set")
    if config.ema.decay is not None and not 0 <= config.ema.decay < 1:
        raise InputError(f"ema.decay must be at least 0 and below 1, not {config.ema.decay}")
    if config.batch.global_batch_size is not None and config.batch.accumulate != 1:
        raise InputError("batch.accumulate and batch.global_batch_size are both set: one follows from the other")
    try:
        check_accumulate(config.batch.accumulate)
    except ValueError as error:
        raise InputError(str(error)) from None


def to_yaml(config: Config) -> str:
    """The whole configuration, every key, as YAML."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"batch": {"accumulate": 1}} -> {"batch.accumulate": 1}; an empty dict stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and all(isinstance(k, str) for k in value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def data_root(config: Config) -> Path:
    """data.root, else $FABRIC_TRAINER_DATA, else ~/.cache/fabric_trainer."""
    return Path(config.data.root or os.environ.get("FABRIC_TRAINER_DATA") or "~/.cache/fabric_trainer").expanduser()


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e3, which jsonargparse reads as a number and PyYAML does not."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    number = re.fullmatch(r"[-+]?[0-9._]+[eE][-+]?[0-9]+", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if number else None)


_Dumper.add_representer(str, _quoted)


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(message.split()))
        raise InputError(re.sub(r"<class '(\w+)'>", r"\1", message))


def _config_parser() -> _Parser:
    parser = _Parser(
        description="Train a task on Lightning Fabric. Every key below may stand in a YAML file too.",
        usage="%(prog)s [--config FILE] [--key value ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=_command_parser().format_help().split("\n\n", 1)[1],
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(Config, None)
    for action in parser._actions:
        if "." not in action.dest and action.metavar == "CONFIG":
            action.help = argparse.SUPPRESS  # a section from a file of its own: possible, but noise here
    return parser


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("what to do").add_argument
    add("--config", default=DEFAULT_CONFIG, metavar="FILE", help=f"the run's YAML file (default: {DEFAULT_CONFIG})")
    add("--resume", metavar="auto|PATH|none", help="continue a run, or from one checkpoint")
    add("--init_from", metavar="PATH", help="start from a checkpoint's weights alone")
    add("--overwrite", action="store_true", help="delete the run of that name first")
    add("--evaluate", metavar="PATH|best|last", help="measure a checkpoint instead of training")
    add("--split", metavar="NAME", help="with --evaluate: which split (default: val)")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    add("--fast_dev_run", action="store_true", help="one update, one evaluation batch, no run folder")
    return parser


def _dataclass(parser: _Parser, namespace: jsonargparse.Namespace) -> Config:
    namespace.pop("config", None)
    for section in fields(Config):
        if is_dataclass(section.default_factory) and not isinstance(namespace[section.name], jsonargparse.Namespace):
            raise InputError(f"{section.name}: is a section of keys, not {namespace[section.name]!r}")
    config = Config(**vars(parser.instantiate(namespace)))
    check(config)
    return config


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{key} must be at least {least}, not {value}")


def _interval(key: str, value: str) -> None:
    try:
        Every.parse(value)
    except ValueError as error:
        raise InputError(f"{key} {error}") from None
