"""State that is the same under every strategy: whole tensors by parameter name.

A *leaf* is where a strategy keeps a tensor: the tensor itself (single, ddp), a DTensor (fsdp, tensor_parallel), or a
:class:`Fragment` (deepspeed, fsdp1). ``whole``, ``local``, ``put`` and ``like`` are all that the rest has to know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from fabric_trainer.errors import InputError
from fabric_trainer.several import kernels
from fabric_trainer.sharded import Shards

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Fragment:
    """This rank's slice of a flattened tensor: elements ``start : start + len(piece)``, possibly none."""

    shape: torch.Size  # of the whole
    piece: Tensor  # 1-d, live
    start: int
    group: torch.distributed.ProcessGroup | None = None  # the ranks that share it; None means all

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    def full_tensor(self) -> Tensor:
        """The whole, on every rank of the group: a collective."""
        flat = torch.zeros(self.shape.numel(), dtype=self.piece.dtype, device=self.piece.device)
        flat[self.start : self.start + len(self.piece)] = self.piece
        torch.distributed.all_reduce(flat, group=self.group)
        return flat.view(self.shape)


Leaf = Tensor | Fragment


def whole(leaf: Leaf) -> Tensor:
    """The full tensor, on every rank; a collective where the leaf is a piece. May be the live tensor itself."""
    return leaf.full_tensor() if isinstance(leaf, (DTensor, Fragment)) else leaf


def local(leaf: Leaf) -> Tensor:
    """This rank's part, live: no collective."""
    if isinstance(leaf, Fragment):
        return leaf.piece
    return leaf.to_local().detach() if isinstance(leaf, DTensor) else leaf.detach()


@torch.no_grad()
def put(leaf: Leaf, value: Tensor) -> None:
    """Write this rank's part of a whole tensor into the leaf: no collective."""
    if isinstance(leaf, Fragment):
        leaf.piece.copy_(value.flatten()[leaf.start : leaf.start + len(leaf.piece)])
    elif isinstance(leaf, DTensor):
        value = value.to(leaf.device, leaf.dtype)
        # every rank has the value: nobody has to send it
        piece = distribute_tensor(value, leaf.device_mesh, leaf.placements, src_data_rank=None)
        leaf.to_local().copy_(piece.to_local())
    else:
        leaf.copy_(value)


def like(leaf: Leaf, dtype: torch.dtype | None = None) -> Leaf:
    """A copy, laid out the same way."""
    if isinstance(leaf, Fragment):
        return replace(leaf, piece=leaf.piece.detach().to(dtype or leaf.dtype, copy=True))
    return leaf.detach().to(dtype or leaf.dtype, copy=True)


# ---- out of the strategy ------------------------------------------------------------------------------------------


def optimizer_groups(optimizer: Optimizer, names: list[list[str]]) -> list[dict[str, Any]]:
    """Options of every group, plain, with the names of its parameters; those of one name, which a strategy may have
    split, together."""
    made: dict[str, dict[str, Any]] = {}
    for group, own in zip(optimizer.param_groups, names, strict=True):
        options = {key: _plain(value) for key, value in group.items() if key != "params"}
        made.setdefault(group["name"], options | {"params": []})["params"].extend(own)
    return list(made.values())


def optimizer_state(optimizer: Optimizer, network: nn.Module) -> dict[str, dict[str, Any]]:
    """{parameter name: {"step": …, "exp_avg": …}}. Tensors are the live leaves: copy before the next step."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}


# ---- into the strategy --------------------------------------------------------------------------------------------


def shared(fabric: Fabric, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 reads, on all ranks: plain values everywhere, tensors on rank 0 and meta tensors in their place
    elsewhere. :func:`fetch` brings them one at a time, so that no other rank ever holds them all."""
    saved: Any = None
    if fabric.is_global_zero:
        try:
            saved = read()
        except Exception as error:  # raised on all ranks alike, so that none waits for one that has left
            saved = error
    if fabric.world_size > 1:
        outline = fabric.broadcast(_outline(saved) if fabric.is_global_zero else None)
        saved = saved if fabric.is_global_zero else outline
    if isinstance(saved, Exception):
        raise saved
    return saved  # type: ignore[no-any-return]


