"""Weights of the Universal Physics Stack (UPS): its own files and Lightning's, read into our names and written back.

Its own files are flat state dicts, Lightning's have one under ``state_dict``; in both, the names carry whatever the
network was wrapped in when it was saved.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fabric_trainer.counters import Counters
from fabric_trainer.errors import InputError
from fabric_trainer.portable import check_names
from models import weights
from models.physics.operator import LatentOperator
from models.physics.prior import SteadyPrior
from models.physics.residual import DiffusionResidual

KEY = "the file to convert"
_PLACES = ("operator", "diffusion", "state_dict", "model")
_WRAPPERS = r"(?:_orig_mod\.|module\.)*"
_LEADING = re.compile(r"^(?:operator\.|diffusion\.|_orig_mod\.|module\.)*")
_INSIDE = re.compile(r"(?:\._orig_mod)+\.")
# what only this network's names begin with, and its name in the UPS's Lightning modules: the prior has none there
_KINDS = {"operator": ("core.", "operator."), "residual": ("network.", "diffusion."), "prior": ("drift.", None)}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """One network's, by its bare names, and what a checkpoint says of where they are from."""

    state: dict[str, Tensor]
    epoch: int = 0
    step: int = 0
    settings: dict[str, Any] = field(default_factory=dict)  # the UPS's configuration, or ours


def load(network: nn.Module, path: str | Path, part: str | None = None, key: str = KEY) -> None:
    """Load a file of any of the kinds into a network, in place, strict: InputError with all missing, unexpected and
    misshapen names."""
    state = read(path, part, key=key).state
    check_names(network.state_dict(), state, f"{key}: {path}")
    network.load_state_dict(state)


def read(path: str | Path, part: str | None = None, which: str = "raw", key: str = KEY) -> Weights:
    """The weights in a file: the UPS's own, flat or under ``operator``; Lightning's; or ours.

    part: the name of the network to take, where the file holds several. which: "raw", or "ema" for the average beside
    the weights in a checkpoint of ours. Raises InputError, as ``plain`` does too.
    """
    content = weights.read(path, key)
    saved = content if isinstance(content, dict) and not weights.is_state(content) else {}
    held = [name for name in _PLACES if isinstance(saved.get(name), Mapping)]
    if part in held:
        held, part = [part], None
    if len(held) > 1:
        raise InputError(f"{key}: {path} holds {' and '.join(held)}: --part says which is meant")
    state = weights.state_in(content, held or _PLACES, path, key)
    if which == "ema":
        if not weights.is_state(saved.get("ema")):
            raise InputError(f"{key}: {path} has no average: --weights raw")
        state |= saved["ema"]
    counters, origin = saved.get("counters", {}), saved.get("origin", saved)
    return Weights(
        plain(state, part, f"{key}: {path}"),
        epoch=int(origin.get("epoch", 0)),
        step=int(saved.get("global_step", counters.get("step", 0))),
        settings=dict(origin.get("hyper_parameters", saved.get("config", {}))),
    )


def system(path: str | Path, key: str = KEY) -> dict[str, Tensor]:
    """The whole system in a stage's checkpoint, by the names of ``PhysicsSystem``, averages in the place of the weights
    that have one; or of any other file the operator that it must hold, as ``operator.…``. InputError."""
    content = weights.read(path, key)
    model = content.get("model") if isinstance(content, dict) else None
    if weights.is_state(model) and any(name.startswith("encoders.") for name in model):
        return {**model, **(content.get("ema") or {})}
    found = read(path, key=key)
    check(found.state, f"{key}: {path}")
    if (network := kind(found.state)) != "operator":
        raise InputError(
            f"{key}: {path} holds a {network}; a stage starts with an operator, or an earlier stage's file"
        )
    return {f"operator.{name}": value for name, value in found.state.items()}


def plain(state: State, part: str | None = None, source: str = KEY) -> dict[str, Tensor]:
    """The state dict without the prefixes of what the network was wrapped in: ``operator.``, ``diffusion.``,
    ``module.`` (of DDP) and ``_orig_mod.`` (of torch.compile) in any order in front, ``_orig_mod.`` inside as well.

    part: only what is of the network of this name. Raises InputError where two names become one, where there is no
    such part, and where operator and diffusion stand side by side and no part is said.
    """
    rests = {name: name for name in state}
    if part:
        beginning = re.compile(rf"{_WRAPPERS}{re.escape(part)}\.")
        rests = {name: name[found.end() :] for name in state if (found := beginning.match(name))}
        if not rests:
            raise InputError(f"{source} has no part {part} to take: it has {', '.join(_tops(state))}")
    elif len(networks := {first for name in state if (first := _network_of(name))}) > 1:
        raise InputError(f"{source} holds {' and '.join(sorted(networks))}: --part says which is meant")
    names: dict[str, str] = {}
    for name, rest in rests.items():
        bare = _INSIDE.sub(".", _LEADING.sub("", rest, count=1))
        if bare in names:
            raise InputError(f"{source}: {names[bare]} and {name} are both {bare}")
        names[bare] = name
    return {bare: state[name] for bare, name in names.items()}


def _network_of(name: str) -> str | None:
    """Which of operator and diffusion a name begins with, wrappers aside."""
    found = re.match(rf"{_WRAPPERS}(operator|diffusion)\.", name)
    return found[1] if found else None


def _tops(state: State) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in state))


# ---- writing ------------------------------------------------------------------------------------------------------


