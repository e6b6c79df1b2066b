"""Several optimizers that are one to everything else, and which parameters each of them steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from fabric_trainer.config import OptimConfig
from fabric_trainer.errors import InputError
from fabric_trainer.match import matching

HYBRID = "muon_hybrid"


class Several(Optimizer):
    """Steps each of its children. Their groups are its groups and their state is its state, the very same objects: who
    sets a learning rate here, or loads moments, has done so there. Every child has parameters of its own."""

    def __init__(self, children: Sequence[Optimizer]) -> None:
        self.children = list(children)
        super().__init__([group for child in children for group in child.param_groups], {})
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        for child in children:
            self.state.update(child.state)  # some are made with theirs
            child.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for child in self.children:
            child.step()


def kernels(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that do the work."""
    return optimizer.children if isinstance(optimizer, Several) else [optimizer]


class Portion(NamedTuple):
    """What one of several optimizers steps. label: "" for the main one's, whose groups have plain names."""

    label: str
    config: OptimConfig
    names: list[str]


def portions(network: nn.Module, config: OptimConfig, names: list[str], blocks: Iterable[nn.Module]) -> list[Portion]:
    """Share the parameters ``names`` out: ``optim.others`` first, in order, then Muon's half of ``muon_hybrid``, and
    the rest to the main optimizer. blocks: in which hidden matrices lie. Raises InputError."""
    left = list(names)
    made: list[Portion] = []

    def take(label: str, part: OptimConfig, own: list[str], key: str) -> None:
        own = [name for name in own if name in set(left)]
        if not own:
            raise InputError(f"{key}: every parameter it meets has an optimizer already, by an entry before it")
        left[:] = [name for name in left if name not in set(own)]
        made.append(Portion(_unlike(label, [portion.label for portion in made]), part, own))

    for place, other in enumerate(config.others):
        key = f"optim.others[{place}].match"
        part = _of_another(config, other.name, other.lr, other.weight_decay, other.args)
        take(other.name.rpartition(".")[2].lower(), part, matching(other.match, names, key), key)
    if config.name.lower() == HYBRID:
        half = config.muon
        args = half.args | {"adjust_lr_fn": half.adjust_lr_fn}
        part = _of_another(config, "muon", half.lr, half.weight_decay, args)
        take("muon", part, hidden_matrices(network, half.matrices, names, blocks), "optim.muon.matrices")
        config = replace(config, name="adamw")
    return [Portion("", config, left), *made] if left or not made else made


def hidden_matrices(
    network: nn.Module, wanted: str | list[str], names: list[str], blocks: Iterable[nn.Module]
) -> list[str]:
    """Names of the matrices for Muon, which is meant for hidden ones: embeddings, the head and the first projection
    are better left to AdamW (Jordan, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982)."""
    key = "optim.muon.matrices"
    parameters = dict(network.named_parameters())
    flat = [name for name in names if parameters[name].ndim == 2]
    if isinstance(wanted, list):
        met = matching(wanted, names, key)
        if other := [name for name in met if name not in flat]:
            raise InputError(f"{key}: Muon steps matrices, and {other[0]} has {parameters[other[0]].ndim} dimensions")
        return met
    kinds = (nn.Embedding, nn.EmbeddingBag)
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, kinds)}
    found = [name for name in flat if id(parameters[name]) not in embeddings]
    if wanted == "hidden":
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        if not inside:
            raise InputError(f"{key}: hidden are those in the task's blocks(), and it names none: say all, or patterns")
        found = [name for name in found if id(parameters[name]) in inside]
    if not found:
        raise InputError(f"{key}: {wanted} are none, the network has no such matrix: take another optim.name")
    return found


def _of_another(
    config: OptimConfig, name: str, lr: float | None, weight_decay: float | None, args: dict[str, Any]
) -> OptimConfig:
    return replace(
        config,
        name=name,
        lr=config.lr if lr is None else lr,
        weight_decay=config.weight_decay if weight_decay is None else weight_decay,
        args=args,
    )


def _unlike(label: str, taken: list[str]) -> str:
    """sgd, sgd2, sgd3: groups of different optimizers have different names."""
    count = sum(other.rstrip("0123456789") == label for other in taken)
    return f"{label}{count + 1}" if count else label
