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
    pieces = list(map(_piece, gradients))
    if norm is not None:
        torch._foreach_mul_(pieces, torch.clamp(norm / (total + 1e-6), max=1.0))
    elif value is not None:
        torch._foreach_clamp_min_(pieces, -value)
        torch._foreach_clamp_max_(pieces, value)
    return total


def clip_units(parameters: Iterable[Tensor], factor: float, eps: float = 1e-3) -> None:
    """Adaptive gradient clipping (Brock et al., arXiv 2102.06171), in place: where the norm of a unit's gradient is
    more than ``factor`` times that of its weights, counted as at least ``eps``, it is scaled down to that.

    A unit is a row of a matrix or a filter of a convolution, whatever feeds one output; a vector is one unit.
    Parameters may be in shards: what a cut has divided is added up over the ranks that have the rest of it.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return
    gradients = unit_norms([parameter.grad for parameter in trained])  # type: ignore[misc]
    weights = unit_norms([parameter.detach() for parameter in trained])
    torch._foreach_clamp_min_(weights, eps)
    torch._foreach_mul_(weights, factor)
    torch._foreach_clamp_min_(gradients, 1e-30)
    torch._foreach_div_(weights, gradients)
    torch._foreach_clamp_max_(weights, 1.0)
    for parameter, share in zip(trained, weights, strict=True):
        piece = _piece(parameter.grad)  # type: ignore[arg-type]
        piece.mul_(share.to(piece.dtype))


def unit_norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of every unit of each tensor, as far as this rank has a part of it, to be broadcast over that part.

    One collective for each set of ranks that share units.
    """
    squares = [_unit_squares(_piece(tensor)) for tensor in tensors]
    shared: dict[ProcessGroup, list[Tensor]] = {}
    for tensor, square in zip(tensors, squares, strict=True):
        for group in _sharing(tensor, units=True):
            shared.setdefault(group, []).append(square)
    for group, parts in shared.items():
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
    return [square.sqrt_() for square in squares]


def _unit_squares(piece: Tensor) -> Tensor:
    """(rows, 1, …) of a tensor of several dimensions, (1,) of a vector; in float32 at least."""
    wide = piece if piece.dtype == torch.float64 else piece.float()
    return wide.square().sum(tuple(range(1, piece.ndim)) or 0, keepdim=True) if piece.ndim else wide.square()


def total_norm(tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """The p-norm of all elements of all tensors, 0-d, on the first one's device, the same on every rank.

    What is sharded is added up over the ranks that share it (one collective for each way of sharding); what every
    rank has whole counts once.
    """
    kinds: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for tensor in tensors:
        piece = _piece(tensor)
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


def _sharing(tensor: Tensor, units: bool = False) -> tuple[ProcessGroup, ...]:
    """The process groups over which a tensor is sharded, or its units are; none for a whole one."""
    if not isinstance(tensor, DTensor):
        return ()
    # not is_shard(): in 2-D the outer sharding is a _StridedShard, which denies it
    sharded = [(dim, placement) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if units and tensor.ndim > 1:  # cut between rows they stay whole
        sharded = [(dim, placement) for dim, placement in sharded if placement.dim != 0]  # type: ignore[attr-defined]
    return tuple(tensor.device_mesh.get_group(dim) for dim, _ in sharded)


def _piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
