"""How a stage trains: what the original's keys of batches, devices, optimizers and schedules are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fabric_trainer.errors import InputError
from tools.translate_ups.rules import (
    DISTILL,
    EVALUATION,
    STAGES,
    Asked,
    Kind,
    Ours,
    Rule,
    Said,
    Say,
    number,
    several,
    text,
    to,
    training,
    whole,
)
from tools.translate_ups.rules import nothing as no

EVALUATED_AT_ONCE = 32  # samples, decoded at every point of their grids; however many, the figures are the same

# ---- batches and devices ------------------------------------------------------------------------------------------


def batch_size(value: int, asked: Asked) -> Said:
    if asked.stage == DISTILL:
        return f"stages.{DISTILL}.batch_size stands in its place"
    if asked.stage == EVALUATION:
        return {"evaluate.micro_batch_size": value}, "whole trajectories, as there"
    size, how = asked.samples.of(value)
    return {"batch.micro_batch_size": size, "evaluate.micro_batch_size": min(size, EVALUATED_AT_ONCE)}, how


def distill_batch_size(value: int, asked: Asked) -> Said:
    """An update is one batch, which goes through in pieces of distill_micro_batch samples."""
    size, how = asked.samples.of(value)
    beside = {"evaluate.micro_batch_size": min(size, EVALUATED_AT_ONCE)}
    piece = asked.get("training.distill_micro_batch")
    if piece is None:
        return {"batch.micro_batch_size": size} | beside, how
    return {"batch.accumulate": -(-size // piece)} | beside, f"{how}, in pieces of {piece}"


def accumulate(value: int, asked: Asked) -> Said:
    return {"batch.accumulate": value} if asked.stage != DISTILL else "a batch is an update in this stage"


def devices(value: int, asked: Asked) -> Said:
    return {"fabric.devices": value} if value == asked.devices else f"--devices {asked.devices} stands in its place"


def sharded(value: bool, asked: Asked) -> Said:
    if asked.devices == 1:
        return "one device has nothing to shard"
    return {"fabric.strategy": "fsdp" if value else "ddp"}


def amp(value: bool, asked: Asked) -> Said:
    return amp_dtype(asked.get("training.amp_dtype"), asked) if value else {"fabric.precision": "32-true"}


def amp_dtype(value: str, asked: Asked) -> Said:
    names = {"bfloat16": "bf16-mixed", "bf16": "bf16-mixed", "float16": "16-mixed", "fp16": "16-mixed"}
    if value not in names:
        raise InputError(f"training.amp_dtype: {value!r} is none of {', '.join(names)}")
    if names[value] == "16-mixed" and asked.sharded:
        return {"fabric.precision": "bf16-mixed"}, "fsdp has no loss scaler"
    return {"fabric.precision": names[value]}


def offload(value: bool, asked: Asked) -> Said:
    if not value:
        return "nothing is offloaded"
    if str(asked.optimizer("name")).lower() in MUON:
        return "the original turns it off beside Muon"
    return {"fabric.fsdp.cpu_offload": True} if asked.sharded else "only fsdp offloads, weights and state alike"


MODES = ("default", "reduce-overhead", "max-autotune")


def compiled(value: bool, asked: Asked) -> Said:
    return {"compile.scope": "blocks"} if value else "nothing is compiled"


def compile_mode(value: str, asked: Asked) -> Said:
    if value not in MODES:
        return f"{value} is none of {', '.join(MODES)}: the default, as in the original"
    mode = _mode(asked)
    if mode == "default" != value:
        return f"CUDA graphs {'go with one device' if asked.devices > 1 else 'are turned off'}: the default instead"
    return {"compile.mode": mode}


def no_graphs(value: bool, asked: Asked) -> Said:
    if not value or asked.devices > 1 or asked.get("training.compile_mode") not in MODES[1:]:
        return "there are no CUDA graphs to turn off"
    return {"compile.mode": _mode(asked)}


def _mode(asked: Asked) -> str:
    mode = str(asked.get("training.compile_mode"))
    if asked.devices == 1 and not asked.get("training.torch_inductor_disable_cudagraphs"):
        return mode if mode in MODES else "default"
    return {"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, "default")


# ---- the run ------------------------------------------------------------------------------------------------------


def ema_decay(value: float, asked: Asked) -> Said:
    return {"ema.decay": value, "ema.warmup": False} if value else NO_AVERAGE


def stops_after(value: int, asked: Asked) -> Said:
    return {"early_stopping.patience": max(1, value)}


NO_AVERAGE = "no average is kept"
CLIP = to("clip.norm", number)._replace(null="gradients are not clipped")
EMA = Rule(number, ema_decay, null=NO_AVERAGE)
PATIENCE = Rule(whole, stops_after, null="no run ends early")


def epochs(value: int, asked: Asked) -> Said:
    return {"run.max_epochs": value} if value else "the stage is left out"


def profiler(value: Any, asked: Asked) -> Said:
    name = {True: "simple", False: "none", "profiler": "simple"}.get(value, value)
    return {"profiler.name": name} if name != "none" else "nothing is profiled"


def wandb(value: bool, asked: Asked) -> Said:
    return {"loggers.wandb.mode": "online"} if value else "nothing goes to W&B"


def run_name(value: str, asked: Asked) -> Said:
    shown = asked.stage in STAGES and asked.get("logging.wandb.enabled")
    return {"name": value} | ({"loggers.wandb.name": value} if shown else {})


# ---- optimizers ---------------------------------------------------------------------------------------------------

MUON = ("muon_hybrid", "muon")
ADAMS = ("adam", "adamw", *MUON)
OPTIMIZERS = (*ADAMS, "sgd")


def optimizer_name(value: str, asked: Asked) -> Said:
    name = value.lower()
    if name not in OPTIMIZERS:
        raise InputError(f"{asked.own('optimizer.name')}: {value!r} is none of {', '.join(OPTIMIZERS)}")
    ours: Ours = {"optim.name": "muon_hybrid" if name in MUON else name, "optim.decay_everything": True}
    if name in MUON:
        ours |= {"optim.muon.matrices": "all", "optim.muon.adjust_lr_fn": "original"}
    return ours | ({"optim.args.momentum": asked.optimizer("momentum", 0.9)} if name == "sgd" else {})


def argument(name: str, of: tuple[str, ...]) -> Say:
    """An argument of some optimizers."""

    def say(value: Any, asked: Asked) -> Said:
        optimizer = str(asked.optimizer("name", "adam")).lower()
        return {name: value} if optimizer in of else f"{optimizer} has none"

    return say


OPTIMIZER = {
    "name": Rule(text, optimizer_name, "adam"),
    "lr": to("optim.lr", number, 1e-3),
    "weight_decay": to("optim.weight_decay", number, 0.0),
    "betas": Rule(several(number), argument("optim.args.betas", ADAMS)),
    "eps": Rule(number, argument("optim.args.eps", ADAMS)),
    "momentum": Rule(number, argument("optim.args.momentum", ("sgd",))),
    "muon_momentum": Rule(number, argument("optim.muon.args.momentum", MUON)),
    "muon_ns_steps": Rule(whole, argument("optim.muon.args.ns_steps", MUON)),
    "muon_backend": no("there is one Muon here, with torch's iteration"),
}


def shared(rule: Rule) -> Rule:
    """Of the optimizer of all stages, for those without one."""

    def say(value: Any, asked: Asked) -> Said:
        own = asked.own("optimizer")
        return f"{own} stands in its place" if asked.has(own) else rule.say(value, asked)

    return training(rule._replace(say=say))


def own(rule: Rule) -> Rule:
    """Of a stage's optimizer, whose defaults count where it has one."""

    def say(value: Any, asked: Asked) -> Said:
        return rule.say(value, asked) if asked.has(asked.own("optimizer")) else "optimizer stands in its place"

    return rule._replace(say=say)


