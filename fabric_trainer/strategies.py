"""What each strategy can do, and from a resolved configuration to a Fabric object.

Imports torch and lightning only to make that object, so that ``--strategies`` comes at once.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fabric_trainer.config import Config, FabricConfig
from fabric_trainer.errors import InputError
from fabric_trainer.launch import VARIABLES, Resolved, device_problems, one_process_per_machine, resolve

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import Strategy
    from rich.table import Table

WIDTH = 120  # of the printed table; a terminal that has fewer columns gets fewer
START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_notebook": "fork"}


@dataclass(frozen=True)
class Row:
    """What a strategy can do. oom: its answers to an out-of-memory error, the first of which ``auto`` means."""

    sync: str
    oom: tuple[str, ...]
    precisions: tuple[str, ...] = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "transformer-engine")
    clip_norm: bool = True
    clip_value: bool = True
    clip_p: bool = True
    agc: bool = True
    spike: bool = True
    optimizers: str = "all, several"
    lookahead: bool = True
    sam: bool = False
    ema: bool = True
    freezing: str = "at any time"
    compile: str = "whole, blocks"
    full_save: bool = True
    sharded_save: bool = False
    cpu: bool = True


HEADINGS = {
    "sync": "gradients synced",
    "clip_norm": "clip by norm",
    "clip_value": "clip by value",
    "clip_p": "clip by p-norm",
    "agc": "clip adaptively",
    "spike": "skip spikes",
    "optimizers": "optimizers",
    "lookahead": "Lookahead",
    "sam": "SAM",
    "ema": "EMA",
    "freezing": "freezing",
    "compile": "compile",
    "full_save": "full save",
    "sharded_save": "sharded save",
    "oom": "out of memory",
    "cpu": "CPU",
    "precisions": "precision",
}
# flat pieces of the weights have no rows: only optimizers that treat every element alike step them rightly
ELEMENTWISE = ("adam", "adamw", "adamax", "nadam", "radam", "sgd", "adadelta", "rmsprop", "asgd", "rprop")
_DDP = Row("last micro-batch", ("restart", "split"), sam=True)
_SHARDED = Row(
    "last micro-batch",
    ("restart",),
    ("32-true", "bf16-mixed", "bf16-true", "64-true"),
    sharded_save=True,
)
SHARDED = ("fsdp", "fsdp1", "tensor_parallel", "deepspeed")
_OF_FABRIC = ("32-true", "16-mixed", "bf16-mixed", "bf16-true")
TABLE = {
    "single": Row("none", ("split", "restart"), sam=True),
    "ddp": _DDP,
    "ddp_spawn": _DDP,
    "ddp_notebook": _DDP,
    "fsdp": _SHARDED,
    "tensor_parallel": _SHARDED,
    "fsdp1": Row(
        "last micro-batch",
        ("restart",),
        _OF_FABRIC,
        agc=False,
        optimizers="elementwise, several",
        lookahead=False,
        freezing="fixed before training",
        cpu=False,
    ),
    "deepspeed": Row(
        "ZeRO-1: last micro-batch\nZeRO-2, 3: every backward",
        ("restart",),
        _OF_FABRIC,
        clip_value=False,
        clip_p=False,
        freezing="at any time: the engine is made anew",
        compile="ZeRO-1: whole, blocks",
        agc=False,
        spike=False,
        optimizers="elementwise, one",
        lookahead=False,
        cpu=False,
    ),
}


def make_fabric(config: Config, callbacks: list[Any] | None = None, resolved: Resolved | None = None) -> Fabric:
    """A Fabric, not yet launched. Raises InputError for what can't be, naming the key and what could.

    resolved: what ``launch.resolve`` made of the configuration, where the caller has it already. The launcher's LT_*
    variables are used up here: Fabric would compare them with its own names.
    """
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import KubeflowEnvironment

    from fabric_trainer.precision import Double

    resolved = resolved or resolve(config.fabric)
    if lacking := problems(config, resolved):
        raise InputError(lacking[0])
    torch.set_float32_matmul_precision(config.fabric.matmul_precision)
    torch.backends.cudnn.allow_tf32 = config.fabric.cudnn_tf32
    strategy = _make_strategy(config, resolved)
    for name in VARIABLES:
        os.environ.pop(name, None)
    double = resolved.precision == "64-true"  # as an object: by its name Fabric refuses it for FSDP2
    plugins: list[Any] = [Double()] if double else []
    if one_process_per_machine():  # which Fabric does not find by itself
        plugins.append(KubeflowEnvironment())
    return Fabric(
        accelerator=resolved.accelerator,
        strategy=strategy,
        devices=resolved.devices,
        num_nodes=resolved.num_nodes,
        precision=None if double else resolved.precision,  # type: ignore[arg-type]
        plugins=plugins,
        callbacks=callbacks or [],
    )


def problems(config: Config, resolved: Resolved | None = None) -> list[str]:
    """What this machine lacks for the configuration, a line each; raises InputError where no machine would do."""
    resolved = resolved or resolve(config.fabric)
    check_strategy(config, resolved)
    found = device_problems(resolved)
    if resolved.strategy == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        found.append(
            "fabric.strategy: deepspeed needs the package deepspeed: make install-deepspeed, "
            "or pip install --no-build-isolation deepspeed"
        )
    return found


def count_devices(config: FabricConfig) -> int:
    """Processes that the configuration asks for which see different data, over all nodes."""
    return resolve(config).data_parallel_size


def check_strategy(config: Config, resolved: Resolved) -> None:
    """Raise InputError, in one line, for what the strategy can't do; cheap, and before any data is read."""
    kinds = (_of_devices, _of_updates, _of_state, _of_network)
    for refused, line in (pair for kind in kinds for pair in kind(config, resolved)):
        if refused:
            raise InputError(line)


