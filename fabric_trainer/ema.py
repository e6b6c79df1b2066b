"""Moving averages of the weights: exponential ones, and the power-function ones of EDM2 (``power``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fabric_trainer import power as power_function
from fabric_trainer.portable import Leaf, fill, like, local

Decay = Callable[[int], float]
"""What an average keeps at its n-th update, from 1; the rest is the new weights'."""


class EMA:
    """Averages the network's parameters: average += (1 - decay) * (parameter - average), after each applied update.

    decay: such as 0.999, or several. warmup: use min(decay, (1 + n) / (10 + n)) at the n-th update, which forgets the
    first weights quickly. power: relative widths of power-function averages, such as 0.1. The first of all is the main
    one; each goes by its label, ``"0.999"`` or ``"power_0.1"``. start: updates before which an average is the weights.
    buffers: average the running statistics of BatchNorm too; else the network's own go with the average. Averages of
    half-precision tensors are kept in float32, where small changes don't round away.

    leaves: where a strategy keeps each parameter, by default in the network; refresh: what makes the network's
    forward see what was written there (``Engine`` has both). No update needs another rank.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float | Sequence[float] = (),
        warmup: bool = True,
        leaves: Mapping[str, Leaf] | None = None,
        refresh: Callable[[], None] = lambda: None,
        power: Sequence[float] = (),
        start: int = 0,
        buffers: bool = False,
    ) -> None:
        self.network, self.refresh, self.start = network, refresh, start
        decays = [decay] if isinstance(decay, (int, float)) else decay
        self.widths = {f"power_{width}": width for width in power}
        self.decays: dict[str, Decay] = {str(float(value)): partial(exponential, value, warmup) for value in decays}
        for label, width in self.widths.items():
            self.decays[label] = partial(power_function.decay_at, power_function.exponent(width))
        self.main, *self.further = self.decays
        self.starts = dict.fromkeys(self.decays, start)  # the step after which each began
        self._buffers = _running_statistics(network) if buffers else {}
        parameters: dict[str, Leaf] = dict(network.named_parameters() if leaves is None else leaves)
        averaged = parameters | {name: getattr(*place) for name, place in self._buffers.items()}
        self.averages = {
            label: {name: like(leaf, _wide(leaf.dtype)) for name, leaf in averaged.items()} for label in self.decays
        }
        # the pieces that lie on this rank, in place
        self._own = [local(leaf) for leaf in parameters.values()]
        self._held: list[Tensor] = []
        self._averages = {label: [local(leaf) for leaf in own.values()] for label, own in self.averages.items()}

    def decay_at(self, step: int, label: str | None = None) -> float:
        """The decay of the update that made the step counter ``step`` (so 1 for the first)."""
        label = label or self.main
        updates = step - self.starts[label]
        return self.decays[label](updates) if updates > 0 else 0.0

    def hold(self) -> None:
        """Keep running statistics as they are now for the next ``update``: where that comes later, as in the loop, the
        forward of another window has moved them by then."""
        self._held = [tensor.clone() for tensor in self._statistics()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's present weights: one pass for each average."""
        held, self._held = self._held or self._statistics(), []
        weights = [tensor.to(_wide(tensor.dtype)) for tensor in self._own + held]
        for label, averages in self._averages.items():
            torch._foreach_lerp_(averages, weights, 1 - self.decay_at(step, label))

    @contextmanager
    def applied(self, label: str | None = None) -> Iterator[None]:
        """The network has the averaged weights inside, and its own again afterwards, whatever happens."""
        live = self._live()
        own = [tensor.clone() for tensor in live]
        try:
            torch._foreach_copy_(live, self._averages[label or self.main])
            self.refresh()
            yield
        finally:
            torch._foreach_copy_(live, own)
            self.refresh()

    # ---- state ----------------------------------------------------------------------------------------------------

    def state_dict(self, label: str | None = None) -> dict[str, Any]:
        """The network's state dict, by the network's own names, with the averages in place of what is averaged."""
        return self.network.state_dict() | self.averaged(label)

    def averaged(self, label: str | None = None) -> dict[str, Leaf]:
        """The averages alone; tied weights have one and several names."""
        averages = self.averages[label or self.main]
        places = {id(parameter): averages[name] for name, parameter in self.network.named_parameters()}
        tied = self.network.named_parameters(remove_duplicate=False)
        return {name: places[id(parameter)] for name, parameter in tied} | {
            name: averages[name] for name in self._buffers
        }

    def load_state_dict(
        self, state: Mapping[str, Tensor], fetch: Callable[[Tensor], Tensor] = lambda t: t, label: str | None = None
    ) -> None:
        """``fetch`` brings a tensor to this rank. Raises KeyError where an average is missing."""
        fill([(average, state[name]) for name, average in self.averages[label or self.main].items()], fetch)

    def take_over(self, saved: Mapping[str, Any], step: int, fetch: Callable[[Tensor], Tensor]) -> list[str]:
        """Continue at ``step`` with those averages of a checkpoint that go by the same labels; the others start at the
        weights of now. Returns their labels."""
        found = saved_averages(saved)
        for label, averages in self._averages.items():
            if label in found:
                state, start = found[label]
                self.load_state_dict(state, fetch, label)
            else:
                torch._foreach_copy_(averages, self._live())
                start = step
            self.starts[label] = start if start < step else max(step, self.start)
        return [label for label in self.decays if label not in found]

    def _live(self) -> list[Tensor]:
        """What is averaged, in the network: this rank's pieces."""
        return self._own + self._statistics()

    def _statistics(self) -> list[Tensor]:
        """Looked up, because a module may put another tensor in the place of one."""
        return [getattr(*place) for place in self._buffers.values()]


def exponential(decay: float, warmup: bool, n: int) -> float:
    """What an average keeps at its n-th update."""
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


def saved_averages(saved: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Tensor], int]]:
    """Label -> (state dict, the step it began after) of a checkpoint's averages, the main one first."""
    if not saved.get("ema"):
        return {}
    # before there could be several there was one, of the run's decay
    starts = saved.get("states", {}).get("ema") or {str(saved["config"]["ema"]["decay"]): 0}
    states = {next(iter(starts)): saved["ema"], **saved.get("averages", {})}
    return {label: (states[label], start) for label, start in starts.items()}


def _running_statistics(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (module, attribute) of what BatchNorm and its like keep. Other buffers are constants, or counters."""
    return {
        name: (network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, _ in network.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
