"""What will run: the ``fabric`` section of the configuration against what a launcher set.

Imports torch only where devices are counted, so that ``--strategies`` comes at once.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric_trainer.config import FabricConfig
from fabric_trainer.errors import InputError

STRATEGIES = ("auto", "single", "ddp", "ddp_spawn", "ddp_notebook", "fsdp", "fsdp1", "tensor_parallel", "deepspeed")
# what `fabric run --strategy` calls by names of its own; its fsdp is ours, FSDP2
UNUSED, STAGE = "ddp_find_unused_parameters_true", "deepspeed_stage_"
ALIASES = {UNUSED: "ddp"} | {f"{STAGE}{stage}": "deepspeed" for stage in (1, 2, 3)}
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = {"auto": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
PRECISIONS |= {
    full: full for full in ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "transformer-engine")
}
VARIABLES = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES", "LT_CLI_USED")


@dataclass(frozen=True)
class Resolved:
    """What will run, with nothing left at ``auto``.

    accelerator: cpu, cuda or mps. devices: of this node, how many or which. world_size: processes over all nodes,
    of which tensor_parallel_size share each layer. stage: ZeRO's. notes: what the user should be told.
    """

    strategy: str
    accelerator: str
    devices: int | list[int]
    num_nodes: int
    precision: str
    world_size: int
    tensor_parallel_size: int = 1
    stage: int = 2
    find_unused_parameters: bool = False
    notes: tuple[str, ...] = ()

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data."""
        return self.world_size // self.tensor_parallel_size


def resolve(config: FabricConfig) -> Resolved:
    """The configuration, completed by the launcher. Raises InputError where the two disagree, naming both.

    ``fabric run`` leaves its flags in LT_* variables: each must equal the configuration's, or meet ``auto`` there.
    The number of processes that a launcher started (``fabric run``, torchrun, srun) is the world.
    """
    name, stage, find_unused = _strategy(config)
    kinds = {kind: _accelerator(kind) for kind in ACCELERATORS}
    _one_of("fabric.accelerator", config.accelerator, ACCELERATORS)
    accelerator = _agreed("accelerator", config.accelerator, "LT_ACCELERATOR", kinds)
    _one_of("fabric.precision", config.precision, tuple(PRECISIONS))
    precision = _agreed("precision", config.precision, "LT_PRECISION", PRECISIONS)
    devices, num_nodes = _world(config, name, accelerator)
    world_size = _count(devices) * num_nodes
    notes: tuple[str, ...] = ()
    if config.requeue and "SLURM_JOB_ID" not in os.environ:
        notes = ("fabric.requeue: this is no SLURM job, nothing will be requeued",)
    if name == "auto":
        name = "ddp" if world_size > 1 else "single"
    elif name == "fsdp" and config.fsdp.sharding == "NO_SHARD":
        name, notes = "ddp", (*notes, "fabric.fsdp.sharding: NO_SHARD leaves every rank whole: the strategy is ddp")
    if name == "deepspeed":
        stage, precision = _json_says(config, stage, precision)
    size = config.tensor_parallel_size or (world_size if name == "tensor_parallel" else 1)
    return Resolved(name, accelerator, devices, num_nodes, precision, world_size, size, stage, find_unused, notes)


