"""Whether a configuration can be that of any run: cheap, and before anything else is imported.

What needs the task's class or a device is checked where that is built; what a strategy can't do, in ``strategies.py``.
"""

from __future__ import annotations

import math
from operator import attrgetter

from fabric_trainer.config import (
    BatchConfig,
    ClipConfig,
    CompileConfig,
    Config,
    EmaConfig,
    FabricConfig,
    MuonConfig,
)
from fabric_trainer.duration import seconds
from fabric_trainer.errors import InputError
from fabric_trainer.every import Every
from fabric_trainer.order import check_accumulate

YEAR = 525_600  # minutes
FOLLOW_A_METRIC = ("adaptive", "advanced")  # strategies of freezing
LEASTS = {  # the smallest values; null is right where the key's type has it
    "batch.global_batch_size": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.top_k": 0,
    "data.num_workers": 0,
    "early_stopping.patience": 1,
    "ema.start": 0,
    "evaluate.micro_batch_size": 1,
    "fabric.num_nodes": 1,
    "fabric.tensor_parallel_size": 1,
    "faults.budget": 0,
    "faults.spike_warmup": 1,
    "freeze.fixed.phase1_epochs": 1,
    "freeze.fixed.unfreeze": 1,
    "freeze.adaptive.patience": 1,
    "freeze.adaptive.min_improvement": 0,
    "freeze.progressive.interval": 1,
    "freeze.progressive.limit": 1,
    "freeze.early_gradual.from_epoch": 0,
    "freeze.early_gradual.per_epoch": 1,
    "freeze.gradient_guided.threshold": 0,
    "freeze.gradient_guided.sampling_epochs": 0,
    "freeze.gradient_guided.patience": 0,
    "freeze.gradient_guided.per_epoch": 1,
    "freeze.gradient_guided.warmup_epochs": 1,
    "freeze.gradient_guided.probes": 1,
    "freeze.advanced.threshold": 0,
    "freeze.advanced.analysis_window": 0,
    "freeze.advanced.patience": 0,
    "freeze.advanced.per_epoch": 1,
    "freeze.advanced.warmup_epochs": 1,
    "freeze.advanced.probes": 2,  # a change of sign is between two
    "freeze.advanced.rollback_patience": 1,
    "freeze.advanced.rollback_threshold": 0,
    "freeze.advanced.emergency_epoch": 0,
    "freeze.advanced.emergency_patience": 1,
    "freeze.advanced.emergency_units": 1,
    "freeze.advanced.emergency_warmup": 1,
    "profiler.wait": 0,
    "profiler.warmup": 0,
    "profiler.updates": 1,
    "run.log_every_n_steps": 1,
    "run.max_epochs": 1,
    "run.max_steps": 1,
    "run.overfit_batches": 1,
    "schedule.warmup": 0,
    "schedule.every": 1,
    "schedule.patience": 0,
    "seed": 0,
    "tune.updates": 20,
    "tune.max_batch_size": 1,
}
INTERVALS = ("evaluate.every", "checkpoint.every", "checkpoint.keep_every", "run.cleanup_every", "ema.snapshots")
WIDEST = 12**-0.5  # relative width of an average that weighs all updates alike


def check(config: Config) -> None:
    """Raise InputError for values that no run can have."""
    for key in (*LEASTS, *INTERVALS):
        path, _, name = key.rpartition(".")
        section = attrgetter(path)(config) if path else config
        value = getattr(section, name)
        if value is None and type(section).__annotations__[name].endswith("| None"):
            continue
        if key in LEASTS:
            _at_least(key, value, LEASTS[key])
        else:
            _interval(key, value)
    if config.run.max_epochs is None and config.run.max_steps is None:
        raise InputError("run.max_epochs or run.max_steps must say how long to train")
    if config.schedule.name == "plateau" and config.checkpoint.monitor is None:
        raise InputError("schedule.name: plateau follows checkpoint.monitor, which is not set")
    share = config.data.val_split
    if share is not None and not 0 < share < 1:
        raise InputError(f"data.val_split must be a share above 0 and below 1, or null, not {share}")
    _check_batch(config.batch)
    _check_clip(config.clip)
    _check_tools(config)
    _check_fabric(config.fabric)
    _check_compile(config.compile)
    _check_ema(config.ema)
    _check_control(config)
    _check_freeze(config)
    _check_optim(config)
    _check_wandb(config)


