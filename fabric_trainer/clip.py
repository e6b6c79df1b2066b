"""Gradient norm and clipping. The norm comes back as a plain 0-d tensor on the device: nothing waits for it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.tensor import DTensor


def clip_gradients(
    parameters: Iterable[Tensor], norm: float | None = None, value: float | None = None, p: float = 2.0
) -> Tensor:
    """Clip the parameters' gradients in place; return their global p-norm *before* clipping, 0-d.

    norm: scale all gradients by min(1, norm / (total + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` does (Pascanu et
    al., arXiv 1211.5063), bit for bit. value: clamp every element to [-value, value]. Neither: measure alone.
    Parameters in shards (DTensor) and whole ones may be mixed.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    total = total_norm(gradients, p)
    pieces = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if norm is not None:
        torch._foreach_mul_(pieces, torch.clamp(norm / (total + 1e-6), max=1.0))
    elif value is not None:
        torch._foreach_clamp_min_(pieces, -value)
        torch._foreach_clamp_max_(pieces, value)
    return total


def total_norm(tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """The p-norm of all elements of all tensors, 0-d, on the first one's device, the same on every rank.

    What is sharded is added up over the ranks that share it (one collective for each way of sharding); what every
    rank has whole counts once.
    """
    kinds: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for tensor in tensors:
        piece = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kinds.setdefault(_sharing(tensor), []).append(piece)
    norms = [over_ranks(groups, local_norm(pieces, p), p) for groups, pieces in kinds.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), p)


def part_norms(parts: list[list[Tensor]], p: float = 2.0) -> Tensor:
    """The p-norm of each list of tensors: (len(parts),), the same on every rank; of an empty one 0. As many collectives
    as for one norm over all of them."""
    kinds: dict[tuple[ProcessGroup, ...], list[list[Tensor]]] = {}
    for number, tensors in enumerate(parts):
        for tensor in tensors:
            piece = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            kinds.setdefault(_sharing(tensor), [[] for _ in parts])[number].append(piece)
    if not kinds:
        return torch.zeros(len(parts))
    norms = [over_ranks(groups, local_norms(pieces, p), p) for groups, pieces in kinds.items()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), p, dim=0)


def local_norms(parts: list[list[Tensor]], p: float) -> Tensor:
    """The norm of each list of this rank's tensors, of which there is at least one: (len(parts),)."""
    some = next(tensor for tensors in parts for tensor in tensors)
    return torch.stack([local_norm(tensors, p) if tensors else some.new_zeros(()) for tensors in parts])


def local_norm(pieces: list[Tensor], p: float) -> Tensor:
    """The norm of this rank's tensors, at least one; shards may be empty."""
    held = [piece for piece in pieces if piece.numel()]  # the largest element of nothing is an error in torch
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(held, p)), p) if held else pieces[0].new_zeros(())


def over_ranks(groups: tuple[ProcessGroup, ...], norm: Tensor, p: float) -> Tensor:
    """The norms, of any shape, over all ranks in the groups, from each rank's own."""
    if not groups:
        return norm
    power = norm if math.isinf(p) else norm**p
    for group in groups:
        torch.distributed.all_reduce(power, ReduceOp.MAX if math.isinf(p) else ReduceOp.SUM, group)
    return power if math.isinf(p) else power ** (1 / p)


def _sharing(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups over which a tensor is sharded; none for a whole one."""
    if not isinstance(tensor, DTensor):
        return ()
    # not is_shard(): in 2-D the outer sharding is a _StridedShard, which denies it
    sharded = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in sharded)
