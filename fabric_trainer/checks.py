"""Whether a configuration can be that of any run: cheap, and before anything else is imported.

What needs the task's class or a device is checked where that is built; what a strategy can't do, in ``strategies.py``.
"""

from __future__ import annotations

import math

from fabric_trainer.config import BatchConfig, CompileConfig, Config, EmaConfig, MuonConfig
from fabric_trainer.duration import seconds
from fabric_trainer.errors import InputError
from fabric_trainer.every import Every
from fabric_trainer.order import check_accumulate

YEAR = 525_600  # minutes
FOLLOW_A_METRIC = ("adaptive", "advanced")  # strategies of freezing
LEASTS = {  # the smallest values in the sections of freeze
    "fixed": {"phase1_epochs": 1, "unfreeze": 1},
    "adaptive": {"patience": 1, "min_improvement": 0},
    "progressive": {"interval": 1, "limit": 1},
    "early_gradual": {"from_epoch": 0, "per_epoch": 1},
    "gradient_guided": {
        "threshold": 0,
        "sampling_epochs": 0,
        "patience": 0,
        "per_epoch": 1,
        "warmup_epochs": 1,
        "probes": 1,
    },
    "advanced": {
        "threshold": 0,
        "analysis_window": 0,
        "patience": 0,
        "per_epoch": 1,
        "warmup_epochs": 1,
        "probes": 2,  # a change of sign is between two
        "rollback_patience": 1,
        "rollback_threshold": 0,
        "emergency_epoch": 0,
        "emergency_patience": 1,
        "emergency_units": 1,
        "emergency_warmup": 1,
    },
}
WIDEST = 12**-0.5  # relative width of an average that weighs all updates alike


def check(config: Config) -> None:
    """Raise InputError for values that no run can have."""
    _batch(config.batch)
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
    _at_least("profiler.wait", config.profiler.wait, 0)
    _at_least("profiler.warmup", config.profiler.warmup, 0)
    _at_least("profiler.updates", config.profiler.updates, 1)
    _at_least("tune.updates", config.tune.updates, 20)
    _at_least("tune.max_batch_size", config.tune.max_batch_size, 1)
    for key, length in (
        ("run.max_epochs", config.run.max_epochs),
        ("run.max_steps", config.run.max_steps),
        ("run.overfit_batches", config.run.overfit_batches),
        ("early_stopping.patience", config.early_stopping.patience),
        ("batch.global_batch_size", config.batch.global_batch_size),
        ("evaluate.micro_batch_size", config.evaluate.micro_batch_size),
        ("fabric.tensor_parallel_size", config.fabric.tensor_parallel_size),
    ):
        if length is not None:
            _at_least(key, length, 1)
    clip = config.clip
    for key, limit in (("norm", clip.norm), ("value", clip.value), ("agc", clip.agc), ("p", clip.p)):
        if limit is not None and not limit > 0:
            raise InputError(f"clip.{key} must be above 0, not {limit}")
    tune = config.tune
    if not 0 < tune.min_lr < tune.max_lr < math.inf:
        raise InputError(f"tune.min_lr must be above 0 and below tune.max_lr, not {tune.min_lr} and {tune.max_lr}")
    if not 0 <= tune.smoothing < 1:
        raise InputError(f"tune.smoothing must be at least 0 and below 1, not {tune.smoothing}")
    limits = [key for key in ("norm", "value", "agc") if getattr(clip, key) is not None]
    if len(limits) > 1:
        raise InputError(f"{' and '.join(f'clip.{key}' for key in limits)} are both set: clip by one of them")
    if clip.agc_exempt and clip.agc is None:
        raise InputError(f"clip.agc_exempt is {clip.agc_exempt}, and clip.agc is not set")
    if not 0 < config.fabric.timeout <= YEAR:
        raise InputError(f"fabric.timeout must be above 0 minutes and at most {YEAR}, not {config.fabric.timeout}")
    blocks = config.fabric.fsdp.blocks
    if blocks == [] or (isinstance(blocks, int) and blocks < 1):
        raise InputError(f"fabric.fsdp.blocks must be class names, a number above 0 or null, not {blocks}")
    _check_compile(config.compile)
    for section, value in (("evaluate.every", config.evaluate.every), ("checkpoint.every", config.checkpoint.every)):
        _interval(section, value)
    for section, interval in (
        ("checkpoint.keep_every", config.checkpoint.keep_every),
        ("run.cleanup_every", config.run.cleanup_every),
    ):
        if interval is not None:
            _interval(section, interval)
    if taken := {"activities", "schedule", "on_trace_ready"} & config.profiler.args.keys():
        raise InputError(f"profiler.args: leave {min(taken)} out; profiler.wait, warmup and updates say what is traced")
    if config.run.max_epochs is None and config.run.max_steps is None:
        raise InputError("run.max_epochs or run.max_steps must say how long to train")
    if config.schedule.name == "plateau" and config.checkpoint.monitor is None:
        raise InputError("schedule.name: plateau follows checkpoint.monitor, which is not set")
    share = config.data.val_split
    if share is not None and not 0 < share < 1:
        raise InputError(f"data.val_split must be a share above 0 and below 1, or null, not {share}")
    _check_ema(config.ema)
    _check_control(config)
    if config.batch.global_batch_size is not None and config.batch.accumulate != 1:
        raise InputError("batch.accumulate and batch.global_batch_size are both set: one follows from the other")
    _check_freeze(config)
    _check_optim(config)
    _check_wandb(config)
    try:
        check_accumulate(config.batch.accumulate)
    except ValueError as error:
        raise InputError(str(error)) from None


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
    _at_least("faults.spike_warmup", config.faults.spike_warmup, 1)


def _check_freeze(config: Config) -> None:
    freeze = config.freeze
    for section, leasts in LEASTS.items():
        for key, least in leasts.items():
            value = getattr(getattr(freeze, section), key)
            if value is not None:
                _at_least(f"freeze.{section}.{key}", value, least)
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
    _at_least("ema.start", config.start, 0)
    if config.snapshots is not None:
        _interval("ema.snapshots", config.snapshots)
        if not config.power:
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


def _batch(batch: BatchConfig) -> None:
    if batch.micro_batch_size != "auto":
        _at_least("batch.micro_batch_size", batch.micro_batch_size, 1)
    elif batch.global_batch_size is None:
        raise InputError("batch.micro_batch_size: auto needs batch.global_batch_size, which says how much an update is")


def _at_least(key: str, value: float, least: int) -> None:
    if not value >= least:  # nor is a NaN
        raise InputError(f"{key} must be at least {least}, not {value}")


def _interval(key: str, value: str) -> None:
    try:
        Every.parse(value)
    except ValueError as error:
        raise InputError(f"{key} {error}") from None
