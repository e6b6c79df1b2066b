"""From the ``fabric`` section, and what a launcher set, to a Fabric object."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from lightning.fabric import Fabric

from fabric_trainer.config import FabricConfig
from fabric_trainer.errors import InputError

STRATEGIES = ("auto", "single", "ddp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = {"auto": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
PRECISIONS |= {full: full for full in ("16-mixed", "bf16-mixed", "bf16-true", "32-true", "64-true")}


def make_fabric(config: FabricConfig, callbacks: list[Any] | None = None) -> Fabric:
    """A Fabric, not yet launched. Raises InputError for what can't be, naming the key and what could.

    ``fabric run`` leaves its flags in LT_* variables: the launcher's number of processes is the world; its other
    flags must equal the configuration's, or meet ``auto`` there.
    """
    aliases = {name: full for name, full in PRECISIONS.items() if name != "auto"}
    accelerator = _agreed("accelerator", config.accelerator, "LT_ACCELERATOR", {"gpu": "cuda"})
    strategy = _agreed("strategy", config.strategy, "LT_STRATEGY")
    precision = _agreed("precision", config.precision, "LT_PRECISION", aliases)
    _one_of("accelerator", accelerator, ACCELERATORS)
    _one_of("strategy", strategy, STRATEGIES)
    _one_of("precision", precision, tuple(PRECISIONS))
    devices, num_nodes = _world(config)
    if lacking := device_problems(accelerator, devices, PRECISIONS[precision]):
        raise InputError(lacking[0])
    count = (devices if isinstance(devices, int) else len(devices)) * num_nodes
    if strategy == "single" and count > 1:
        raise InputError(f"fabric.strategy: single is for one device, not {count}")
    for name in ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION", "LT_DEVICES", "LT_NUM_NODES", "LT_CLI_USED"):
        os.environ.pop(name, None)  # resolved here: Fabric would compare them with its own names
    return Fabric(
        accelerator=accelerator,
        strategy="ddp" if count > 1 else "auto",
        devices=devices,
        num_nodes=num_nodes,
        precision=PRECISIONS[precision],  # type: ignore[arg-type]
        callbacks=callbacks or [],
    )


def problems(config: FabricConfig) -> list[str]:
    """What this machine lacks for the configuration, a line each; raises InputError where no machine would do."""
    _one_of("accelerator", config.accelerator, ACCELERATORS)
    _one_of("strategy", config.strategy, STRATEGIES)
    _one_of("precision", config.precision, tuple(PRECISIONS))
    return device_problems(config.accelerator, _devices(config.devices), PRECISIONS[config.precision])


def count_devices(config: FabricConfig) -> int:
    """Processes that the configuration asks for, over all nodes."""
    devices = _devices(config.devices)
    return (devices if isinstance(devices, int) else len(devices)) * config.num_nodes


def device_problems(accelerator: str, devices: int | list[int], precision: str) -> list[str]:
    """What this machine lacks, a line each: missing devices, precisions that it can't compute in."""
    cuda, problems = torch.cuda.is_available(), []
    on_gpu = accelerator in ("cuda", "gpu") or (accelerator == "auto" and cuda)
    if accelerator in ("cuda", "gpu") and not cuda and not torch.backends.mps.is_available():
        problems.append(f"fabric.accelerator: {accelerator} asked for, this machine has none; auto or cpu would do")
    elif on_gpu and cuda:
        wanted = devices if isinstance(devices, int) else max(devices, default=0) + 1
        if wanted > torch.cuda.device_count():
            problems.append(f"fabric.devices: {devices} asked for, this machine has {torch.cuda.device_count()}")
    if precision == "16-mixed" and not on_gpu:
        problems.append("fabric.precision: 16-mixed needs a GPU; bf16-mixed or 32-true run on a CPU")
    return problems


def _agreed(key: str, configured: str, variable: str, same: dict[str, str] = {}) -> str:  # noqa: B006  (read only)
    """The configured value, or the launcher's flag where the configuration leaves it open; ``same`` has aliases."""
    launched = os.environ.get(variable)
    if launched in (None, "auto") or same.get(launched, launched) == same.get(configured, configured):
        return configured
    if configured == "auto":
        return str(launched)
    raise InputError(
        f"fabric.{key} is {configured}, the launcher's --{key} is {launched}: give one, or make them equal"
    )


def _world(config: FabricConfig) -> tuple[int | list[int], int]:
    """Devices of this node and number of nodes."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LT_DEVICES")
    if launched is None:
        return _devices(config.devices), config.num_nodes
    here = int(launched) if launched.isdigit() else 1
    if config.devices not in ("auto", here, str(here)):
        raise InputError(
            f"fabric.devices is {config.devices} and the launcher started {here} process{'es' * (here > 1)}: "
            "leave it at auto, or make them equal"
        )
    nodes = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("LT_NUM_NODES") or 1)
    if config.num_nodes not in (1, nodes):
        raise InputError(f"fabric.num_nodes is {config.num_nodes} and the launcher started {nodes}")
    return here, nodes


def _devices(devices: int | str | list[int]) -> int | list[int]:
    if devices == "auto":
        return 1
    if isinstance(devices, str):
        if not re.fullmatch(r"-?[0-9]+", devices):
            raise InputError(f"fabric.devices must be auto, -1, a number or a list, not {devices!r}")
        devices = int(devices)
    if devices == -1:
        return max(1, torch.cuda.device_count())
    if devices == [] or (isinstance(devices, int) and devices < 1):
        raise InputError(f"fabric.devices must name at least one device (-1: all), not {devices}")
    return devices


def _one_of(key: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise InputError(f"fabric.{key} must be one of {', '.join(accepted)}, not {value}")