def _check_batch(batch: BatchConfig) -> None:
    if batch.micro_batch_size != "auto":
        _at_least("batch.micro_batch_size", batch.micro_batch_size, 1)
    elif batch.global_batch_size is None:
        raise InputError("batch.micro_batch_size: auto needs batch.global_batch_size, which says how much an update is")
    if batch.global_batch_size is not None and batch.accumulate != 1:
        raise InputError("batch.accumulate and batch.global_batch_size are both set: one follows from the other")
    try:
        check_accumulate(batch.accumulate)
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_clip(clip: ClipConfig) -> None:
    for key in ("norm", "value", "agc", "p"):
        limit = getattr(clip, key)
        if limit is not None and not limit > 0:
            raise InputError(f"clip.{key} must be above 0, not {limit}")
    limits = [key for key in ("norm", "value", "agc") if getattr(clip, key) is not None]
    if len(limits) > 1:
        raise InputError(f"{' and '.join(f'clip.{key}' for key in limits)} are both set: clip by one of them")
    if clip.agc_exempt and clip.agc is None:
        raise InputError(f"clip.agc_exempt is {clip.agc_exempt}, and clip.agc is not set")


def _check_tools(config: Config) -> None:
    """The finders and the profiler."""
    tune = config.tune
    if not 0 < tune.min_lr < tune.max_lr < math.inf:
        raise InputError(f"tune.min_lr must be above 0 and below tune.max_lr, not {tune.min_lr} and {tune.max_lr}")
    if not 0 <= tune.smoothing < 1:
        raise InputError(f"tune.smoothing must be at least 0 and below 1, not {tune.smoothing}")
    if taken := {"activities", "schedule", "on_trace_ready"} & config.profiler.args.keys():
        raise InputError(f"profiler.args: leave {min(taken)} out; profiler.wait, warmup and updates say what is traced")


def _check_fabric(fabric: FabricConfig) -> None:
    if not 0 < fabric.timeout <= YEAR:
        raise InputError(f"fabric.timeout must be above 0 minutes and at most {YEAR}, not {fabric.timeout}")
    blocks = fabric.fsdp.blocks
    if blocks == [] or (isinstance(blocks, int) and blocks < 1):
        raise InputError(f"fabric.fsdp.blocks must be class names, a number above 0 or null, not {blocks}")


def _check_optim(config: Config) -> None:
    optim, spike = config.optim, config.faults.spike
    if optim.muon != MuonConfig() and optim.name.lower() != "muon_hybrid":
        raise InputError(
            f"optim.muon is for optim.name: muon_hybrid, not for {optim.name}; give its keys in optim.args"
        )
    if any(not other.match for other in optim.others):
        raise InputError("optim.others: match must name patterns such as head.*")
    if optim.lookahead is not None:
        _at_least("optim.lookahead.k", optim.lookahead.k, 1)
        if not 0 < optim.lookahead.alpha <= 1:
            raise InputError(f"optim.lookahead.alpha must be above 0 and at most 1, not {optim.lookahead.alpha}")
    if optim.sam is not None and not 0 < optim.sam.rho < math.inf:
        raise InputError(f"optim.sam.rho must be above 0, not {optim.sam.rho}")
    if spike is not None and not spike > 1:
        raise InputError(f"faults.spike must be above 1, times the running norm, not {spike}")