# ---- schedules ----------------------------------------------------------------------------------------------------

SCHEDULES = {
    "cosineannealinglr": "cosine",
    "steplr": "step",
    "reducelronplateau": "plateau",
    "reducelr": "plateau",
    "plateau": "plateau",
}


def scheduler_name(value: str, asked: Asked) -> Said:
    if value.lower() not in SCHEDULES:
        raise InputError(f"{asked.own('scheduler.name')}: {value!r} is none of {', '.join(SCHEDULES)}")
    name = SCHEDULES[value.lower()]
    if name == "cosine":
        return {"schedule.name": name} | _cosine(asked), "at every update, there at every epoch"
    if name == "step":
        return _steps(asked)
    return {"schedule.name": name, "schedule.factor": asked.get(asked.own("scheduler.factor"), 0.5)}


def _cosine(asked: Asked) -> Ours:
    """What is left of the rate at the end of the run, of a curve that comes down in t_max epochs."""
    least = asked.get(asked.own("scheduler.eta_min"), 0.0) / asked.optimizer("lr", 1e-3)
    progress = min(1.0, asked.epochs / asked.get(asked.own("scheduler.t_max"), 10))
    return {"schedule.final": least + (1 - least) * (1 + math.cos(math.pi * progress)) / 2}


def t_max(value: int, asked: Asked) -> Said:
    if value < asked.epochs:
        return _cosine(asked), f"down over all {asked.epochs} epochs; there it rises again after {value}"
    if value > asked.epochs:
        return _cosine(asked), f"to the rate of epoch {asked.epochs}, by another curve"
    return _cosine(asked)


