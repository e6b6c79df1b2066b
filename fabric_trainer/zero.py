"""DeepSpeed's ZeRO-1, 2 and 3 through Fabric, kept in step with the loop. Needs the package deepspeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.strategies import DeepSpeedStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_trainer.batch import micro_batch_size, resolve_accumulate
from fabric_trainer.config import Config, FaultsConfig
from fabric_trainer.engine import Engine
from fabric_trainer.errors import BadGradientError, InputError
from fabric_trainer.faults import Guard
from fabric_trainer.launch import read_deepspeed
from fabric_trainer.order import Accumulate, accumulation
from fabric_trainer.portable import Fragment, Leaf, check_optimizer_names, put

if TYPE_CHECKING:
    from fabric_trainer.launch import Resolved


class ZeroStrategy(DeepSpeedStrategy):
    """Fabric's strategy, whose engine reduces gradients when the loop says so and scales no loss."""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self._backward_sync_control = Boundary()

    def backward(self, tensor: Tensor, module: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, scale_wrt_gas=False, **kwargs)  # the loop knows the denominator


class Boundary(_BackwardSyncControl):
    """More micro-batches follow: stage 1 keeps its gradients, stages 2 and 3 add the reduced pieces up."""

    def no_backward_sync(self, module: Any, enabled: bool) -> AbstractContextManager[None]:
        return _accumulating(module, enabled)


@contextmanager
def _accumulating(engine: Any, enabled: bool) -> Iterator[None]:
    engine.set_gradient_accumulation_boundary(not enabled)
    try:
        yield
    finally:
        engine.set_gradient_accumulation_boundary(True)


def make_strategy(config: Config, resolved: Resolved) -> ZeroStrategy:
    # the batch once more in set_up, where a resume, or the search for "auto", has had its say
    auto = config.batch.micro_batch_size == "auto"
    made = engine_config(config, resolved) | ({} if auto else batch_config(config, resolved.world_size))
    return ZeroStrategy(config=made, timeout=timedelta(minutes=config.fabric.timeout))


# ---- configuration ------------------------------------------------------------------------------------------------


def engine_config(config: Config, resolved: Resolved) -> dict[str, Any]:
    """The engine's configuration, but for the batch: the user's, with every gap filled from ours. Raises InputError."""
    made, options = read_deepspeed(config.fabric), config.fabric.deepspeed
    for section in ("optimizer", "scheduler"):
        if section in made:
            raise InputError(f"fabric.deepspeed.config: leave {section} out; optim.* and schedule.* are the loop's")
    zero = made.setdefault("zero_optimization", {})
    zero["stage"] = resolved.stage
    zero.setdefault("reduce_bucket_size", 50_000_000)  # elements; of its own 5e8 stage 3 keeps 2 GB of float32
    offload = {"offload_optimizer": options.offload_optimizer, "offload_param": options.offload_parameters}
    for name in (name for name, wanted in offload.items() if wanted):
        zero.setdefault(name, {"device": "cpu", "pin_memory": True})
    made.setdefault("zero_allow_untested_optimizer", True)
    made.setdefault("zero_force_ds_cpu_optimizer", False)  # torch's fused AdamW runs on the host as well
    if resolved.precision.startswith("bf16"):
        # else stages 1 and 2 would step with a gradient that isn't finite
        made["bf16"] = {"enabled": True, "check_grad_overflow": True} | made.get("bf16", {})
    return made


def batch_config(config: Config, world_size: int, accumulate: Accumulate | None = None) -> dict[str, Any]:
    """The engine's keys about the batch and the clip; "auto" in the user's configuration follows ours. Raises
    InputError where it names another number."""
    accumulate = resolve_accumulate(config.batch, world_size) if accumulate is None else accumulate
    micro, first = micro_batch_size(config.batch), accumulation(accumulate, 0, 0)
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": first,
        "train_batch_size": micro * first * world_size,
        "gradient_clipping": config.clip.norm or 0.0,
    }
    given = read_deepspeed(config.fabric)
    for key, value in ours.items():
        if given.get(key, "auto") not in ("auto", value):
            raise InputError(f'fabric.deepspeed.config: {key} is {given[key]}, this run has {value}; "auto" follows it')
    return ours