def _check_freeze(config: Config) -> None:
    freeze = config.freeze
    for key, share in (
        ("early_gradual.target", freeze.early_gradual.target),
        ("advanced.emergency_start", freeze.advanced.emergency_start),
    ):
        if not 0 < share <= 1:
            raise InputError(f"freeze.{key} must be above 0 and at most 1, not {share}")
    if not 0 <= freeze.advanced.momentum < 1:
        raise InputError(f"freeze.advanced.momentum must be at least 0 and below 1, not {freeze.advanced.momentum}")
    for key, value in (("freeze.lr", freeze.lr), ("freeze.lr_decay", freeze.lr_decay)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{key} must be above 0, not {value}")
    if freeze.units is not None and (
        not freeze.units or (isinstance(freeze.units, dict) and not all(freeze.units.values()))
    ):
        raise InputError(f"freeze.units must name patterns, or be null for the task's own units, not {freeze.units}")
    if (freeze.strategy == "schedule") != bool(freeze.schedule):
        raise InputError(
            "freeze.strategy: schedule and freeze.schedule, such as {0: [], 500: [layer4]}, need each other"
        )
    if freeze.schedule and (0 not in freeze.schedule or min(freeze.schedule) < 0):
        raise InputError(
            f"freeze.schedule must start at step 0, such as {{0: [], 500: [layer4]}}, not {freeze.schedule}"
        )
    if freeze.strategy in FOLLOW_A_METRIC and freeze.monitor is None and config.checkpoint.monitor is None:
        raise InputError(
            f"freeze.strategy: {freeze.strategy} follows freeze.monitor or checkpoint.monitor; neither is set"
        )
    _check_restore(config)


def _check_restore(config: Config) -> None:
    """The weights come from best.pt, which has to be the best of the metric that decides."""
    freeze, checkpoint = config.freeze, config.checkpoint
    if freeze.strategy != "advanced" or not freeze.advanced.restore_weights:
        return
    if freeze.monitor not in (None, checkpoint.monitor) or freeze.mode not in (None, checkpoint.mode):
        raise InputError(
            "freeze.advanced.restore_weights brings back the best by checkpoint.monitor, which is "
            f"{checkpoint.monitor} ({checkpoint.mode}): freeze.monitor and freeze.mode must be null or the same"
        )
    if not checkpoint.top_k:
        raise InputError("freeze.advanced.restore_weights needs a best checkpoint: checkpoint.top_k must be at least 1")


def _check_ema(config: EmaConfig) -> None:
    for decay in config.decays:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay must be at least 0 and below 1, not {decay}")
    for width in config.power:
        if not 0 < width < WIDEST:
            raise InputError(f"ema.power: a relative width is above 0 and below {WIDEST:.4f}, not {width}")
    for key, values in (("decay", config.decays), ("power", config.power)):
        if len(set(values)) < len(values):
            raise InputError(f"ema.{key}: {values} has a value twice")
    if config.snapshots is not None and not config.power:
        raise InputError(f"ema.snapshots: {config.snapshots!r} are of power averages; set ema.power: [0.05, 0.1]")


def _check_control(config: Config) -> None:
    run, stopping, checkpoint = config.run, config.early_stopping, config.checkpoint
    for key in ("limit_train_batches", "limit_val_batches"):
        limit = getattr(run, key)
        if limit is not None and not (0 < limit <= 1 if isinstance(limit, float) else limit >= 1):
            raise InputError(f"run.{key} must be a count of at least 1 or a share above 0.0, at most 1.0, not {limit}")
    if isinstance(run.max_time, int):
        raise InputError(f"run.max_time: {run.max_time} is a number (so is 12:00:00 in YAML): write '12:00:00' or 12h")
    if run.max_time is not None:
        try:
            seconds(run.max_time)
        except ValueError as error:
            raise InputError(f"run.max_time {error}") from None
    if not stopping.min_delta >= 0:
        raise InputError(f"early_stopping.min_delta must be at least 0, not {stopping.min_delta}")
    if stopping.patience is not None and (stopping.monitor or checkpoint.monitor) is None:
        raise InputError("early_stopping.patience needs a metric: set early_stopping.monitor or checkpoint.monitor")
    if stopping.restore_best and (checkpoint.monitor is None or checkpoint.top_k < 1):
        raise InputError("early_stopping.restore_best needs best.pt: set checkpoint.monitor, checkpoint.top_k above 0")


def _check_wandb(config: Config) -> None:
    wandb, checkpoint = config.loggers.wandb, config.checkpoint
    if wandb is None or wandb.log_checkpoints == "none":
        return
    if checkpoint.sharded:
        raise InputError(
            f"loggers.wandb.log_checkpoints: {wandb.log_checkpoints} sends files, and checkpoint.sharded writes "
            "folders; one of the two must be left out"
        )
    if wandb.log_checkpoints == "best" and (checkpoint.monitor is None or checkpoint.top_k < 1):
        raise InputError(
            "loggers.wandb.log_checkpoints: best needs best.pt: set checkpoint.monitor, checkpoint.top_k above 0"
        )


def _check_compile(config: CompileConfig) -> None:
    if config.blocks is not None and (config.scope != "blocks" or not config.blocks):
        raise InputError(
            f"compile.blocks: {config.blocks} are the class names for compile.scope blocks, or leave it out"
        )
    if config.mode != "default" and config.backend != "inductor":
        raise InputError(f"compile.mode: {config.mode} is for compile.backend inductor, not for {config.backend}")


def _at_least(key: str, value: float | None, least: int) -> None:
    if value is None or not value >= least:  # nor is a NaN
        raise InputError(f"{key} must be at least {least}, not {value}")


def _interval(key: str, value: str) -> None:
    try:
        Every.parse(value)
    except ValueError as error:
        raise InputError(f"{key} {error}") from None
