"""Weights in flat shards: torch's first FSDP, through Fabric's FSDPStrategy.

Written against torch 2.9 to 2.15: where FSDP keeps what is read off its ``FlatParameter``, which is private.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.fsdp.wrap import CustomPolicy

from fabric_trainer.clip import clip_gradients, local_norms, over_ranks
from fabric_trainer.config import Config, FsdpConfig
from fabric_trainer.engine import Engine
from fabric_trainer.fsdp import DTYPES, materialise
from fabric_trainer.portable import Fragment, Leaf, check_optimizer_names, fill

if TYPE_CHECKING:
    from fabric_trainer.launch import Resolved


class FlatStrategy(FSDPStrategy):
    """Fabric's strategy, a unit for each of ``blocks``, which are set by whoever knows the network, and one for the
    rest."""

    def __init__(self, config: Config, resolved: Resolved) -> None:
        self.blocks: list[nn.Module] = []
        offload = config.fabric.fsdp.cpu_offload
        super().__init__(
            timeout=timedelta(minutes=config.fabric.timeout),
            process_group_backend="cpu:gloo,cuda:nccl" if offload else None,  # shards are gathered where they lie
            cpu_offload=offload,
            mixed_precision=mixed_precision(config.fabric.fsdp, resolved.precision),
            auto_wrap_policy=CustomPolicy(self._is_block),  # type: ignore[arg-type]
            sharding_strategy=config.fabric.fsdp.sharding,
            use_orig_params=True,
        )

    def _is_block(self, module: nn.Module) -> bool:
        return any(module is block for block in self.blocks)


def make_strategy(config: Config, resolved: Resolved) -> FlatStrategy:
    return FlatStrategy(config, resolved)


def mixed_precision(config: FsdpConfig, precision: str) -> MixedPrecision:
    """Gathers and computes in half precision and reduces gradients in float32; shards and buffers stay as they are."""
    mixed = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(precision)
    compute = config.param_dtype or mixed
    reduce = config.reduce_dtype or ("fp32" if mixed else None)
    return MixedPrecision(
        param_dtype=DTYPES[compute] if compute else None,
        reduce_dtype=DTYPES[reduce] if reduce else None,
    )


class Fsdp1Engine(Engine):
    """A leaf is a slice of its unit's shard, which FSDP cuts without regard to where a parameter begins."""

    def set_up(self) -> None:
        """The optimizer first: FSDP keeps the parameters, but not their shapes, which tell weights from biases."""
        fabric = self.fabric
        materialise(self.module, torch.device("cpu"))  # FSDP would put other parameters in the place of meta ones
        for parameter in self.module.parameters():
            parameter.data = parameter.data.contiguous()  # pieces are cut in the order of memory
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.bare_optimizer = self.make_optimizer()
        wrapped, self.module = self.module, without_wrappers(self.module)
        self.network = fabric.setup_module(wrapped)
        self.optimizer: Any = fabric.setup_optimizers(self.bare_optimizer)
        self.fsdp = cast(FullyShardedDataParallel, self.network._forward_module)
        self.fsdp.check_is_root()  # from here on the shards stay where they are
        self.pieces = self._find_pieces()

    def find_leaves(self) -> dict[str, Leaf]:
        return {name: self.pieces[id(parameter)] for name, parameter in self.module.named_parameters()}

    def _find_pieces(self) -> dict[int, Fragment]:
        """By id of the parameter."""
        pieces = {}
        for unit in self._units():
            flat = unit._handle.flat_param
            for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                offset, length = info.offset_in_shard or 0, info.numel_in_shard or 0  # None where it lies elsewhere
                piece = flat._local_shard.detach()[offset : offset + length]
                pieces[id(parameter)] = Fragment(shape, piece, info.intra_param_start_idx or 0)
        return pieces

    def _units(self) -> list[Any]:
        units: list[Any] = FullyShardedDataParallel.fsdp_modules(self.fsdp)
        return [unit for unit in units if unit._handle is not None]  # a unit without parameters has none

    # ---- an update ----------------------------------------------------------------------------------------------

    def clip(self) -> Tensor:
        """No rank has a whole gradient: FSDP adds the norm up."""
        clip = self.config.clip
        if self.scaler is not None:
            self.fabric.strategy.precision.unscale_gradients(self.bare_optimizer)  # type: ignore[attr-defined]
        if self.parts:
            self.part_norms = self.measure_parts(clip.p)
        total: Tensor = self.fsdp.clip_grad_norm_(math.inf if clip.norm is None else clip.norm, clip.p)
        if clip.norm is None and clip.value is not None:
            clip_gradients(self.trainable, value=clip.value)
        return total

    def measure_parts(self, p: float) -> dict[str, Tensor]:
        """A rank may have no piece of a part, and takes part in the sum all the same."""
        gradients = [[each.grad for each in part if each.grad is not None] for part in self.parts.values()]
        nothing = self.trainable[0].new_zeros(0)
        norms = local_norms([[*part, nothing] for part in gradients], p).to(self.fabric.device)
        if any(unit._handle.uses_sharded_strategy for unit in self._units()):  # a single rank's is not
            norms = over_ranks((cast(ProcessGroup, self.fsdp.process_group),), norms, p)
        return dict(zip(self.parts, norms.unbind(), strict=True))

    # ---- state --------------------------------------------------------------------------------------------------

    def moments(self) -> dict[str, dict[str, Any]]:
        """A rank has none for a parameter of which it has no piece: the ranks tell each other what there is."""
        outlines: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(outlines, {name: self._outline(own) for name, own in self._named()})
        found = {}
        for name, parameter in self._named():
            outline: dict[str, Any] = next((each[name] for each in outlines if each[name]), {})
            state = self.bare_optimizer.state.get(parameter, {})
            moments = {
                key: self._like_piece(parameter, state.get(key), value) if isinstance(value, torch.dtype) else value
                for key, value in outline.items()
            }
            if moments:
                found[name] = moments
        return found

    def load_moments(self, saved: dict[str, dict[str, Any]], fetch: Callable[[Tensor], Tensor]) -> None:
        check_optimizer_names([name for group in self.names for name in group], saved)
        self.bare_optimizer.state.clear()
        on_device = any(group.get("fused") or group.get("capturable") for group in self.bare_optimizer.param_groups)
        pairs: list[tuple[Leaf, Tensor]] = []
        for name, parameter in self._named():
            made: dict[str, Any] = {}
            for key, value in saved.get(name, {}).items():
                if not isinstance(value, Tensor):
                    made[key] = value
                elif key != "step" and value.shape == self.pieces[id(parameter)].shape:
                    made[key] = torch.empty_like(parameter, requires_grad=False)
                    pairs.append((self._like_piece(parameter, made[key], parameter.dtype), value))
                else:  # torch keeps it on the host unless its kernel reads it
                    made[key] = torch.empty_like(value, device=parameter.device if on_device else "cpu")
                    pairs.append((made[key], value))
            if made and parameter.numel():
                self.bare_optimizer.state[parameter] = made
        fill(pairs, fetch)

    def refresh(self) -> None:
        """The root, or under SHARD_GRAD_OP every unit, keeps what a forward has gathered."""
        for unit in self._units():
            if unit._handle.uses_sharded_strategy:  # a single rank gathers nothing
                _reshard(unit, unit._handle, free_unsharded_flat_param=True)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        names = [name for group in self.names for name in group]
        return list(zip(names, self.trainable, strict=True))

    def _outline(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter's state here, with a dtype in place of what is cut like the parameter."""
        return {
            key: (value.dtype if key != "step" and value.shape == parameter.shape else value.cpu())
            if isinstance(value, Tensor)
            else value
            for key, value in self.bare_optimizer.state.get(parameter, {}).items()
        }

    def _like_piece(self, parameter: nn.Parameter, value: Tensor | None, dtype: torch.dtype) -> Fragment:
        """The leaf of what the optimizer keeps for this rank's piece; of nothing where there is no piece."""
        piece = self.pieces[id(parameter)]
        flat = piece.piece.new_empty(0, dtype=dtype) if value is None else value.view(-1)
        return Fragment(piece.shape, flat, piece.start)


def without_wrappers(module: nn.Module) -> nn.Module:
    """The same module once more, with the same parameters and buffers, in whose tree FSDP puts no wrappers: names in
    it stay the network's own. To be made before FSDP does."""
    twin: nn.Module = module.__class__.__new__(module.__class__)
    vars(twin).update(vars(module))
    twin._modules = {name: child and without_wrappers(child) for name, child in module._modules.items()}
    # what a module keeps beside its tensors is the first one's
    vars(twin).update(get_extra_state=module.get_extra_state, set_extra_state=module.set_extra_state)
    return twin