def compare_engine(engine: Any, config: dict[str, Any]) -> None:
    """Raise InputError where the engine took something else than it was given."""
    effective = {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "train_batch_size": engine.train_batch_size(),
        "gradient_clipping": engine.gradient_clipping(),
    }
    for key, value in effective.items():
        if value != config[key]:
            raise InputError(f"DeepSpeed runs with {key} {value}, not with the {config[key]} it was given")


# ---- engine -------------------------------------------------------------------------------------------------------


class ZeroEngine(Engine):
    """ZeRO steps flat float32 pieces of the weights; a leaf is a slice of one."""

    def set_up(self) -> None:
        fabric = self.fabric
        self.module = fabric.strategy.precision.convert_module(self.module).to(fabric.device)
        strategy: Any = fabric.strategy
        strategy.config.update(batch_config(self.config, fabric.world_size, self.accumulate))
        self.parked: dict[str, dict[str, Any]] = {}  # moments of frozen parameters
        bare = self.make_optimizer()
        self._leave_out_frozen(bare)
        self.network, self.optimizer = fabric.setup(self.module, bare)
        self.deepspeed: Any = strategy.model
        # else it counts: a first update of fewer micro-batches than the usual would not be made
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.zero: Any = self.deepspeed.optimizer
        self.bare_optimizer = self.zero.optimizer
        compare_engine(self.deepspeed, strategy.config)
        self.scaler = self.zero.loss_scaler if self.deepspeed.fp16_enabled() else None

    def _leave_out_frozen(self, optimizer: Optimizer) -> None:
        """ZeRO takes no group without a parameter to step; units are frozen as a whole, and each has its own groups."""
        trained = [i for i, group in enumerate(optimizer.param_groups) if group["params"][0].requires_grad]
        optimizer.param_groups[:] = [optimizer.param_groups[i] for i in trained]
        self.groups, self.names = [self.groups[i] for i in trained], [self.names[i] for i in trained]

    def refreeze(self) -> bool:
        """ZeRO lays its pieces out once, for what trains at the time: this engine must give way to another."""
        return False

    def close(self) -> None:
        self.deepspeed.destroy()

    def find_leaves(self) -> dict[str, Leaf]:
        stepped = {id(parameter) for parameter in self.trainable}
        return {
            name: self._slice(parameter) if id(parameter) in stepped else _frozen(parameter)
            for name, parameter in self.module.named_parameters()
        }

    # ---- an update ----------------------------------------------------------------------------------------------

    def make_guard(self) -> Guard:
        return ZeroGuard(self.deepspeed, self.optimizer, self.module, self.config.faults, self.scaler)

    def clip(self) -> Tensor:
        """The engine clips within its step, where the guard fills the norm in."""
        return torch.full((), math.nan, device=self.fabric.device)

    def drop_gradients(self) -> None:
        """After an update the engine has, in its step; here those of an attempt that doesn't count, under stage 1."""
        if self.deepspeed.zero_optimization_stage() == 1:
            self.zero.zero_grad(set_to_none=True)
            self.zero.micro_step_id = -1  # before the first
            for gradients in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))

    # ---- state --------------------------------------------------------------------------------------------------

    def moments(self) -> dict[str, dict[str, Any]]:
        found = dict(self.parked)
        for name, parameter in self._named():
            flat, *_ = self._place(parameter)
            state = self.bare_optimizer.state.get(flat)
            if state:
                found[name] = {
                    key: self._slice(parameter, value) if _is_flat(value, flat) else value
                    for key, value in state.items()
                }
        return found

    def load_moments(self, saved: dict[str, dict[str, Any]], fetch: Callable[[Tensor], Tensor]) -> None:
        trained, waiting = {name for name, _ in self._named()}, self.freezer.names
        check_optimizer_names([*trained, *waiting], saved)
        self.parked = {name: self._park(values, fetch) for name, values in saved.items() if name not in trained}
        self.bare_optimizer.state.clear()
        on_device = any(group.get("fused") or group.get("capturable") for group in self.bare_optimizer.param_groups)
        for name, parameter in self._named():
            flat, *_ = self._place(parameter)
            for key, value in saved.get(name, {}).items():
                state = self.bare_optimizer.state[flat]
                if not isinstance(value, Tensor):
                    state[key] = value
                elif value.ndim == 0:  # such as step: one for the whole piece
                    state[key] = fetch(value).to(flat.device if on_device else "cpu", copy=True)
                else:
                    state.setdefault(key, torch.zeros_like(flat))
                    put(self._slice(parameter, state[key]), fetch(value))

    def _park(self, values: dict[str, Any], fetch: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """A frozen parameter's moments: rank 0 keeps them, on the host, until they are needed again."""
        fetched = {key: fetch(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        if not self.fabric.is_global_zero:
            return {}
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in fetched.items()}

    def refresh(self) -> None:
        """The forward reads its weights from copies of the pieces, gathered."""
        if self.deepspeed.zero_optimization_stage() < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()  # small ones stay gathered otherwise
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def scaler_state(self) -> dict[str, Any]:
        plain = vars(self.scaler) if self.scaler else {}
        return {key: value for key, value in plain.items() if isinstance(value, (bool, int, float))}

    def load_scaler_state(self, saved: dict[str, Any]) -> None:
        if self.scaler:
            vars(self.scaler).update({key: value for key, value in saved.items() if key in vars(self.scaler)})

    def own_counts(self) -> dict[str, int]:
        names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        return {name: getattr(self.deepspeed, name) for name in names}

    def load_own_counts(self, counts: dict[str, int]) -> None:
        vars(self.deepspeed).update(counts)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        names = [name for group in self.names for name in group]
        return list(zip(names, self.trainable, strict=True))

    def _slice(self, parameter: Any, flat: Tensor | None = None) -> Fragment:
        """The parameter's part of this rank's flat piece, or of a moment laid out like it."""
        master, offset, start, length, shape = self._place(parameter)
        return Fragment(shape, (master if flat is None else flat).detach()[offset : offset + length], start)

    def _place(self, parameter: Any) -> tuple[Tensor, int, int, int, torch.Size]:
        """(flat piece, offset in it, first element in the whole, elements, shape of the whole)."""
        if self.deepspeed.zero_optimization_stage() == 3:
            group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = length * self.fabric.global_rank
            inside = max(0, min(length, parameter.ds_numel - start))  # the last ranks' parts are padded
            return self.zero.fp32_partitioned_groups_flat[group], offset, start, inside, parameter.ds_shape
        mapping = parameter._hp_mapping
        if mapping is None:  # none of it lies on this rank
            group = next(i for i, g in enumerate(self.groups) if any(p is parameter for p in g))
            return self.zero.single_partition_of_fp32_groups[group], 0, 0, 0, parameter.shape
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, here.start, there.start, here.numel, parameter.shape


class ZeroGuard(Guard):
    """The engine itself leaves out an update whose gradient isn't finite, on all ranks alike."""

    def __init__(
        self, engine: Any, optimizer: Optimizer, network: nn.Module, config: FaultsConfig, scaler: Any
    ) -> None:
        super().__init__(optimizer, network, config, scaler, on_device=False)
        self.engine = engine

    def step(self, norm: Tensor) -> None:
        self.engine.step()
        zero = self.engine.optimizer
        norm.fill_(float(zero._global_grad_norm))  # a number by now: the engine has compared it
        if zero.overflow and self.config.nonfinite == "raise" and self.scaler is None:
            raise BadGradientError(f"the gradient's norm is {norm.item()}; faults.nonfinite: skip would leave it out")
        self.conclude(norm, bool(zero.overflow))


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _frozen(parameter: Any) -> Leaf:
    """A parameter without a master copy: whole, or under stage 3 its own partition."""
    if not hasattr(parameter, "ds_tensor"):
        return cast(Tensor, parameter)
    piece, rank = parameter.ds_tensor, torch.distributed.get_rank()
    start = piece.numel() * rank
    return Fragment(parameter.ds_shape, piece.detach()[: max(0, parameter.ds_numel - start)], start)
