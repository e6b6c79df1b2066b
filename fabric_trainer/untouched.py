"""Updates that leave no trace: what a run carries is as it was before them, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fabric_trainer.compile import Compilation
from fabric_trainer.config import CompileConfig
from fabric_trainer.engine import Engine
from fabric_trainer.portable import local
from fabric_trainer.state import State

Undo = Callable[[], None]


@contextmanager
def untouched(state: State) -> Iterator[None]:
    """Inside, updates may be made; afterwards weights, buffers, moments, scaler and random streams are those of before.

    Counters, EMA and history are the caller's to leave alone. Every rank keeps its own pieces, on the host, where they
    take no room from what is tried. Inside, nothing is compiled; a gradient that isn't finite is left out, and none
    for being large, whatever ``faults`` says. An exception goes through with nothing put back: a rank that raises
    can't take part in it.
    """
    engine, guard, memory = state.engine, state.guard, state.memory
    modes = [(module, module.training) for module in state.network.modules()]
    scaler, counts = engine.scaler_state(), engine.own_counts()
    undo = [_weights(engine), _optimizer(engine.bare_optimizer), _random_streams(engine.fabric.device)]
    state.guard, state.memory = engine.make_guard(), copy.copy(memory)
    state.guard.config, state.guard.spikes = replace(guard.config, nonfinite="skip"), None
    compilation = state.compilation  # its trial is still to come
    state.compilation = Compilation(state.fabric, replace(state.config, compile=CompileConfig()))
    with compilation.paused():
        yield
    engine.drop_gradients()
    engine.refresh()  # the network's parameters are the leaves again
    for put_back in undo:
        put_back()
    engine.load_scaler_state(scaler)
    engine.load_own_counts(counts)
    engine.refresh()
    for module, training in modes:
        module.training = training
    state.guard, state.memory, state.compilation = guard, memory, compilation


def _weights(engine: Engine) -> Undo:
    """This rank's pieces of the weights, and the buffers."""
    tensors = [local(leaf) for leaf in (*engine.leaves.values(), *engine.module.buffers())]
    copies = [_on_host(tensor) for tensor in tensors]

    def undo() -> None:
        for tensor, before in zip(tensors, copies, strict=True):
            tensor.copy_(before)

    return undo


def _optimizer(optimizer: Optimizer) -> Undo:
    """What it keeps for each parameter and each group; what it did not keep before is gone again."""
    before = {parameter: _kept(values) for parameter, values in optimizer.state.items()}
    options = [_kept({key: value for key, value in g.items() if key != "params"}) for g in optimizer.param_groups]

    def undo() -> None:
        for parameter in list(optimizer.state):
            if parameter in before:
                _put_back(optimizer.state[parameter], before[parameter])
            else:
                del optimizer.state[parameter]
        for group, kept in zip(optimizer.param_groups, options, strict=True):
            _put_back(group, kept | {"params": group["params"]})

    return undo


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _on_host(local(value)) if isinstance(value, Tensor) else value for key, value in values.items()}


def _put_back(values: dict[str, Any], kept: dict[str, Any]) -> None:
    """Tensors are written into, so that whoever holds them sees it."""
    for key in list(values):
        if key not in kept:
            del values[key]
        elif isinstance(values[key], Tensor):
            local(values[key]).copy_(kept[key])
        else:
            values[key] = kept[key]


def _random_streams(device: torch.device) -> Undo:
    python, numbers, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    mps = torch.mps.get_rng_state() if device.type == "mps" else None

    def undo() -> None:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return undo


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