Refusals = list[tuple[bool, str]]  # (whether it is refused, the line that says so)


def _of_devices(config: Config, resolved: Resolved) -> Refusals:
    """Where it runs, and in which precision."""
    name, row, fabric = resolved.strategy, TABLE[resolved.strategy], config.fabric
    world, size, precision = resolved.world_size, resolved.tensor_parallel_size, resolved.precision
    return [
        (name == "single" and world > 1, f"fabric.strategy: single is for one device, not {world}"),
        (
            resolved.accelerator == "mps" and name != "single",
            f"fabric.accelerator: mps is one device, for fabric.strategy single; {name} runs on cpu or cuda",
        ),
        (
            resolved.accelerator == "cpu" and not row.cpu,
            f"fabric.strategy: {name} needs a GPU; {_able('cpu')} run on a CPU",
        ),
        (
            precision not in row.precisions,
            f"fabric.precision: {name} does not take {precision}; it takes {', '.join(row.precisions)}"
            + " (bf16-mixed needs no scaler)" * (precision == "16-mixed"),
        ),
        (
            (fabric.tensor_parallel_size or 1) > 1 and name not in ("tensor_parallel", "fsdp"),
            f"fabric.tensor_parallel_size of {size} is for tensor_parallel and fsdp, not for {name}",
        ),
        (world % size > 0, f"fabric.tensor_parallel_size of {size} does not divide the {world} processes"),
    ]


def _of_updates(config: Config, resolved: Resolved) -> Refusals:
    """Clipping, skipping and stepping."""
    name, row, optim = resolved.strategy, TABLE[resolved.strategy], config.optim
    flat = [other for other in (optim.name, *(o.name for o in optim.others)) if other.lower() not in ELEMENTWISE]
    return [
        (
            config.clip.value is not None and not row.clip_value,
            f"clip.value: {name} clips by the norm alone; set clip.norm",
        ),
        (
            config.run.log_gradient_norms != "none" and name == "deepspeed",
            "run.log_gradient_norms: deepspeed keeps gradients in buffers of its own; leave it none",
        ),
        (
            config.loggers.wandb is not None and config.loggers.wandb.watch != "none" and name in SHARDED,
            f"loggers.wandb.watch: {name} has gradients and weights in pieces; leave it none, or take single or ddp",
        ),
        (config.clip.p != 2 and not row.clip_p, f"clip.p: {name} measures the 2-norm alone, not {config.clip.p}"),
        (
            config.clip.agc is not None and not row.agc,
            f"clip.agc: {name} has flat pieces of the gradients, without rows; set clip.norm",
        ),
        (
            config.faults.spike is not None and not row.spike,
            f"faults.spike: {name} decides by itself what it leaves out; {_able('spike')} can",
        ),
        (
            row.optimizers.startswith("elementwise") and bool(flat),
            f"optim.name: {name} steps flat pieces of the weights, which {flat[0] if flat else ''} can't; "
            f"it may be {', '.join(ELEMENTWISE)}",
        ),
        (bool(optim.others) and row.optimizers.endswith("one"), f"optim.others: {name} takes one optimizer alone"),
        (
            optim.lookahead is not None and not row.lookahead,
            f"optim.lookahead: not under {name}; {_able('lookahead')} can",
        ),
        (optim.sam is not None and not row.sam, f"optim.sam: not under {name}; {_able('sam')} can"),
    ]


