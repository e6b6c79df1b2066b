"""The configuration: dataclasses are its keys, their docstrings its help (``command.py`` reads it).

Imports neither torch nor lightning, so that ``--help`` and every complaint about a key come at once. What needs the
task's class (its arguments) or a device (precision, memory) is checked where that is built, still before training.
The longest sections have files of their own, ``config_*.py``, and can be imported from here like the others.
"""

# ruff: noqa: F401

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fabric_trainer.config_fabric import DdpConfig, DeepspeedConfig, FabricConfig, FsdpConfig
from fabric_trainer.config_freeze import (
    AdaptiveFreezeConfig,
    AdvancedFreezeConfig,
    EarlyGradualFreezeConfig,
    FixedFreezeConfig,
    FreezeConfig,
    GradientGuidedFreezeConfig,
    ProgressiveFreezeConfig,
)
from fabric_trainer.config_optim import LookaheadConfig, MuonConfig, OptimConfig, OtherConfig, SamConfig

DEFAULT_CONFIG = "configs/burgers.yaml"


@dataclass
class TaskConfig:
    """What to train."""

    path: str = "models.physics.operator_stage.OperatorStage"
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
    download: bool = False
    """Fetch what is not there, for tasks whose data can be fetched."""
    val_split: float | None = None
    """The share of the training samples held out as val split, for tasks whose data brings none."""


@dataclass
class BatchConfig:
    """How many samples an update sees: micro_batch_size x accumulate x ranks."""

    micro_batch_size: int | Literal["auto"] = 32
    """Samples per device and forward; auto finds the most that fit at the start, and needs global_batch_size."""
    accumulate: int | dict[str, Any] = 1
    """Micro-batches per update: 4, {window: {0: 8, 500: 4}} or {epoch: {0: 8, 5: 4}}."""
    global_batch_size: int | None = None
    """Samples per update; accumulation follows from it."""


@dataclass
class ScheduleConfig:
    """The learning rate as a share of optim.lr, by applied updates."""

    name: Literal["constant", "linear", "cosine", "one_cycle", "step", "exponential", "plateau"] = "constant"
    """Its form after the warm-up."""
    warmup: int = 0
    """Updates that rise linearly to the full rate."""
    final: float = 0.0
    """linear, cosine, one_cycle: the share at the last update; plateau: the least."""
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
    agc: float | None = None
    """Adaptive clipping: the largest norm of a gradient's row, relative to that of the weight's row, such as 0.01."""
    agc_exempt: list[str] = field(default_factory=list)
    """Patterns of parameter names that it leaves alone, such as [head]."""
    p: float = 2.0
    """Which norm is measured, logged and clipped; .inf for the largest element."""


@dataclass
class EmaConfig:
    """Moving averages of the weights, several at once; the first of decay, else of power, is the main one."""

    decay: float | list[float] | None = None
    """Exponential: such as 0.999, or [0.999, 0.9999]; nothing keeps none."""
    warmup: bool = True
    """decay: start with min(decay, (1 + n) / (10 + n)) at the n-th update, so that early weights are soon forgotten."""
    power: list[float] = field(default_factory=list)
    """Power-function averages (EDM2): widths relative to the run so far, such as [0.05, 0.1]."""
    start: int = 0
    """Updates before which no average is kept: it is the weights."""
    buffers: bool = False
    """Average the running statistics of BatchNorm too; else the network's own go with an average."""
    snapshots: str | None = None
    """How often the power averages are written to the run's ema/, such as '1000 steps'; tools/ema makes any width of
    them."""

    @property
    def decays(self) -> list[float]:
        """decay as a list."""
        decay = [] if self.decay is None else self.decay
        return decay if isinstance(decay, list) else [decay]

    @property
    def kept(self) -> bool:
        """Whether there is any average."""
        return bool(self.decays or self.power)


@dataclass
class CompileConfig:
    """torch.compile; where a compiler fails the run goes on in eager."""

    scope: Literal["none", "whole", "blocks"] = "none"
    """whole: the network's forward as one; blocks: each repeated part, which is soon compiled and shared by all."""
    blocks: list[str] | None = None
    """scope blocks: their class names; else the blocks that the task names."""
    backend: str = "inductor"
    """A name that torch knows, such as inductor or aot_eager."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """inductor's: reduce-overhead uses CUDA graphs, max-autotune also measures kernels."""
    dynamic: bool | None = None
    """true: one graph for all shapes; false: one a shape; else a second shape makes it dynamic."""
    fullgraph: bool = False
    """A forward that breaks into several graphs is a failure."""
    require: bool = False
    """A failure ends the run with an error."""


@dataclass
class FaultsConfig:
    """What to do about a gradient that is not finite or suddenly large, and about a full device."""

    nonfinite: Literal["skip", "raise"] = "skip"
    """skip: leave the update out, all ranks alike; raise: end the run before it."""
    budget: int = 10
    """Skipped updates after which the run ends with an error."""
    spike: float | None = None
    """Leave an update out whose gradient norm is more than this many times its running mean, such as 5."""
    spike_warmup: int = 25
    """Updates before the first that may be left out so."""
    oom: Literal["auto", "split", "restart"] = "auto"
    """Out of memory: split the micro-batch, or leave with code 76 to restart; auto: split on one device, or restart."""


@dataclass
class TuneConfig:
    """The finders: --tune lr and --tune batch_size."""

    min_lr: float = 1e-7
    """lr: where the sweep begins."""
    max_lr: float = 10.0
    """lr: where it ends, if the loss has not gone up before."""
    updates: int = 100
    """lr: how many, each with the same factor on the rate."""
    smoothing: float = 0.9
    """lr: how much of the average before stays in the running average of the loss."""
    max_batch_size: int = 1024
    """batch_size, and batch.micro_batch_size auto: the most samples tried in one forward."""


