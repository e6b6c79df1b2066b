"""Everything a run carries from update to update, and what of it goes into a checkpoint."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.seed import seed_everything
from torch import Tensor, nn
from torch.utils.data import Dataset

from fabric_trainer import portable, schedule
from fabric_trainer.batch import micro_batch_size, rescaled, resolve_accumulate, with_micro_batches
from fabric_trainer.checkpoint import Snapshot, take_part
from fabric_trainer.checks import check
from fabric_trainer.compile import Compilation
from fabric_trainer.config import Config, EmaConfig, FsdpConfig
from fabric_trainer.counters import Counters, EpochSums
from fabric_trainer.duration import seconds
from fabric_trainer.early_stopping import EarlyStopping
from fabric_trainer.ema import EMA
from fabric_trainer.engine import Engine, make_engine
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split
from fabric_trainer.freeze import Freezer
from fabric_trainer.fsdp import check_resettable
from fabric_trainer.history import History
from fabric_trainer.lookahead import Lookahead
from fabric_trainer.memory import Memory
from fabric_trainer.order import Accumulate, First, Order
from fabric_trainer.portable import fetch, load_group_state, optimizer_groups
from fabric_trainer.profiler import Profiler
from fabric_trainer.ranks import data_parallel
from fabric_trainer.sam import Sam
from fabric_trainer.sharded import SHARDS, Shards
from fabric_trainer.summary import layers, module_table
from fabric_trainer.task import Task

FORMAT = 1


class State:
    """A run between two updates: network, optimizer, EMA, order and counters.

    module is the bare network, network what Fabric made of it. saved: a checkpoint to continue from; given: whether
    the command itself sets a ``batch.*`` key.
    """

    def __init__(
        self, fabric: Fabric, task: Task, config: Config, saved: dict[str, Any] | None = None, given: bool = False
    ) -> None:
        check(config)  # of whoever made it without the command line
        if config.run.deterministic and not torch.are_deterministic_algorithms_enabled():
            raise InputError("run.deterministic: call fabric_trainer.random.make_deterministic() before this")
        self.fabric, self.task, self.config = fabric, task, config
        self.ranks = data_parallel(fabric)
        self.train_set = _require(task, "train")
        self.val_set = task.dataset("val") if config.run.overfit_batches is None else self.train_set
        self._splits: dict[str, Split] = {}
        self.accumulate: Accumulate = (
            rescaled(saved["batch"], config.batch, self.ranks.size, given)
            if saved
            else resolve_accumulate(config.batch, self.ranks.size)
        )
        self.order = self._order()
        self.steps = self._length()
        try:
            self.share = schedule.share(config.schedule, self.steps)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.plateau = schedule.Plateau(config.schedule, config.checkpoint.mode)
        stopping = config.early_stopping
        if stopping.patience is not None and self.val_set is None:
            raise InputError(f"early_stopping.patience needs evaluations: {type(task).__name__} has no val split")
        self.early_stopping = EarlyStopping(stopping, stopping.mode or config.checkpoint.mode)
        self.most_minutes = math.inf if config.run.max_time is None else seconds(str(config.run.max_time)) / 60
        self.time_is_up = False

        seed_everything(config.seed, verbose=False)
        network = build_network(task, config.fabric.fsdp)
        self.freezer = Freezer(network, config.freeze, task.units(network), config.optim.lr)
        if saved:
            self.freezer.load_state_dict(saved["states"].get("freeze"), saved["counters"]["step"])
        self.freezer.apply(network)
        # now: a strategy may leave this rank's pieces in it
        self.modules, self.layers = module_table(network), layers(network)
        self.compilation = Compilation(fabric, config)
        self._set_up(network)
        oom = config.faults.oom
        answer = ("split" if fabric.world_size == 1 else "restart") if oom == "auto" else oom
        self.memory = Memory(self.order.micro_batch_size, answer)

        self.counters, self.epoch, self.history = Counters(), EpochSums(), History()
        self.open: Any = None  # the update that the guard has not been asked about yet
        self.owes_evaluation = False  # a stop came between an update and the evaluation that was due after it
        self.restored: dict[str, float] = {}  # the metrics of the best weights, once they were put back
        self.profiler = Profiler()
        self.stopped = 0  # the exit code that a stop request asked for
        self._since = time.perf_counter()
        if saved:
            self.load_state_dict(saved)

    def _set_up(self, network: nn.Module) -> None:
        """What holds the network's tensors."""
        config = self.config
        engine = make_engine(self.fabric, self.task, network, config, self.freezer, self.compilation, self.accumulate)
        self.engine, self.guard = engine, engine.make_guard()
        self.peaks = [group["lr"] for group in engine.bare_optimizer.param_groups]
        self.ema = make_ema(engine, config.ema) if config.ema.kept else None
        self.sam = Sam(engine.trainable, self.guard.statistics, config.optim.sam) if config.optim.sam else None
        self.lookahead: Lookahead | None = None
        if config.optim.lookahead:
            trained = {name: engine.leaves[name] for group in engine.names for name in group}
            self.lookahead = Lookahead(trained, config.optim.lookahead)

    def refreeze(self) -> None:
        """Freeze and unfreeze what the freezer says now; all ranks together, between two updates. Weights, averages
        and the moments of all others stay as they are."""
        self.guard.started = False  # the optimizer has no moments yet for what is unfrozen
        if not self.engine.refreeze():
            saved = portable.shared(self.fabric, self._gathered())
            self.engine.close()
            with torch.random.fork_rng():
                network = build_network(self.task, self.config.fabric.fsdp)
            self._set_up(network)
            self.load_tensors(saved)
            self.train()
            _collect()

    def _gathered(self) -> Callable[[], dict[str, Any]]:
        """The state as rank 0 would save it; all ranks together."""
        tree = self.state_dict()
        if self.fabric.is_global_zero:
            whole = Snapshot().take(tree)
            return lambda: whole
        take_part(tree)
        return dict

    @property
    def module(self) -> nn.Module:
        """The bare network."""
        return self.engine.module

    @property
    def network(self) -> Any:
        """What Fabric made of it."""
        return self.engine.network

    def train(self) -> None:
        """Training mode, but for the statistics of what is frozen."""
        self.network.train()
        self.freezer.set_modes(self.module)

    def _order(self) -> Order:
        run, ranks = self.config.run, self.ranks
        plan = self.task.plan(self.train_set, self.config.seed)
        cut = (micro_batch_size(self.config.batch), self.accumulate, ranks.size, ranks.rank)
        if run.overfit_batches is not None:
            plan = First(plan, Order(plan, *cut, limit=run.overfit_batches).length(0))
        return Order(plan, *cut, limit=run.limit_train_batches)

    def _length(self) -> int:
        """The updates of the whole run, if none is skipped: what the schedules span."""
        run = self.config.run
        limits = [run.max_steps] if run.max_steps is not None else []
        if run.max_epochs is not None:
            limits.append(self.order.first_window(run.max_epochs))
        return min(limits)

    @property
    def windows(self) -> int:
        """How many the run may have: as many as its epochs, or, where only updates are counted, without bound."""
        run = self.config.run
        return sys.maxsize if run.max_epochs is None else self.order.first_window(run.max_epochs)

    # ---- where the run is ---------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, or its time is up. Only true of a settled state."""
        return self.time_is_up or self.complete

    @property
    def complete(self) -> bool:
        """Whether the last epoch or the last step is done, or early stopping has ended the run."""
        run, counters = self.config.run, self.counters
        if run.max_steps is not None and counters.step >= run.max_steps:
            return True
        if run.max_epochs is not None and counters.window >= self.order.first_window(run.max_epochs):
            return True
        return self.early_stopping.over

    def split(self, name: str) -> Split:
        """The evaluation batches of a split, made once. Raises InputError where the task has none."""
        if name not in self._splits:
            config, dataset = self.config, self.val_set if name == "val" else self.task.dataset(name)
            if dataset is None:
                raise InputError(f"{type(self.task).__name__} has no {name} split")
            size = config.evaluate.micro_batch_size or self.order.micro_batch_size
            workers, limit = config.data.num_workers, config.run.limit_val_batches
            plan = self.order.plan if name == "val" and config.run.overfit_batches is not None else None
            self._splits[name] = Split(self.fabric, self.task, dataset, size, config.seed, workers, limit, plan)
        return self._splits[name]

    def tick(self) -> float:
        """Bring the training time up to date; returns it in minutes."""
        now = time.perf_counter()
        self.counters.seconds += now - self._since
        self._since = now
        return self.counters.seconds / 60

    def set_learning_rate(self) -> dict[str, float]:
        """Set every group's rate for the next update; returns ``lr/<group>`` -> rate."""
        share = self.share(self.counters.step) * self.plateau.share
        rates = dict.fromkeys(("lr/" + name for name in self.engine.group_names), 0.0)
        for group, peak in zip(self.engine.bare_optimizer.param_groups, self.peaks, strict=True):
            rates["lr/" + group["name"]] = group["lr"] = peak * share * self.freezer.share(group.get("unit"))
        return rates

    def leave_open(self, update: Any) -> None:
        """Whether the update is applied is asked when the next one's forward is under way (``loop.settle``)."""
        self.open = update
        if self.ema:
            self.ema.hold()

    def set_micro_batch_size(self, size: int) -> None:
        """The same updates of micro-batches of another size, from the next window on."""
        batch = self.config.batch = with_micro_batches(self.config.batch, self.ranks.size, size)
        self.accumulate = resolve_accumulate(batch, self.ranks.size)
        self.order = self._order()
        self.memory = Memory(self.order.micro_batch_size, self.memory.answer, self.memory.folder)

    # ---- checkpoint ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Leaves, numbers, strings, lists and dicts; the leaves (``portable``) are the live ones."""
        batch = {"micro_batch_size": self.order.micro_batch_size, "accumulate": self.accumulate}
        return {
            "format": FORMAT,
            "model": self.engine.weights(),
            "ema": self.ema.state_dict() if self.ema else None,
            "averages": {label: self.ema.state_dict(label) for label in self.ema.further} if self.ema else {},
            "optimizer": {
                "state": self.engine.moments(),
                "groups": optimizer_groups(self.engine.bare_optimizer, self.engine.names),
                "slow": self.lookahead.slow if self.lookahead else {},
            },
            "counters": asdict(self.counters),
            "batch": batch | {"world_size": self.ranks.size, "epoch_samples": self.order.length(0)},
            "states": {
                "plateau": self.plateau.state_dict(),
                "memory": self.memory.state_dict(),
                "early_stopping": self.early_stopping.state_dict(),
                "scaler": self.engine.scaler_state(),
                "freeze": self.freezer.state_dict(),
                "epoch": asdict(self.epoch),
                "history": self.history.state_dict(),
                "owes_evaluation": self.owes_evaluation,
                "ema": dict(self.ema.starts) if self.ema else {},
                "compile": self.compilation.state_dict(),
                "spikes": self.guard.spikes.state_dict() if self.guard.spikes else {},
            },
            "config": asdict(self.config),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue exactly there; all ranks together. saved: a file's content, or what ``portable.shared`` made of it.
        Raises InputError where the checkpoint is of another network, optimizer or data."""
        here, there = self.order.length(0), saved["batch"]["epoch_samples"]
        if here != there:
            raise InputError(f"the run's epoch has {there} samples, this configuration's has {here}: not the same data")
        self.counters = Counters(**saved["counters"])
        if new := self.load_tensors(saved):
            self.fabric.print(f"ema: {', '.join(new)} starts at the weights of step {self.counters.step}")
        states = saved["states"]
        self.plateau.load_state_dict(states["plateau"])
        self.memory.load_state_dict(states.get("memory", {}))
        if "early_stopping" in states:
            self.early_stopping.load_state_dict(states["early_stopping"])
        self.time_is_up = self.counters.seconds / 60 >= self.most_minutes  # of rank 0, which saved them
        self.epoch = EpochSums(**states["epoch"])
        self.history.load_state_dict(states["history"])
        self.owes_evaluation = states["owes_evaluation"]
        self.compilation.load_state_dict(states.get("compile", {}))
        if self.guard.spikes and states.get("spikes"):
            self.guard.spikes.load_state_dict(states["spikes"])

    def load_tensors(self, saved: dict[str, Any]) -> list[str]:
        """Weights, averages and moments; all ranks together. Returns the averages that start at the weights."""
        new = self.load_weights(saved)
        self.engine.load_moments(saved["optimizer"]["state"], self._source(saved))
        load_group_state(self.engine.bare_optimizer, saved["optimizer"]["groups"])
        if self.lookahead:
            self.lookahead.load_state_dict(saved["optimizer"].get("slow", {}), self._source(saved))
        self.engine.load_scaler_state(saved["states"]["scaler"])
        return new

    def load_weights(self, saved: dict[str, Any]) -> list[str]:
        """The weights and their averages alone, strict; averages that were not kept start at the weights: returns
        which."""
        source = self._source(saved)
        self.engine.load_weights(saved["model"], source, "the checkpoint")
        if self.lookahead:
            self.lookahead.restart()
        return self.ema.take_over(saved, self.counters.step, source) if self.ema else []

    def _source(self, saved: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        return Shards(saved) if SHARDS in saved else partial(fetch, self.fabric)


def _collect() -> None:
    """Really: the loop has the collector leave alone what was there when it began."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()


def _require(task: Task, split: str) -> Dataset[Any]:
    dataset = task.dataset(split)
    if dataset is None or len(dataset) == 0:  # type: ignore[arg-type]
        raise InputError(f"{type(task).__name__} has no samples in its {split} split")
    return dataset


def make_ema(engine: Engine, config: EmaConfig) -> EMA:
    """Of the weights where the strategy keeps them."""
    return EMA(
        engine.module,
        config.decays,
        config.warmup,
        engine.leaves,
        engine.refresh,
        power=config.power,
        start=config.start,
        buffers=config.buffers,
    )


def build_network(task: Task, config: FsdpConfig) -> nn.Module:
    """The bare network; with ``meta_init`` without memory, to be drawn block by block as it is sharded."""
    if not config.meta_init:
        return task.network()
    with torch.device("meta"):
        network = task.network()
    check_resettable(network)
    return network