def _of_state(config: Config, resolved: Resolved) -> Refusals:
    """Where weights and activations are kept, and how they are saved."""
    name, row, fabric = resolved.strategy, TABLE[resolved.strategy], config.fabric
    size = resolved.tensor_parallel_size
    return [
        (
            config.checkpoint.sharded and not row.sharded_save,
            f"checkpoint.sharded: {name} saves the one plain file; {_able('sharded_save')} can save shards",
        ),
        (
            config.faults.oom not in ("auto", *row.oom),
            f"faults.oom: {name} can't {config.faults.oom}, its weights are in shards: auto or {row.oom[0]}",
        ),
        (
            resolved.accelerator == "cpu" and fabric.ddp.sync_batchnorm,
            "fabric.ddp.sync_batchnorm needs GPUs: torch has it for no other device",
        ),
        (
            fabric.fsdp.meta_init and (name not in ("fsdp", "fsdp1") or size > 1),
            f"fabric.fsdp.meta_init is for fsdp and fsdp1 without tensor parallelism, not for {name}",
        ),
        (
            resolved.accelerator == "cpu" and name in ("fsdp", "fsdp1") and fabric.fsdp.cpu_offload,
            "fabric.fsdp.cpu_offload: the weights are in host memory already; it is for GPUs",
        ),
    ]


def _of_network(config: Config, resolved: Resolved) -> Refusals:
    """Freezing, compiling and offloading."""
    name, fabric, size = resolved.strategy, config.fabric, resolved.tensor_parallel_size
    return [
        (
            name == "fsdp1" and config.freeze.strategy not in ("none", "fixed"),
            f"freeze.strategy: under fsdp1 what is frozen is fixed before training; {config.freeze.strategy} runs "
            "under fsdp and all others",
        ),
        (
            name == "fsdp1" and config.freeze.strategy == "fixed" and config.freeze.fixed.phase1_epochs is not None,
            "freeze.fixed.phase1_epochs: under fsdp1 what is frozen is fixed before training; a second phase runs "
            "under fsdp and all others",
        ),
        (
            name == "deepspeed" and resolved.stage == 3 and config.freeze.strategy in ("gradient_guided", "advanced"),
            f"freeze.strategy: {config.freeze.strategy} measures gradients of frozen weights, which ZeRO-3 keeps in "
            "pieces; fabric.stage may be 1 or 2",
        ),
        (
            size > 1 and config.compile.scope != "none" and bool(fabric.activation_checkpointing),
            "fabric.activation_checkpointing: torch compiles no block that is both recomputed and split over ranks; "
            "leave it out, or compile.scope none",
        ),
        (
            name == "deepspeed" and config.compile.scope != "none" and resolved.stage != 1,
            f"compile.scope: deepspeed compiles under fabric.stage 1, not {resolved.stage}, which reduces gradients in "
            "the order in which they come; or fabric.strategy fsdp",
        ),
        (
            name == "deepspeed" and fabric.deepspeed.offload_parameters and resolved.stage != 3,
            f"fabric.deepspeed.offload_parameters needs fabric.stage 3, not {resolved.stage}",
        ),
    ]


def strategy_table() -> Table:
    """TABLE to print: a column for the strategies that can do the same, a row for each thing to be done."""
    from rich.table import Table

    alike = [("\n".join(name for name, _ in items), row) for row, items in groupby(TABLE.items(), lambda item: item[1])]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", *(names for names, _ in alike)):
        table.add_column(title, vertical="top")
    for key, heading in HEADINGS.items():
        table.add_row(heading, *(_cell(getattr(row, key)) for _, row in alike))
    return table


def _make_strategy(config: Config, resolved: Resolved) -> Strategy | str:
    name = resolved.strategy
    if name == "single":
        return "auto"
    if name in START_METHODS:
        return _make_ddp(config, resolved)
    if name == "deepspeed":
        from fabric_trainer import zero

        return zero.make_strategy(config, resolved)
    from fabric_trainer import fsdp, fsdp1

    return fsdp1.make_strategy(config, resolved) if name == "fsdp1" else fsdp.make_strategy(config, resolved)


def _make_ddp(config: Config, resolved: Resolved) -> Strategy:
    from datetime import timedelta

    from lightning.fabric.strategies import DDPStrategy

    from fabric_trainer.ddp import UnsyncedDDP

    timeout, start_method = timedelta(minutes=config.fabric.timeout), START_METHODS[resolved.strategy]
    if config.faults.oom == "split":
        return UnsyncedDDP(start_method=start_method, timeout=timeout)
    return DDPStrategy(
        start_method=start_method,  # type: ignore[arg-type]
        timeout=timeout,
        find_unused_parameters=resolved.find_unused_parameters,
        static_graph=config.fabric.ddp.static_graph,
        gradient_as_bucket_view=config.fabric.ddp.gradient_as_bucket_view,
    )


def _able(ability: str) -> str:
    """The strategies that have it: "fsdp and tensor_parallel"."""
    *names, last = [name for name, row in TABLE.items() if getattr(row, ability)]
    return f"{', '.join(names)} and {last}"


def _cell(value: bool | str | tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else "\n".join(value)