def ours(found: Weights) -> dict[str, Any]:
    """As a checkpoint of ours that has weights alone: ``--init_from`` takes it."""
    from fabric_trainer.state import FORMAT  # with it comes all that a run needs

    return {
        "format": FORMAT,
        "model": found.state,
        "ema": None,
        "counters": asdict(Counters(step=found.step)),
        "origin": {"epoch": found.epoch, "hyper_parameters": found.settings},
        "config": {},
    }


def native(found: Weights) -> dict[str, Any]:
    """As the UPS's own files: the state dict itself."""
    return found.state


def lightning(found: Weights) -> dict[str, Any]:
    """As Lightning's checkpoint of the UPS's module, for ``load_from_checkpoint``; not to resume a fit, for which the
    optimizer's state would be needed."""
    prefix = _KINDS[kind(found.state)][1]
    if prefix is None:
        raise InputError("the UPS has no Lightning module for its steady prior: --to native")
    return {
        "state_dict": {prefix + name: value for name, value in found.state.items()},
        "epoch": found.epoch,
        "global_step": found.step,
        "hyper_parameters": found.settings,
        "hparams_name": "cfg",  # the argument of the UPS's modules that takes them
        "pytorch-lightning_version": "2.0.0",  # the oldest whose layout this is
    }


# ---- what a state dict has to have --------------------------------------------------------------------------------


def check(state: State, source: str = KEY) -> None:
    """That the state dict is all of an operator, residual or prior, as large as its own tensors say: InputError with
    all missing, unexpected and misshapen names."""
    which = kind(state, source)
    build = {"operator": _operator, "residual": _mlp, "prior": _mlp}[which]
    try:
        with torch.device("meta"):
            expected = build(state, source).state_dict()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} is not of this network: {error}") from error
    check_names(expected, dict(state), source)


def kind(state: State, source: str = KEY) -> str:
    """ "operator", "residual" or "prior"."""
    found = [name for name, (start, _) in _KINDS.items() if any(each.startswith(start) for each in state)]
    if len(found) != 1:
        several = f"{' and '.join(found)} at once" if found else "no operator, residual or prior"
        raise InputError(f"{source} is {several}: its names begin with {', '.join(_tops(state))}")
    return found[0]


def _operator(state: State, source: str) -> nn.Module:
    def size(*places: str) -> int:
        return _size(state, source, *places)

    def has(pattern: str) -> bool:
        return bool(fnmatch.filter(state, pattern))

    def count(stem: str) -> int:
        """Entries of a list of modules."""
        numbers = [int(found[1]) for name in state if (found := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))]
        return max(numbers, default=-1) + 1

    dim = size("output_norm.*", "time_to_latent.*", "core.output_proj.*")
    core: dict[str, Any]
    if count("core.layers"):
        architecture, depth, qk_norm = "pdet_stack", count("core.layers"), has("core.layers.*.attn.q_norm.weight")
        hidden = size("core.output_norm.*", "core.layers.*.norm?.*")
        wide = size("core.layers.*.mlp.0.*", "core.layers.*.mlp.3.weight@1")
        core = {"depth": depth, "num_heads": 1, "qk_norm": qk_norm}
        if has("core.layers.*.attn.q_proj.*"):
            core |= {"attention_type": "channel_separated", "group_size": size("core.layers.*.attn.?_proj.*")}
        elif qk_norm:
            core["num_heads"] = hidden // size("core.layers.*.attn.?_norm.weight")
    else:
        levels = [count(f"core.down_layers.{i}.0") for i in range(count("core.down_layers"))]
        architecture, depths = "pdet_unet", (*levels, count("core.bottleneck"))
        hidden = size("core.final_norm.*", "core.input_proj.*", "core.*.attn_norm.*")
        wide = size("core.*.ff.net.1.*", "core.*.ff.net.4.weight@1")
        core = {"depths": depths, "group_size": size("core.*.attn.?_proj.*"), "num_heads": 1}
    core |= {"hidden_dim": hidden, "mlp_ratio": (wide + 0.5) / hidden}  # of which int() makes wide again
    names = sorted({name.split(".")[2] for name in state if name.startswith("conditioner.embedders.")})
    sources = {name: _width(state, source, f"conditioner.embedders.{name}.0.weight") for name in names}
    heard = size("conditioner.embedders.*.0.*", "conditioner.embedders.*.2.weight@1") if names else 1
    return LatentOperator(dim, architecture, core, sources=sources, source_hidden=heard)


def _mlp(state: State, source: str) -> nn.Module:
    stem = "network" if kind(state, source) == "residual" else "drift"
    dim, hidden = _size(state, source, f"{stem}.4.*"), _size(state, source, f"{stem}.[02].*")
    cond = max(_width(state, source, f"{stem}.0.weight") - dim - 1, 0)
    return DiffusionResidual(dim, hidden, cond) if stem == "network" else SteadyPrior(dim, hidden, cond=cond)


def _size(state: State, source: str, *patterns: str) -> int:
    """The first dimension, or with @1 the second, that most of the tensors of these names have: one that is wrong is
    then among the misshapen."""
    sizes = []
    for pattern in patterns:
        names, _, axis = pattern.partition("@")
        shapes = [state[name].shape for name in fnmatch.filter(state, names)]
        sizes += [shape[int(axis or 0)] for shape in shapes if len(shape) > int(axis or 0)]
    if not sizes:
        raise InputError(f"{source} is not of this network: missing: {', '.join(patterns)}")
    return Counter(sizes).most_common(1)[0][0]


def _width(state: State, source: str, name: str) -> int:
    """The second dimension of a matrix."""
    if name not in state:
        raise InputError(f"{source} is not of this network: missing: {name}")
    return state[name].shape[-1] if state[name].ndim > 1 else 1
