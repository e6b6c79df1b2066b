"""Weights from a file, or as a library publishes them, into a network of possibly other classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fabric_trainer.errors import InputError
from models import weights

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

KEY = "task.args.pretrained"
# where training programs keep the weights in a checkpoint: timm's averages first, as timm itself prefers them
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model")
# what wrappers put before every name: DDP, torch.compile, a LightningModule that holds its network as ``model``
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# densenets of old torchvision: denselayer1.norm.1.weight
_OLD_DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def load_weights(
    network: nn.Module, source: str | WeightsEnum, heads: Sequence[str], tell: Callable[[str], None]
) -> None:
    """Load them in place, strict but for the head.

    source: a path, or an entry of torchvision's. heads: the modules that give the classes; a tensor of theirs whose
    shape differs, for another number of classes, stays as it was drawn, and ``tell`` gets a line that names it.
    Raises InputError with all missing, unexpected and misshapen names otherwise.
    """
    state = read(source) if isinstance(source, str) else _fetched(source)
    own = network.state_dict()
    misshapen = [name for name, value in state.items() if name in own and own[name].shape != value.shape]
    skipped = [name for name in misshapen if any(name.startswith(head + ".") for head in heads)]
    shapes = {name: f"{name} {_shape(state[name])} instead of {_shape(own[name])}" for name in misshapen}
    wrong = [shapes[name] for name in misshapen if name not in skipped]
    # by the network's own rules, which know older names; what is misshapen would raise
    names = network.load_state_dict({k: v for k, v in state.items() if k not in misshapen}, strict=False)
    missing = [name for name in names.missing_keys if name not in misshapen]
    lists = {"missing": missing, "unexpected": names.unexpected_keys, "misshapen": wrong}
    if any(lists.values()):
        told = "; ".join(f"{kind} {', '.join(each)}" for kind, each in lists.items() if each)
        raise InputError(f"{KEY}: {source} is not of this network: {told}")
    for name in skipped:
        tell(f"{KEY}: {shapes[name]}: skipped, it starts anew")


def read(path: str) -> dict[str, Tensor]:
    """The state dict in a file: bare; ours, timm's or Lightning's checkpoint; or .safetensors. Raises InputError for
    anything else."""
    state = weights.state_in(weights.read(path, KEY), _PLACES, path, KEY)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return _renamed(state)


def _fetched(source: WeightsEnum) -> dict[str, Tensor]:
    try:
        return _renamed(source.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no connection, or not what was published
        raise InputError(f"{KEY}: {source} can't be fetched, give the path of a file: {error}") from error


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_OLD_DENSE.sub(r"\1\2", name): value for name, value in state.items()}


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "0-d"
