"""The optimizer's state keyed by parameter name: plain, and independent of groups' order and of wrappers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_trainer.errors import InputError


def optimizer_state(optimizer: Optimizer, network: nn.Module) -> dict[str, Any]:
    """{"state": {parameter name: {"step": …, "exp_avg": …}}, "groups": [{"params": [names], "lr": …}]}.

    network: the bare module, whose names are used. Tensors are the live ones: copy before the next step.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        | {"params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[id(parameter)]: dict(values) for parameter, values in optimizer.state.items()}
    return {"state": state, "groups": groups}


def load_optimizer_state(optimizer: Optimizer, network: nn.Module, saved: dict[str, Any]) -> None:
    """Take over the moments by name; the groups' options (learning rate, betas, …) stay those of the configuration.

    Raises InputError, naming them, where the saved parameters are not the optimizer's.
    """
    parameters = dict(network.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    own = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sorted(set(saved["state"]) - set(own))
    if foreign:
        raise InputError(f"the checkpoint's optimizer has state for {_some(foreign)}, which this one doesn't train")
    on_device = {
        names[id(parameter)]: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    optimizer.state.clear()
    for name, values in saved["state"].items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: _placed(value, parameter, key != "step" or on_device[name]) for key, value in values.items()
        }


def load_network_state(network: nn.Module, saved: dict[str, Tensor], source: str) -> None:
    """``load_state_dict``, strict, with one line that lists missing, unexpected and misshapen names (InputError)."""
    own = network.state_dict()
    problems = {
        "missing": sorted(set(own) - set(saved)),
        "unexpected": sorted(set(saved) - set(own)),
        "misshapen": [
            f"{name} {tuple(saved[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in saved and saved[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{source} is not of this network: {'; '.join(found)}")
    network.load_state_dict(saved)


def _placed(value: Any, parameter: Tensor, on_device: bool) -> Any:
    """A copy where the optimizer would keep it: torch's step counters stay on the host unless its kernel reads them."""
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device, copy=True) if on_device else value.clone()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else value
    return list(value) if isinstance(value, tuple) else value


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