def _steps(asked: Asked) -> Said:
    """A drop every few epochs: as many updates, or where those aren't known the curve through the drops."""
    every, factor = (
        asked.get(asked.own(f"scheduler.{name}"), value) for name, value in (("step_size", 1), ("gamma", 0.5))
    )
    distill = asked.stage == DISTILL
    size = asked.get(f"stages.{DISTILL}.batch_size" if distill else "training.batch_size")
    updates = asked.samples.updates(size, 1 if distill else asked.get("training.accum_steps"), asked.devices)
    if updates is None:
        smooth: Ours = {"schedule.name": "exponential", "schedule.factor": factor ** (asked.epochs / every)}
        return smooth, "smoothly to the same rates: without the files the updates of an epoch aren't known"
    ours: Ours = {"schedule.name": "step", "schedule.every": every * updates, "schedule.factor": factor}
    return ours, f"an epoch has {updates} updates"


def _of(name: str, kind: Kind, say: Callable[[Any, Asked], Said]) -> Rule:
    """A key of one schedule."""

    def checked(value: Any, asked: Asked) -> Said:
        given = str(asked.get(asked.own("scheduler.name"))).lower()
        return say(value, asked) if SCHEDULES.get(given) == name else f"{given} has none"

    return Rule(kind, checked)


def _lowest(value: str, asked: Asked) -> Said:
    if value != "min":
        raise InputError(
            f"{asked.own('scheduler.mode')}: {value!r}: val/nrmse, the smaller the better, is followed: min"
        )
    return "val/nrmse is followed, the smaller the better"


SCHEDULER = {
    "name": Rule(text, scheduler_name),
    "t_max": _of("cosine", whole, t_max),
    "eta_min": _of("cosine", number, lambda value, asked: _cosine(asked)),
    "step_size": _of("step", whole, lambda value, asked: _steps(asked)),
    "gamma": _of("step", number, lambda value, asked: _steps(asked)),
    "mode": _of("plateau", text, _lowest),
    "factor": _of("plateau", number, lambda value, asked: {"schedule.factor": value}),
    "patience": _of("plateau", whole, lambda value, asked: {"schedule.patience": value}),
    "threshold": _of("plateau", number, lambda value, asked: {"schedule.threshold": value}),
    "min_lr": _of("plateau", number, lambda value, asked: {"schedule.final": value / asked.optimizer("lr", 1e-3)}),
    "cooldown": _of("plateau", whole, lambda value, asked: "an evaluation right after a drop counts as any other"),
    "eps": _of("plateau", number, lambda value, asked: "a drop is made however small it is"),
}
