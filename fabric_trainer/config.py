"""The configuration: dataclasses are its keys, their docstrings its help (``command.py`` reads it).

Imports neither torch nor lightning, so that ``--help`` and every complaint about a key come at once. What needs the
task's class (its arguments) or a device (precision, memory) is checked where that is built, still before training.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

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

    micro_batch_size: int | Literal["auto"] = 32
    """Samples per device and forward; auto finds the most that fit at the start, and needs global_batch_size."""
    accumulate: int | dict[str, Any] = 1
    """Micro-batches per update: 4, {window: {0: 8, 500: 4}} or {epoch: {0: 8, 5: 4}}."""
    global_batch_size: int | None = None
    """Samples per update; accumulation follows from it."""


@dataclass
class MuonConfig:
    """Muon's half of muon_hybrid; AdamW's is optim.lr, optim.weight_decay and optim.args."""

    matrices: Literal["hidden", "all"] | list[str] = "hidden"
    """Which it steps: hidden, the 2-D weights in the task's blocks; all, all but embeddings; or name patterns."""
    lr: float | None = None
    """Peak learning rate; else optim.lr."""
    weight_decay: float | None = None
    """Else optim.weight_decay."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What a matrix's rate is multiplied by: 0.2 sqrt(max(rows, columns)), with which AdamW's rates fit, or (original)
    sqrt(max(1, rows / columns))."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of torch.optim.Muon: momentum, nesterov, ns_steps, ns_coefficients, eps."""


@dataclass
class OtherConfig:
    """An optimizer for some of the parameters."""

    match: list[str] = field(default_factory=list)
    """Patterns of parameter names, such as head.*; the first entry that matches a parameter has it."""
    name: str = "adamw"
    """As optim.name."""
    lr: float | None = None
    """Peak learning rate; else optim.lr."""
    weight_decay: float | None = None
    """Else optim.weight_decay."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of this optimizer."""


@dataclass
class LookaheadConfig:
    """Slow weights that follow every k updates."""

    k: int = 5
    """Applied updates between two synchronisations."""
    alpha: float = 0.5
    """The share of the way that the slow weights go."""


@dataclass
class SamConfig:
    """Sharpness-aware minimisation: the gradient is that at the worst point nearby. Twice the work."""

    rho: float = 0.05
    """How far away that point is."""
    adaptive: bool = False
    """Measure the distance relative to each weight (ASAM; rho about ten times larger)."""


@dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    name: str = "adamw"
    """A name of torch.optim or torch_optimizer, in any case, or an import path; muon_hybrid: Muon for matrices, AdamW
    for the rest."""
    lr: float = 1e-3
    """Peak learning rate; the schedule gives the share of it."""
    weight_decay: float = 0.0
    """For weights; norms, biases and other vectors get none."""
    decay_everything: bool = False
    """Give norms and biases the weight decay too."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, such as betas."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    others: list[OtherConfig] = field(default_factory=list)
    """Optimizers for parameters by name, beside this one: [{match: [head.*], name: sgd, lr: 0.1, weight_decay: 0,
    args: {momentum: 0.9}}]."""
    lookahead: LookaheadConfig | None = None
    """Lookahead around the optimizer: {k: 5, alpha: 0.5}."""
    sam: SamConfig | None = None
    """Sharpness-aware minimisation: {rho: 0.05, adaptive: false}."""


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
class FixedFreezeConfig:
    """fixed: the units stay frozen, for good or for a first phase."""

    phase1_epochs: int | None = None
    """Epochs after which the second phase begins; null: the units stay frozen for the whole run."""
    unfreeze: int = 3
    """How many units the second phase trains, the first in order."""


@dataclass
class AdaptiveFreezeConfig:
    """adaptive: unfreezes the next unit when the monitored metric stands still."""

    patience: int = 2
    """Evaluated epochs without improvement before the next unit is unfrozen."""
    min_improvement: float = 0.005
    """What the metric must gain on its best to count as improved, in its own units."""


@dataclass
class ProgressiveFreezeConfig:
    """progressive: unfreezes the next unit at fixed intervals."""

    interval: int = 5
    """Epochs between two units; the first comes after as many."""
    limit: int | None = None
    """How many units it unfreezes at most; null: all."""


@dataclass
class EarlyGradualFreezeConfig:
    """early_gradual: unfreezes units every epoch until a share of the parameters trains."""

    from_epoch: int = 1
    """The first epoch, counted from 0, at whose end units are unfrozen."""
    per_epoch: int = 1
    """How many units at the end of each epoch."""
    target: float = 0.5
    """The share of all units' parameters at which it stops."""


@dataclass
class GradientGuidedFreezeConfig:
    """gradient_guided: unfreezes the units with the largest gradients, measured on probe batches."""

    threshold: float = 0.01
    """What a unit's mean absolute gradient must exceed."""
    sampling_epochs: int = 2
    """Epochs at the start that only measure."""
    patience: int = 2
    """Epochs that pass, after those and after each unfreezing, before units are unfrozen."""
    per_epoch: int = 1
    """The most units unfrozen at once, the largest gradients first."""
    warmup_epochs: int = 3
    """Epochs over which an unfrozen unit's rate rises from a tenth to the whole."""
    probes: int = 4
    """Probe batches an epoch while units are frozen: each costs a forward and a backward."""