def meet_again() -> None:
    """After a restart by torchrun: have the processes meet at a new store. Raises InputError where that can't be.

    torchrun keeps one store through all restarts, and in it the addresses of processes that are dead
    (https://github.com/pytorch/pytorch/issues/135712). Its agents on several machines count restarts differently.
    """
    value = os.environ.get
    attempt, several = value("TORCHELASTIC_RESTART_COUNT") or "0", int(value("GROUP_WORLD_SIZE") or 1) > 1
    if int(value("TORCHELASTIC_MAX_RESTARTS") or 0) == 0 or value("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if several:
        raise InputError(
            "--max-restarts on several nodes needs --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "torchrun's environment: processes that torchrun restarts would look for those before them"
        )
    if attempt == "0":
        return
    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from torch.distributed import TCPStore

    store, key = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), f"port of attempt {attempt}"
    if os.environ["RANK"] == "0":
        store.set(key, str(find_free_network_port()))
    os.environ |= {"MASTER_PORT": store.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def read_deepspeed(config: FabricConfig) -> dict[str, Any]:
    """A copy of the user's own DeepSpeed configuration; empty where there is none. Raises InputError."""
    given = config.deepspeed.config
    if given is None or isinstance(given, dict):
        return copy.deepcopy(given or {})
    try:
        return dict(json.loads(Path(given).read_text()))
    except FileNotFoundError:
        raise InputError(f"fabric.deepspeed.config: there is no file {given}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"fabric.deepspeed.config: {given} is no JSON object: {error}") from None


def device_problems(resolved: Resolved) -> list[str]:
    """What this machine lacks, a line each: missing devices, precisions that it can't compute in."""
    import torch

    found, devices, precision = [], resolved.devices, resolved.precision
    on_cuda, cuda = resolved.accelerator == "cuda", torch.cuda.device_count()
    if on_cuda and not torch.cuda.is_available():
        found.append("fabric.accelerator: cuda (or gpu) asked for, this machine has none; auto or cpu would do")
    elif on_cuda and (devices if isinstance(devices, int) else max(devices) + 1) > cuda:
        found.append(f"fabric.devices: {devices} asked for, this machine has {cuda}")
    if resolved.accelerator == "mps" and not torch.backends.mps.is_available():
        found.append("fabric.accelerator: mps asked for, this machine has none; auto or cpu would do")
    if resolved.accelerator == "cpu" and not isinstance(devices, int):
        found.append(f"fabric.devices: {devices} names GPUs; on a CPU it is the number of processes: {len(devices)}")
    if precision == "16-mixed" and resolved.accelerator == "cpu":
        found.append("fabric.precision: 16-mixed needs a GPU; bf16-mixed or 32-true run on a CPU")
    if precision == "64-true" and resolved.accelerator == "mps":
        found.append("fabric.precision: 64-true needs a CPU or a CUDA device; 32-true runs on mps")
    if precision == "transformer-engine" and not (on_cuda and importlib.util.find_spec("transformer_engine")):
        found.append(
            "fabric.precision: transformer-engine needs a CUDA device and the package transformer_engine; "
            "bf16-mixed runs without"
        )
    return found


def _strategy(config: FabricConfig) -> tuple[str, int, bool]:
    """(name, ZeRO stage, find_unused_parameters): the launcher's names carry options."""
    _one_of("fabric.strategy", config.strategy, STRATEGIES)
    name = _agreed("strategy", config.strategy, "LT_STRATEGY", {name: name for name in STRATEGIES} | ALIASES)
    launched = os.environ.get("LT_STRATEGY", "")
    stage = int(launched.removeprefix(STAGE)) if launched.startswith(STAGE) else config.stage
    if config.strategy == "deepspeed" and config.stage != stage:
        raise InputError(
            f"fabric.stage is {config.stage}, the launcher's --strategy is {launched}: give one, or make them equal"
        )
    return name, stage, launched == UNUSED or config.ddp.find_unused_parameters


def _json_says(config: FabricConfig, stage: int, precision: str) -> tuple[int, str]:
    """ZeRO's stage and the precision, where the user's DeepSpeed configuration names them."""
    given = read_deepspeed(config)
    wanted = given.get("zero_optimization", {}).get("stage", stage)
    if wanted != stage and stage != FabricConfig().stage:
        raise InputError(f"fabric.stage is {stage}, the stage in fabric.deepspeed.config is {wanted}: make them equal")
    for section, named in (("bf16", "bf16-mixed"), ("fp16", "16-mixed")):
        if given.get(section, {}).get("enabled") is True:
            if config.precision != "auto" and not precision.startswith(named.partition("-")[0]):
                raise InputError(f"fabric.precision is {precision}, fabric.deepspeed.config enables {section}")
            precision = named if config.precision == "auto" else precision
    return wanted, precision


def _agreed(key: str, configured: str, variable: str, meanings: Mapping[str, str]) -> str:
    """What the configured value means, or the launcher's flag where the configuration leaves it open."""
    launched = os.environ.get(variable) or "auto"
    _one_of(f"the launcher's --{key}", launched, tuple(meanings))
    if launched == "auto" or meanings[launched] == meanings[configured]:
        return meanings[configured]
    if configured == "auto":
        return meanings[launched]
    raise InputError(
        f"fabric.{key} is {configured}, the launcher's --{key} is {launched}: give one, or make them equal"
    )


def _world(config: FabricConfig, strategy: str, accelerator: str) -> tuple[int | list[int], int]:
    """Devices of this node and number of nodes: the launcher's, where there is one."""
    configured = _devices(config.devices, accelerator)
    launched = _launched()
    if launched is None:
        return configured, config.num_nodes
    started, nodes = launched
    if strategy in ("ddp_spawn", "ddp_notebook"):
        raise InputError(f"fabric.strategy: {strategy} starts its processes itself; under a launcher it is ddp")
    if config.num_nodes not in (1, nodes):
        raise InputError(f"fabric.num_nodes is {config.num_nodes} and the launcher started {nodes}")
    if config.devices == "auto":
        return started, nodes
    here = _count(started)
    both_named = isinstance(configured, list) and isinstance(started, list)
    if _count(configured) != here or (both_named and configured != started):
        which = f", on {started}" if isinstance(started, list) else ""
        raise InputError(
            f"fabric.devices is {config.devices} and the launcher started {here} process{'es' * (here > 1)}{which}: "
            "leave it at auto, or make them equal"
        )
    return (configured if isinstance(configured, list) else started), nodes


def one_process_per_machine() -> bool:
    """Whether RANK and WORLD_SIZE count machines, as Kubeflow's PyTorchJob sets them in its pods: no launcher runs on
    each that would count processes."""
    names, several = os.environ.keys(), os.environ.get("WORLD_SIZE") != "1"
    launched = names & {"LOCAL_WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"} or _under_srun()
    return several and names >= {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} and not launched


def _under_srun() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _launched() -> tuple[int | list[int], int] | None:
    """Devices of this node and number of nodes, as a launcher set them; None where none did."""
    value = os.environ.get
    here = value("LOCAL_WORLD_SIZE")  # fabric run and torchrun, which may run inside SLURM
    if one_process_per_machine():
        return 1, int(os.environ["WORLD_SIZE"])
    if here is None and _under_srun():
        tasks = value("SLURM_NTASKS_PER_NODE") or ("1" if value("SLURM_NTASKS") == "1" else None)
        if tasks is None:
            raise InputError(f"srun started {value('SLURM_NTASKS')} tasks: say how many a node has, --ntasks-per-node")
        return int(tasks), int(value("SLURM_NNODES") or 1)
    named = value("LT_DEVICES")
    if here is None and named is None:
        return None
    nodes = int(value("GROUP_WORLD_SIZE") or value("LT_NUM_NODES") or 1)
    if named and "," in named:
        return [int(index) for index in re.findall("[0-9]+", named)], nodes
    return int(here or (named if named and named.isdigit() else 1)), nodes


def _devices(devices: int | str | list[int], accelerator: str) -> int | list[int]:
    if devices == "auto":
        return 1
    if isinstance(devices, str):
        if not re.fullmatch(r"-?[0-9]+", devices):
            raise InputError(f"fabric.devices must be auto, -1, a number or a list, not {devices!r}")
        devices = int(devices)
    if devices == -1:
        return _count_gpus() if accelerator == "cuda" else 1
    if devices == [] or (isinstance(devices, int) and devices < 1):
        raise InputError(f"fabric.devices must name at least one device (-1: all), not {devices}")
    if isinstance(devices, list) and (min(devices) < 0 or len(set(devices)) < len(devices)):
        raise InputError(f"fabric.devices must name each device once, from 0, not {devices}")
    return devices


def _accelerator(name: str) -> str:
    """auto and gpu by what there is, as Fabric chooses."""
    if name not in ("auto", "gpu"):
        return name
    import torch

    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if name == "gpu" or torch.cuda.is_available() else "cpu"


def _count_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _count(devices: int | list[int]) -> int:
    return devices if isinstance(devices, int) else len(devices)


def _one_of(what: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise InputError(f"{what} must be one of {', '.join(accepted)}, not {value}")
