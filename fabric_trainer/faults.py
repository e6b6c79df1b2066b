"""What can go wrong at an update, decided by all ranks alike: bad gradients and requests to stop."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_trainer.config import FaultsConfig
from fabric_trainer.errors import INTERRUPTED, TRY_AGAIN, BadGradientError
from fabric_trainer.ranks import data_parallel
from fabric_trainer.several import kernels
from fabric_trainer.spikes import RunningNorm

MOST_HALVINGS = 16


class Agreement(NamedTuple):
    """What all ranks know of a window before its first forward."""

    weight: float = 0.0  # of the whole window, over all ranks
    stop: int = 0  # or the exit code with which to leave after this update
    minutes: float = 0.0  # of training, by rank 0's clock
    halvings: int = 0  # of the micro-batch, so far, on the rank that needed most
    uncompiled: bool = False  # a rank's compiler has failed


class Agree(AbstractContextManager["Agree"]):
    """One small all-reduce per window, on the host: no device waits for it, and none is made for a single process.

    ``ask`` for a window while the one before is computed, ``answer`` when it is its turn: by then it is there. What
    one rank wants (to stop, smaller micro-batches) holds for all from the window on with which it was sent.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.is_zero, self.speaks = fabric.is_global_zero, data_parallel(fabric).speaks
        self.group: torch.distributed.ProcessGroup | None = None
        if fabric.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")  # type: ignore[assignment]
        self._own = Agreement()
        self._numbers = torch.zeros(5 + MOST_HALVINGS, dtype=torch.float64)
        self._work: Any = None

    def ask(
        self, weight: float, stop: int = 0, minutes: float = 0.0, halvings: int = 0, uncompiled: bool = False
    ) -> None:
        """Send this rank's part; the weight of the window that comes next."""
        self._own = Agreement(weight, stop, minutes, halvings, uncompiled)
        if self.group is None:
            return
        own, clock = weight if self.speaks else 0.0, minutes if self.is_zero else 0.0
        most = [halvings == count for count in range(1, MOST_HALVINGS + 1)]  # the largest, by a sum
        numbers = [own, stop == INTERRUPTED, stop == TRY_AGAIN, clock, uncompiled, *most]
        self._numbers = torch.tensor(numbers, dtype=torch.float64)
        self._work = torch.distributed.all_reduce(self._numbers, group=self.group, async_op=True)

    def answer(self, stop: int = 0) -> Agreement:
        """What all ranks know of that window now. stop: a single process can still change its mind."""
        if self.group is None:
            return self._own._replace(stop=stop) if stop else self._own
        self._work.wait()
        weight, interrupted, try_again, minutes, uncompiled, *counts = self._numbers.tolist()
        halvings = max((count for count, ranks in enumerate(counts, 1) if ranks), default=0)
        stop = INTERRUPTED if interrupted else TRY_AGAIN if try_again else 0
        return Agreement(weight, stop, minutes, halvings, uncompiled > 0)

    def __call__(self, weight: float) -> Agreement:
        """Ask and wait: for loops that prepare nothing ahead."""
        self.ask(weight)
        return self.answer()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the group back; after an error nobody may be there to wait for."""
        if self.group is not None and kind is None:
            if self._work is not None:
                self._work.wait()
            torch.distributed.destroy_process_group(self.group)


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a request, ``stop``, that the loop honours after the update.

    The handler only sets a number: saving inside a handler can meet a half-done update or a collective. A second
    SIGINT leaves at once. Outside the main thread there are no handlers, and nothing is caught.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.warned = False  # by SIGUSR1: the job's time runs out
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop == INTERRUPTED:
            os._exit(INTERRUPTED)
        if self.stop != INTERRUPTED:  # a person's wish outranks the scheduler's
            self.stop = INTERRUPTED if number == signal.SIGINT else TRY_AGAIN
        self.warned |= number == signal.SIGUSR1
        name = signal.Signals(number).name
        sys.stderr.write(f"{name}: finishing this update, saving, and leaving with code {self.stop}\n")


class Verdict(NamedTuple):
    """What became of an update."""

    applied: bool
    # only read where the update was left out
    norm: float = math.nan
    limit: float = math.nan  # of a spike


class Guard:
    """Steps the optimizer unless the gradient is not finite, or a spike: then weights, moments and statistics stay as
    they are.

    Where the optimizer's fused kernel takes the flag as a tensor (``found_inf``), the decision stays on the device:
    the host learns of it in ``settle``, called just before the next step, when the device has long been there.
    Elsewhere the norm, already the same on all ranks, is read before the step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        network: nn.Module,
        config: FaultsConfig,
        scaler: Any = None,
        on_device: bool | None = None,
    ) -> None:
        self.optimizer, self.config, self.scaler = optimizer, config, scaler
        self.bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.kernels = kernels(self.bare)
        wanted = self._kernel_takes_flag() if on_device is None else on_device
        self.on_device = wanted and scaler is None and config.nonfinite == "skip"
        # a forward with a NaN in it reaches running statistics before any gradient is known
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.statistics = [buffer for module in norms for buffer in module.buffers()]
        self._before = [buffer.clone() for buffer in self.statistics]
        self.spikes = RunningNorm(config.spike, config.spike_warmup) if config.spike is not None else None
        self.started = False  # every buffer of the optimizer is there
        self._pending: Tensor | bool | None = None
        self.left_out: Tensor | bool = False  # the last step; a tensor where only the device knows
        self._norm: Tensor = torch.zeros(())

    def before_forward(self) -> None:
        """Remember the running statistics; call before the window's first forward."""
        if self.statistics:
            torch._foreach_copy_(self._before, self.statistics)

    def undo_forward(self) -> None:
        """The running statistics as they were ``before_forward``."""
        if self.statistics:
            torch._foreach_copy_(self.statistics, self._before)

    def step(self, norm: Tensor) -> None:
        """Step with the present gradients, whose norm is ``norm``, unless it isn't finite or is a spike. Raises
        BadGradientError where the configuration says so. ``settle`` tells what happened."""
        self._norm = norm
        flag = norm.isfinite().logical_not_()
        if self.spikes is not None:
            flag |= self.spikes.judge(norm)
        self.started = self.started or not self._lacks_momentum()
        if self.on_device and self.started:
            self.left_out = flag
            for kernel in self.kernels:
                kernel.found_inf, kernel.grad_scale = flag.float(), None  # type: ignore[attr-defined]
            self.optimizer.step()
            for buffer, before in zip(self.statistics, self._before, strict=True):
                torch.where(flag, before, buffer, out=buffer)
            self._pending = torch.empty_like(flag, device="cpu", pin_memory=True) if flag.is_cuda else flag
            if flag.is_cuda:
                self._pending.copy_(flag, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
            return
        for kernel in self.kernels:
            kernel.found_inf = None  # type: ignore[attr-defined]  # of an earlier step
        bad = bool(flag)
        spike = bad and math.isfinite(norm.item())
        if bad and not spike and self.config.nonfinite == "raise" and self.scaler is None:
            line = f"the gradient's norm is {norm.item()}; faults.nonfinite: skip would leave the update out"
            raise BadGradientError(line)
        if not bad or (self.scaler is not None and not spike):
            self.optimizer.step()  # a scaler leaves the update out by itself, and must lower its scale
        elif self.scaler is not None:
            self.scaler.update()  # closes the update that unscaling began
        self.conclude(norm, bad)

    def conclude(self, norm: Tensor, bad: bool) -> None:
        """Remember what became of the step; after a bad one the running statistics are those before its forward."""
        if bad:
            self.undo_forward()
        self._norm, self._pending, self.left_out = norm, bad, bad

    def _kernel_takes_flag(self) -> bool:
        """Fused kernels do. On a CPU reading the norm costs less than handing a flag over; on shards none was tried."""
        parameters = [parameter for group in self.bare.param_groups for parameter in group["params"]]
        plain = not any(isinstance(parameter, DTensor) for parameter in parameters)
        return plain and parameters[0].device.type != "cpu" and all(g.get("fused") for g in self.bare.param_groups)

    def _lacks_momentum(self) -> bool:
        """Whether this is SGD's first step with momentum: its fused kernel makes the buffers uninitialised and, where
        the flag refuses the step, leaves them so. Then the host decides."""
        return any(
            parameter.grad is not None and kernel.state.get(parameter, {}).get("momentum_buffer") is None
            for kernel in self.kernels
            if isinstance(kernel, torch.optim.SGD)
            for group in kernel.param_groups
            if group["momentum"]
            for parameter in group["params"]
        )

    @property
    def unsettled(self) -> bool:
        """Whether there was a step that nobody has asked about yet."""
        return self._pending is not None

    def settle(self) -> Verdict | None:
        """What became of the last step, once; None where nothing is open."""
        if self._pending is None:
            return None
        if isinstance(self._pending, Tensor) and self._norm.is_cuda:
            self._copied.synchronize()
        bad, self._pending = bool(self._pending), None
        if not bad:
            return Verdict(True)
        return Verdict(False, self._norm.item(), self.spikes.limit.item() if self.spikes else math.nan)