@dataclass
class AdvancedFreezeConfig:
    """advanced: unfreezes by a score of gradients, activations and neighbours; rolls back where the metric falls."""

    threshold: float = 0.002
    """Base of what a unit's score must exceed; falls over the epochs to a half, rises with depth."""
    momentum: float = 0.9
    """Of the running mean of gradient importance over probe batches."""
    dependencies: bool = True
    """Unfrozen units raise the score of those they build on."""
    analysis_window: int = 2
    """The first epoch, counted from 0, at whose end a score may unfreeze a unit."""
    patience: int = 2
    """Epochs that pass at the start and after each unfreezing or rollback before units are unfrozen."""
    per_epoch: int = 1
    """The most units unfrozen at once, the highest scores first."""
    warmup_epochs: int = 3
    """Of a unit of no known kind; blocks take one epoch less, at least 2, and convolutions one more."""
    probes: int = 4
    """Probe batches an epoch while units are frozen: each costs a forward and a backward."""
    rollback_patience: int | None = 2
    """Evaluations in a row, each worse than the one before, after which it rolls back; null: it never does."""
    rollback_threshold: float = 0.001
    """How much worse, in the metric's own units."""
    restore_weights: bool = False
    """A rollback also brings the weights of the best evaluation back."""
    emergency_epoch: int | None = 4
    """The epoch, counted from 0, from whose end on units are unfrozen whatever their score while none is; null: it
    never does so."""
    emergency_patience: int = 2
    """The same at once where the metric gained less than emergency_gain over so many evaluations."""
    emergency_gain: float = 0.005
    """In the metric's own units."""
    emergency_units: int = 1
    """How many units it unfreezes, the deepest first."""
    emergency_warmup: int = 6
    """Epochs of their warm-up."""
    emergency_start: float = 0.01
    """The share of the rate at which it starts."""


@dataclass
class FreezeConfig:
    """Which units (layers, blocks) train, and from when on."""

    strategy: Literal[
        "none", "fixed", "schedule", "adaptive", "progressive", "early_gradual", "gradient_guided", "advanced"
    ] = "none"
    """none trains everything, fixed keeps the units frozen, schedule goes by the step; the others unfreeze unit after
    unit, deciding at the end of each epoch."""
    units: list[str] | dict[str, list[str]] | None = None
    """Name patterns in the order of unfreezing, or {unit: [patterns]}; else those that the task names."""
    lr: float | None = None
    """Peak learning rate of the units; else optim.lr."""
    lr_decay: float = 1.0
    """Each further unit's rate is that of the one before times this."""
    monitor: str | None = None
    """adaptive, advanced: the metric followed; else checkpoint.monitor."""
    mode: Literal["min", "max"] | None = None
    """Which end of it is good; else checkpoint.mode."""
    schedule: dict[int, list[str]] = field(default_factory=dict)
    """schedule: the units (names or patterns) that train from a step on: {0: [], 500: [layer4], 2000: ['layer*']}."""
    fixed: FixedFreezeConfig = field(default_factory=FixedFreezeConfig)
    adaptive: AdaptiveFreezeConfig = field(default_factory=AdaptiveFreezeConfig)
    progressive: ProgressiveFreezeConfig = field(default_factory=ProgressiveFreezeConfig)
    early_gradual: EarlyGradualFreezeConfig = field(default_factory=EarlyGradualFreezeConfig)
    gradient_guided: GradientGuidedFreezeConfig = field(default_factory=GradientGuidedFreezeConfig)
    advanced: AdvancedFreezeConfig = field(default_factory=AdvancedFreezeConfig)


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
class DdpConfig:
    """DistributedDataParallel's options."""

    find_unused_parameters: bool = False
    """Look for parameters that a forward left out; costs a pass over the graph."""
    static_graph: bool = False
    """Promise that every forward uses the same parameters."""
    gradient_as_bucket_view: bool = True
    """Gradients lie in the buckets that are reduced: one copy less."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks."""


@dataclass
class FsdpConfig:
    """Fully sharded data parallel."""

    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = "FULL_SHARD"
    """SHARD_GRAD_OP keeps the weights gathered between forward and backward; NO_SHARD is ddp."""
    blocks: list[str] | int | None = None
    """What is sharded as one: class names, or the least number of parameters; else the blocks that the task names."""
    cpu_offload: bool = False
    """Shards lie in host memory while they are not used."""
    meta_init: bool = False
    """Build the network without memory, shard it, then initialise: for models larger than one device."""
    param_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What weights are gathered and computed in; else it follows fabric.precision (bf16-mixed: bf16)."""
    reduce_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """What gradients are reduced in; else it follows fabric.precision (bf16-mixed: fp32)."""


@dataclass
class DeepspeedConfig:
    """DeepSpeed ZeRO."""

    offload_optimizer: bool = False
    """Optimizer state lies in host memory."""
    offload_parameters: bool = False
    """stage 3: weights lie in host memory while they are not used."""
    config: dict[str, Any] | str | None = None
    """A DeepSpeed JSON file, or its content; "auto" in it is filled from this configuration."""


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
    """single, ddp, ddp_spawn, ddp_notebook, fsdp, fsdp1, tensor_parallel, deepspeed (see --strategies); auto: single on
    one device, else ddp."""
    precision: str = "auto"
    """32-true (which auto means), 16-mixed, bf16-mixed, bf16-true, 64-true or transformer-engine."""
    stage: Literal[1, 2, 3] = 2
    """deepspeed: what ZeRO shards; 1 the optimizer, 2 the gradients too, 3 the weights too."""
    tensor_parallel_size: int | None = None
    """Ranks that share each layer; else all of them under tensor_parallel, 1 under fsdp (more is 2-D)."""
    activation_checkpointing: list[str] = field(default_factory=list)
    """Class names of blocks whose activations are recomputed in the backward."""
    timeout: float = 30.0
    """Minutes that a collective may wait."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products; high uses TF32."""
    cudnn_tf32: bool = True
    """TF32 in float32 convolutions."""
    requeue: bool = False
    """SLURM: on SIGUSR1 save, then scontrol requeue this job."""
    ddp: DdpConfig = field(default_factory=DdpConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)


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
