"""DeepSpeed on CPU processes, for tests alone: Fabric's strategy asks for CUDA devices."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from typing import Any

from lightning.fabric.strategies import DDPStrategy

from fabric_trainer import strategies


def allow() -> None:
    """From now on ``fabric.strategy: deepspeed`` runs on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from fabric_trainer import zero

    if zero.ZeroStrategy.__name__ == "OnCpu":  # a rank forked from one that allows it
        return

    class OnCpu(zero.ZeroStrategy):
        def __init__(self, **keys: Any) -> None:
            super().__init__(**keys, logging_level=logging.ERROR)

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def _setup_distributed(self) -> None:
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()
            self._config_initialized = True

        def _initialize_engine(self, model: Any, optimizer: Any = None, scheduler: Any = None) -> tuple[Any, Any, Any]:
            engine, wrapped, _, scheduler = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank),
                config=self.config,
                model=model,
                model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
                optimizer=optimizer,
                dist_init_required=False,
            )
            return engine, wrapped, scheduler

    zero.ZeroStrategy = OnCpu
    strategies.TABLE["deepspeed"] = replace(strategies.TABLE["deepspeed"], cpu=True)
