"""A network and its optimizer as the strategy runs them, and where it keeps each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from fabric_trainer import portable
from fabric_trainer.blocks import find_blocks, recompute_blocks
from fabric_trainer.clip import clip_gradients, clip_units, part_norms
from fabric_trainer.compile import Compilation
from fabric_trainer.config import Config
from fabric_trainer.ddp import UnsyncedDDP
from fabric_trainer.faults import Guard
from fabric_trainer.freeze import Freezer
from fabric_trainer.match import matching
from fabric_trainer.optim import build_optimizer
from fabric_trainer.order import Accumulate
from fabric_trainer.portable import Leaf
from fabric_trainer.task import Task


class Engine:
    """single, ddp, fsdp and tensor_parallel: the optimizer steps the network's own parameters.

    module: the bare network. network: what Fabric made of it. leaves: parameter name -> where its value is kept.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        module: nn.Module,
        config: Config,
        freezer: Freezer,
        compilation: Compilation,
        accumulate: Accumulate = 1,
    ) -> None:
        self.fabric, self.module, self.config = fabric, module, config
        self.freezer, self.compilation, self.accumulate = freezer, compilation, accumulate
        self.task = task
        freezer.apply(module)
        self.prepare(task)
        self.set_up()
        self.trainable = [parameter for group in self.groups for parameter in group]
        self.leaves = self.find_leaves()
        self.parts = self.find_parts(config.run.log_gradient_norms)
        self.part_norms: dict[str, Tensor] = {}  # of the last gradient before it was clipped, 0-d
        names = [name for group in self.names for name in group]
        exempt = matching(config.clip.agc_exempt, names, "clip.agc_exempt")
        self.adaptive = [p for name, p in zip(names, self.trainable, strict=True) if name not in exempt]

    def prepare(self, task: Task) -> None:
        """What has to happen to the network before a strategy wraps it."""
        fabric, options = self.fabric, self.config.fabric
        if options.ddp.sync_batchnorm and isinstance(fabric.strategy, DDPStrategy):
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        # from the inside out: checkpointing, compiled with the forward it recomputes, and around both the strategy
        recompute_blocks(self.module, options.activation_checkpointing)
        self.compilation.compile(task, self.module)
        if isinstance(fabric.strategy, (ModelParallelStrategy, FSDPStrategy)):
            wanted, key = options.fsdp.blocks, "fabric.fsdp.blocks"
            blocks = task.blocks(self.module) if wanted is None else find_blocks(self.module, wanted, key)
            fabric.strategy.blocks = list(blocks)  # type: ignore[union-attr]

    def set_up(self) -> None:
        """The network first: strategies move, convert and shard what the optimizer then steps."""
        self.network = self.fabric.setup_module(self.module)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.bare_optimizer = self.make_optimizer()
        self.optimizer: Any = self.fabric.setup_optimizers(self.bare_optimizer)

    def make_optimizer(self) -> Optimizer:
        """Also notes each group's parameters and their names: a strategy may put others in their place."""
        device, scaled = self.fabric.device.type, getattr(self, "scaler", None) is not None
        made = build_optimizer(
            self.module,
            self.config.optim,
            device,
            scaled,
            self.freezer.parts,
            self.task.blocks(self.module),
        )
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self.group_names = [group["name"] for group in made.param_groups]
        self.groups = [list(group["params"]) for group in made.param_groups]
        self.names = [[names[id(parameter)] for parameter in group] for group in self.groups]
        return made

    def find_leaves(self) -> dict[str, Leaf]:
        return dict(self.module.named_parameters())

    def refreeze(self) -> bool:
        """Let other parameters require a gradient, as the freezer says now. False where the strategy can't follow."""
        self.freezer.apply(self.module)
        if isinstance(self.fabric.strategy, DDPStrategy):  # which notes them once, when it wraps the network
            self.network = self.fabric.setup_module(self.module)
        return True

    def close(self) -> None:
        """Before another engine takes this one's place."""

    def find_parts(self, kind: str) -> dict[str, list[nn.Parameter]]:
        """What run.log_gradient_norms asks for: the parameters of every optimizer group, or of every module of the
        network, by name."""
        parts: dict[str, list[nn.Parameter]] = {}
        if kind == "none":
            return parts
        for group, names, parameters in zip(self.group_names, self.names, self.groups, strict=True):
            for name, parameter in zip(names, parameters, strict=True):
                parts.setdefault(name.partition(".")[0] if kind == "modules" else group, []).append(parameter)
        return parts

    # ---- an update ----------------------------------------------------------------------------------------------

    def make_guard(self) -> Guard:
        return Guard(self.optimizer, self.module, self.config.faults, self.scaler)

    def reduce_gradients(self) -> None:
        """Exchange gradients between ranks, where the last backward hasn't."""
        if isinstance(self.fabric.strategy, UnsyncedDDP):
            self.fabric.strategy.reduce_gradients(self.module, self.trainable)

    def clip(self) -> Tensor:
        """Clip the gradients as configured; returns their norm before, 0-d, the same on every rank."""
        if self.scaler is not None:
            self.fabric.strategy.precision.unscale_gradients(self.bare_optimizer)  # type: ignore[attr-defined]
        clip = self.config.clip
        if self.parts:
            self.part_norms = self.measure_parts(clip.p)
        total = clip_gradients(self.trainable, clip.norm, clip.value, clip.p)
        if clip.agc is not None:
            clip_units(self.adaptive, clip.agc)
        return total

    def measure_parts(self, p: float) -> dict[str, Tensor]:
        gradients = [[each.grad for each in part if each.grad is not None] for part in self.parts.values()]
        return dict(zip(self.parts, part_norms(gradients, p).unbind(), strict=True))

    def drop_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None

    # ---- state --------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Any]:
        """The network's state dict by its own names, with leaves for parameters."""
        places = {id(parameter): self.leaves[name] for name, parameter in self.module.named_parameters()}
        tied = self.module.named_parameters(remove_duplicate=False)
        return self.module.state_dict() | {name: places[id(parameter)] for name, parameter in tied}

    def load_weights(self, saved: dict[str, Any], fetch: Callable[[Tensor], Tensor], source: str) -> None:
        """Strict; raises InputError. ``fetch`` brings a tensor to this rank."""
        own = self.weights()
        portable.check_names(own, saved, source)
        portable.fill([(leaf, saved[name]) for name, leaf in own.items() if isinstance(saved[name], Tensor)], fetch)
        extra = {name: value for name, value in saved.items() if not isinstance(value, Tensor)}
        if extra:  # what modules keep beside their tensors
            self.module.load_state_dict(extra, strict=False)
        self.refresh()

    def moments(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name, with leaves for tensors."""
        return portable.optimizer_state(self.bare_optimizer, self.module)

    def load_moments(self, saved: dict[str, dict[str, Any]], fetch: Callable[[Tensor], Tensor]) -> None:
        portable.check_optimizer_names([name for group in self.names for name in group], saved)
        portable.load_optimizer_state(self.bare_optimizer, self.module, saved, fetch)

    def refresh(self) -> None:
        """Call after writing into the leaves, and after a forward without a backward: the next forward then gathers
        its weights from the leaves, and the network's parameters are the leaves again."""
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_scaler_state(self, saved: dict[str, Any]) -> None:
        if self.scaler and saved:
            self.scaler.load_state_dict(saved)

    def own_counts(self) -> dict[str, int]:
        """What the strategy's engine counts beside the run's counters; nothing is decided by it."""
        return {}

    def load_own_counts(self, counts: dict[str, int]) -> None:
        """Back to these."""


def make_engine(
    fabric: Fabric,
    task: Task,
    module: nn.Module,
    config: Config,
    freezer: Freezer,
    compilation: Compilation,
    accumulate: Accumulate,
) -> Engine:
    kind = Engine
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        from fabric_trainer.zero import ZeroEngine as kind  # needs the package deepspeed
    elif isinstance(fabric.strategy, FSDPStrategy):
        from fabric_trainer.fsdp1 import Fsdp1Engine as kind  # a kind of Engine
    return kind(fabric, task, module, config, freezer, compilation, accumulate)