def fetch(fabric: Fabric, value: Tensor) -> Tensor:
    """The tensor that rank 0 has, on this rank's device: a collective."""
    if fabric.world_size == 1:
        return value
    sent = torch.empty(value.shape, dtype=value.dtype, device=fabric.device) if value.is_meta else value
    sent = sent.to(fabric.device).contiguous()
    torch.distributed.broadcast(sent, 0)
    return sent


def fill(pairs: Iterable[tuple[Leaf, Tensor]], fetch: Callable[[Tensor], Tensor]) -> None:
    """Write into each leaf the saved tensor beside it: one at a time as ``fetch`` brings them, shards straight away."""
    if isinstance(fetch, Shards):
        fetch.read(pairs)
        return
    for leaf, value in pairs:
        put(leaf, fetch(value))


def check_names(own: dict[str, Any], saved: dict[str, Any], source: str) -> None:
    """Raise InputError, one line that lists missing, unexpected and misshapen names, unless ``saved`` is ``own``'s."""
    problems = {
        "missing": sorted(set(own) - set(saved)),
        "unexpected": sorted(set(saved) - set(own)),
        "misshapen": [
            f"{name} {tuple(saved[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if isinstance(saved.get(name), Tensor) and saved[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{source} is not of this network: {'; '.join(found)}")


def check_optimizer_names(trained: list[str], saved: dict[str, Any]) -> None:
    """Raise InputError, naming them, where the saved moments are of parameters that this run doesn't train."""
    if foreign := sorted(set(saved) - set(trained)):
        raise InputError(f"the checkpoint's optimizer has state for {_some(foreign)}, which this one doesn't train")


def load_optimizer_state(
    optimizer: Optimizer, network: nn.Module, saved: dict[str, dict[str, Any]], fetch: Callable[[Tensor], Tensor]
) -> None:
    """Take over the moments by name; the groups' options (learning rate, betas, …) stay those of the configuration."""

    def place(value: Any, parameter: Tensor, key: str) -> Any:
        """Where the optimizer would keep it, to be filled; some keep a dict of tensors."""
        if isinstance(value, dict):
            return {inner: place(item, parameter, key) for inner, item in value.items()}
        if not isinstance(value, Tensor):
            return value
        made = _moment(parameter, value, key != "step" or on_device[id(parameter)])
        pairs.append((made, value))
        return made

    parameters = dict(network.named_parameters())
    on_device = {
        id(parameter): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    optimizer.state.clear()
    pairs: list[tuple[Leaf, Tensor]] = []
    for name, values in saved.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: place(value, parameter, key) for key, value in values.items()}
    fill(pairs, fetch)


def load_group_state(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    """Take over what an optimizer counts in its groups (MADGRAD's ``k``): whatever isn't one of its arguments."""
    by_name = {group["name"]: group for group in saved}
    for kernel in kernels(optimizer):
        arguments = {"params", "name", *inspect.signature(type(kernel)).parameters}
        for group in kernel.param_groups:
            own = by_name.get(group["name"], {})
            group.update({key: own[key] for key in group if key not in arguments and key in own})


def _moment(parameter: Tensor, value: Tensor, on_device: bool) -> Tensor:
    """torch's step counters stay on the host unless its kernel reads them."""
    dtype = value.dtype
    if value.shape == parameter.shape and {dtype, parameter.dtype} == {torch.float32, torch.float64}:
        dtype = parameter.dtype  # saved under a strategy that keeps another precision
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(value.shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _outline(tree: Any) -> Any:
    """The tree with meta tensors for tensors."""
    if isinstance(tree, dict):
        return {key: _outline(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_outline(value) for value in tree]
    return torch.empty_like(tree, device="meta") if isinstance(tree, Tensor) else tree


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value
    return list(value) if isinstance(value, tuple) else value


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
