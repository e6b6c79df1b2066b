"""torch.compile of the network or of its blocks; back to eager, all ranks together, where a compiler fails.

What is compiled is a module's ``forward``, in place. So a checkpoint's names stay the network's own, activation
checkpointing lies inside the graph, and the hooks of DDP, FSDP2 and DeepSpeed lie around it, as do the collectives: a
rank whose compiler fails does the same forward in eager, and no other rank waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, InvalidBackend, TorchDynamoException
from torch._dynamo.utils import counters

from fabric_trainer.blocks import find_blocks, unbound
from fabric_trainer.config import CompileConfig, Config
from fabric_trainer.errors import CompileError, InputError
from fabric_trainer.ranks import data_parallel
from fabric_trainer.task import Task

COMPILER_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)


class Compilation:
    """What of a network is compiled, and what all ranks do about a compiler that fails.

    failure: why this rank's has, in a line, until all ranks know. failed: whether any rank's has, by what the ranks
    told each other before the window under way. The first window is a trial: its gradients count only where every
    compiler did its work, else all ranks do it again in eager, as if nothing had been compiled. What fails later runs
    in eager on its rank, and from the next window on everything does, on all ranks.
    """

    def __init__(self, fabric: Fabric, config: Config) -> None:
        self.fabric, self.config = fabric, config.compile
        self.recomputed = config.fabric.activation_checkpointing
        self.active = self.on_trial = self.config.scope != "none"
        # ranks that share layers meet inside the forward: only in the trial may one of them do it another way
        self.separable = data_parallel(fabric).size == fabric.world_size
        self.failure: str | None = None
        self.failed = False
        self.fell_back = False  # after the first window: what a resume has to know
        self.before: Snapshot | None = None  # the trial
        self.graphs: dict[str, int] = {}  # class of a module that was called -> the most graphs that one call made
        self._compiled = cache(self._compile)
        if self.active:
            check_backend(self.config.backend)
            # the backward is compiled with the forward, or a rank could fail between two collectives
            torch._functorch.config.force_non_lazy_backward_lowering = True
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise eager, with nothing said to us

    def compile(self, task: Task, network: nn.Module) -> None:
        """The forwards of a bare network, in place. Raises InputError."""
        self.network = network
        if self.config.scope == "none":
            return
        _check_recomputed(network, self.recomputed)
        for module in _chosen(task, network, self.config):
            module.forward = Compiled(module, self._compiled(unbound(module)), self)

    def _compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(module, *args, **kwargs)

        # torch counts graphs by code object, and leaves alone what lies in its own files
        compiled.__code__ = compiled.__code__.replace(co_name=forward.__name__)
        config = self.config
        mode = config.mode if config.mode != "default" else None
        return torch.compile(
            compiled, backend=config.backend, mode=mode, dynamic=config.dynamic, fullgraph=config.fullgraph
        )

    def fails(self, error: Exception) -> None:
        """This rank's compiler has. Raises CompileError where the ranks could not go on."""
        self.failure = cause(error)
        if not self.on_trial and not self.separable:
            raise CompileError(
                f"compile: the compiler failed, and ranks that share layers have no way back: {self.failure}"
            )

    @property
    def compiles(self) -> bool:
        """Whether forwards on this rank are compiled ones now."""
        return self.active and self.failure is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Everything in eager inside: a graph does not see hooks that come and go."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def begin(self, tell: Callable[[str], None]) -> None:
        """Before a window's first forward, on all ranks: to eager, where a compiler has failed since the trial.
        ``tell`` prints a line, once."""
        if self.on_trial:
            self.before = Snapshot(self.network, self.fabric.device)
        elif self.failed:
            self.fell_back, self.failed = self.retreat(tell), False

    def holds(self, tell: Callable[[str], None]) -> bool:
        """After a window's backward, on all ranks: whether its gradients count."""
        if not self.on_trial:
            return True
        idle = [name for name, graphs in self.graphs.items() if graphs == 0]
        if self.failure is None and (idle or not self.graphs):
            self.failure = f"no graph was made of {', '.join(idle) or 'any forward'}"
        fails = self.retreat(tell)
        if fails and self.before is not None:
            self.before.restore()
        self.on_trial, self.before = False, None
        return not fails

    def retreat(self, tell: Callable[[str], None]) -> bool:
        """To eager if any rank's compiler has failed, on all ranks. Raises CompileError where that is not allowed."""
        if not self.active:
            return False
        causes: list[Any] = [self.failure]
        if self.fabric.world_size > 1:
            causes = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(causes, self.failure)
        found = [(rank, cause) for rank, cause in enumerate(causes) if cause is not None]
        if not found:
            return False
        (rank, cause), ranks = found[0], f"{len(found)} of {len(causes)} ranks" if len(found) > 1 else ""
        where = f" on {ranks or f'rank {rank}'}" if len(causes) > 1 else ""
        if self.config.require:
            raise CompileError(f"compile.require: the compiler failed{where}: {cause}")
        self.active, self.failure = False, None
        torch.compiler.reset()
        tell(f"compile: the compiler failed{where}, everything runs in eager from here on: {cause}")
        return True

    def state_dict(self) -> dict[str, Any]:
        """All ranks together, where the network is compiled."""
        fell_back = self.fell_back
        if self.active and not self.on_trial:  # what has failed since the last window's agreement
            failed = torch.tensor(float(self.failure is not None), device=self.fabric.device)
            fell_back = bool(self.fabric.all_reduce(failed, reduce_op="sum"))
        return {"fell_back": fell_back, "config": asdict(self.config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that fell back goes on in eager, as it would have without the stop, unless ``compile`` was changed."""
        if self.active and state.get("fell_back") and state["config"] == asdict(self.config):
            self.active = self.on_trial = False
            self.fell_back = True

    def describe(self) -> str:
        """For the start-up summary."""
        config = self.config
        if config.scope == "none":
            return "none"
        if not self.active:
            return f"{config.scope}, but the run has gone back to eager"
        shapes = {None: "dynamic where shapes change", True: "dynamic", False: "one graph a shape"}[config.dynamic]
        return f"{config.scope}, {config.backend}, mode {config.mode}, {shapes}"


class Compiled:
    """A module's forward, compiled; in eager for a call in which the compiler fails, and after.

    Only the compiler's errors are met: what a network raises by itself comes out of the eager forward, unchanged.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], compilation: Compilation) -> None:
        self.module, self.eager, self.compiled, self.compilation = module, module.forward, compiled, compilation
        self.name = type(module).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compilation = self.compilation
        if not compilation.compiles:
            return self.eager(*args, **kwargs)
        most = compilation.graphs.get(self.name, 0)
        # the compiler of a forward in pieces may fail when some of them have run; that of one graph fails before
        before = Snapshot(self.module, compilation.fabric.device) if compilation.on_trial or most > 1 else None
        graphs = counters["stats"]["unique_graphs"]
        try:
            return self.compiled(self.module, *args, **kwargs)
        except COMPILER_ERRORS as error:
            compilation.fails(error)
        finally:
            compilation.graphs[self.name] = max(most, counters["stats"]["unique_graphs"] - graphs)
        if before is not None:
            before.restore()
        return self.eager(*args, **kwargs)


class Snapshot:
    """What a forward changes beside its output: buffers, and the states of the random generators."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        owners = [part._buffers for part in module.modules()]
        named = [(own, name, value) for own in owners for name, value in own.items() if value is not None]
        self.buffers = [(*place, place[-1].clone()) for place in named]
        self.random = [torch, *([torch.get_device_module(device)] if device.type != "cpu" else [])]
        self.states = [place.get_rng_state() for place in self.random]

    @torch.no_grad()
    def restore(self) -> None:
        for own, name, buffer, value in self.buffers:
            own[name] = buffer.copy_(value)  # a forward may have put another tensor there
        for place, state in zip(self.random, self.states, strict=True):
            place.set_rng_state(state)


def check_backend(name: str) -> None:
    """Raise InputError where torch knows no such backend."""
    try:
        torch._dynamo.lookup_backend(name)
    except InvalidBackend:
        known = ", ".join(torch._dynamo.list_backends())
        raise InputError(f"compile.backend: torch has no {name}; it has {known}") from None


def cause(error: BaseException) -> str:
    """The compiler's error in one line."""
    if isinstance(error, FailOnRecompileLimitHit):
        limit = torch._dynamo.config.recompile_limit
        return (
            f"more than {limit} graphs of one forward (torch._dynamo.config.recompile_limit); compile.dynamic: true "
            "makes one for all shapes"
        )
    inner = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    lines = str(inner).strip().splitlines() or [""]
    return f"{type(inner).__name__}: {lines[0]}"


def _check_recomputed(network: nn.Module, classes: list[str]) -> None:
    """Raise InputError for blocks whose statistics a graph that computes them twice can't move."""
    for block in find_blocks(network, classes, "fabric.activation_checkpointing"):
        for part in block.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
                name, kind = type(block).__name__, type(part).__name__
                raise InputError(
                    f"fabric.activation_checkpointing: {name} has a {kind}, whose running statistics a compiled graph "
                    "can't recompute; leave it out, or compile.scope none"
                )


def _chosen(task: Task, network: nn.Module, config: CompileConfig) -> Iterable[nn.Module]:
    """The network, or its outermost blocks: what lies inside a block is part of its graph."""
    if config.scope == "whole":
        return [network]
    wanted = config.blocks
    blocks = list(task.blocks(network) if wanted is None else find_blocks(network, wanted, "compile.blocks"))
    if not blocks:
        raise InputError(
            f"compile.scope: {type(task).__name__} names no blocks; give their classes in compile.blocks, or whole"
        )
    inner = {id(module) for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if id(block) not in inner]