@dataclass
class RunConfig:
    """How long, and where to."""

    root: str = "runs"
    """Folder of the runs' folders."""
    max_epochs: int | None = None
    """Passes over the plan."""
    max_steps: int | None = None
    """Applied updates; with max_epochs, whichever comes first."""
    max_time: str | int | None = None
    """Time of training over all resumes, after which the run is evaluated, saved and left with code 0: '02:12:00:00'
    (days first), '12:00:00', '90m' or '1d 12h', in quotes."""
    limit_train_batches: int | float | None = None
    """Updates of an epoch: a count, or (with a point) a share; the first ones of the whole epoch."""
    limit_val_batches: int | float | None = None
    """Batches of an evaluation, counted over all ranks: a count, or (with a point) a share; the first ones."""
    overfit_batches: int | None = None
    """Train on the first so many updates of epoch 0 alone, in the same order in every epoch, and evaluate on them."""
    log_every_n_steps: int = 50
    """Updates between two fetches of the logged values from the device."""
    log_memory: bool = False
    """At log points also memory/host (resident) and of a GPU memory/allocated, memory/reserved and
    memory/peak_since_log: bytes, the most of any rank."""
    cleanup_every: str | None = None
    """Collect garbage and give the device's unused blocks back, such as every '1000 steps' or '1 epochs'."""
    log_gradient_norms: Literal["none", "groups", "modules"] = "none"
    """grad_norm/... of every optimizer group, or of every module of the network, before clipping, by clip.p."""
    deterministic: bool = False
    """Deterministic algorithms alone, which can be slower; an operation that has none is an error."""


@dataclass
class EvaluateConfig:
    """Evaluation on the val split."""

    every: str = "1 epochs"
    """'100 steps', '1 epochs', '0.5 epochs'; the end of the run is always evaluated."""
    micro_batch_size: int | None = None
    """Samples per device and forward; else batch.micro_batch_size."""
    weights: Literal["raw", "ema", "both", "all"] = "both"
    """Which weights: raw gives val/..., ema gives val_ema/... where there is an average; all: further averages too, as
    val_ema_0.9999/... or val_ema_power_0.1/...."""


@dataclass
class EarlyStoppingConfig:
    """The end of a run whose evaluations stop improving."""

    patience: int | None = None
    """Evaluations in a row without an improvement after which the run ends; nothing never ends it early."""
    min_delta: float = 0.0
    """What the metric must gain on its best to count as improved, in its own units."""
    monitor: str | None = None
    """The metric followed; else checkpoint.monitor."""
    mode: Literal["min", "max"] | None = None
    """Which end of it is good; else checkpoint.mode."""
    restore_best: bool = False
    """At the end of any run put the weights of best.pt, and their average, into the network; last.pt keeps the last."""


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
    sharded: bool = False
    """Every rank writes its own shard (torch.distributed.checkpoint); tools/consolidate makes the plain file."""


@dataclass
class ProfilerConfig:
    """Where the time goes; written into the run's folder."""

    name: Literal["none", "simple", "advanced", "pytorch"] = "none"
    """simple: wall time by section of the loop, over all ranks; advanced: cProfile's table of functions; pytorch: a
    trace of every operator."""
    wait: int = 5
    """pytorch: updates before it starts."""
    warmup: int = 2
    """pytorch: updates that it runs along without recording."""
    updates: int = 3
    """pytorch: updates recorded."""
    args: dict[str, Any] = field(default_factory=dict)
    """pytorch: further arguments of torch.profiler.profile, such as {record_shapes: true, with_stack: true}."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    project: str | None = None
    """Where the run is listed."""
    entity: str | None = None
    """Whose project: a user or a team."""
    name: str | None = None
    """Shown for the run; else the name of its folder."""
    group: str | None = None
    """Runs shown together."""
    tags: list[str] = field(default_factory=list)
    """To find runs by."""
    notes: str | None = None
    """A description of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline: written beside the run, for wandb sync."""
    watch: Literal["none", "gradients", "parameters", "all"] = "none"
    """Histograms every run.log_every_n_steps updates: of gradients as the optimizer gets them, of the parameters that
    it leaves."""
    log_checkpoints: Literal["none", "best", "all"] = "none"
    """Checkpoints as artifacts: best.pt when the run ends or is stopped; all: each once it is on disk."""


@dataclass
class MlflowConfig:
    """MLflow."""

    tracking_uri: str | None = None
    """A server or sqlite:///FILE; else $MLFLOW_TRACKING_URI, else mlflow.db in run.root."""
    experiment: str = "Default"
    """Where the run is listed; made where there is none."""
    run_name: str | None = None
    """Shown for the run; else the name of its folder."""
    tags: dict[str, str] = field(default_factory=dict)
    """To find runs by: {dataset: cifar10}."""


@dataclass
class LoggersConfig:
    """Where per-update values and metrics go."""

    csv: bool = True
    """metrics.csv, a row per update."""
    tensorboard: bool = True
    """TensorBoard events."""
    wandb: WandbConfig | None = None
    """Weights & Biases: {project, entity, name, group, tags, notes, mode, watch, log_checkpoints}."""
    mlflow: MlflowConfig | None = None
    """MLflow: {tracking_uri, experiment, run_name, tags}."""


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
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    fabric: FabricConfig = field(default_factory=FabricConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    callbacks: list[str] = field(default_factory=list)
    """Import paths of classes with any of on_update_end, on_epoch_end, on_evaluation_end, on_checkpoint_saved,
    on_fit_end."""


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
