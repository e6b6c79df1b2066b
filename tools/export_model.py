"""What is exported: a checkpoint's network, its weights as a file keeps them, and forwards on real samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.seed import seed_everything
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from fabric_trainer import checkpoint, sharded
from fabric_trainer.cli import make_task
from fabric_trainer.command import from_checkpoint
from fabric_trainer.config import Config, data_root
from fabric_trainer.errors import InputError
from fabric_trainer.evaluate import Split, evaluate, evaluating
from fabric_trainer.order import Rows
from fabric_trainer.portable import check_names
from fabric_trainer.task import Task
from fabric_trainer.window import MicroBatches
from tools.quantize import Restoring, quantize, restore

SAMPLES = (4, 3, 4)  # of the forwards: two sizes show which dimensions are the batch's


class Call(NamedTuple):
    """The arguments of one forward, and how many samples went into it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int


@dataclass
class Model:
    """network: bare, in eval mode, on the host, float32, with the weights that ``stored`` restores. fresh: makes
    another without them. stored: its state dict, as a file is to keep it. calls: real forwards. notes: what a file says
    of itself."""

    network: nn.Module
    fresh: Callable[[], nn.Module]
    stored: dict[str, Any]
    calls: list[Call]
    notes: dict[str, str]

    @property
    def quantized(self) -> bool:
        return "quantize" in self.notes

    def graph(self) -> nn.Module:
        """The module to trace."""
        return Restoring(self.network, self.stored) if self.quantized else self.network

    def loaded(self, stored: dict[str, Any]) -> nn.Module:
        """A new network, with what a file had."""
        network = self.fresh()
        network.load_state_dict(restore(stored) if self.quantized else stored)
        return network


def load(path: Path, weights: str, how: str | None, split: str, keys: Sequence[str] = ()) -> Model:
    """A checkpoint's raw or ema weights, quantized where ``how`` says int8 or fp16, with its metrics before and after
    printed. keys: of the configuration, as on a command line. Raises InputError, CheckpointError."""
    saved = checkpoint.load(path)
    config = from_checkpoint(saved["config"], keys)
    task, dataset = prepared(config, split)
    notes = {"step": str(saved["counters"]["step"]), "weights": weights, "task": config.task.path}
    print(f"{path}: step {notes['step']}, {weights} weights of {config.task.path}")

    fresh = partial(build, task, config.seed)
    network = fresh()
    state = tied(network, weights_of(saved, weights, path))
    check_names(network.state_dict(), state, str(path))
    network.load_state_dict(state)
    model = Model(network, fresh, state, record_calls(task, network, dataset, config.seed), notes)
    if how:
        fabric = Fabric(accelerator="cpu", devices=1)
        rows = config.evaluate.micro_batch_size or saved["batch"]["micro_batch_size"]
        metrics = partial(evaluate, fabric, task, split=Split(fabric, task, dataset, rows, config.seed))
        before = metrics(network=network)
        model.stored, model.notes["quantize"] = quantize(network, state, how), how
        network.load_state_dict(restore(model.stored))
        show(split, how, before, metrics(network=network))
        print(f"weights: {size(state):,} bytes, in {how} {size(model.stored):,}")
    return model


def prepared(config: Config, split: str) -> tuple[Task, Dataset[Any]]:
    """The task with its data, and the split's. Raises InputError."""
    task = make_task(config)
    if missing := task.missing(data_root(config)):
        raise InputError(missing[0])
    task.prepare(data_root(config))
    dataset = task.dataset(split)
    if dataset is None or len(dataset) == 0:  # type: ignore[arg-type]
        raise InputError(
            f"--split {split}: {type(task).__name__} has no samples there, and an export is checked on some"
        )
    return task, dataset


def build(task: Task, seed: int) -> nn.Module:
    """The bare network, in eval mode; seeded as training was, for what a network draws and doesn't save."""
    seed_everything(seed, verbose=False)
    return task.network().eval()


def weights_of(saved: dict[str, Any], which: str, path: Path) -> dict[str, Any]:
    chosen = saved["model"] if which == "raw" else saved.get("ema")
    if chosen is None:
        raise InputError(f"--weights {which}: {path} has no average of the weights; raw is what there is")
    return sharded.whole(saved, chosen)  # type: ignore[no-any-return]


def tied(network: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict with one tensor for all the names of a parameter."""
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    kept = {name: first[id(parameter)] for name, parameter in network.named_parameters(remove_duplicate=False)}
    return {name: state.get(kept.get(name, name), value) for name, value in state.items()}


# ---- how it is called ---------------------------------------------------------------------------------------------


def record_calls(task: Task, network: nn.Module, dataset: Dataset[Any], seed: int) -> list[Call]:
    """The first forward of ``task.predict``, or, of a task without, of ``task.evaluate``, on each of a few batches.

    A hook on the network takes down its arguments: nobody has to declare a signature. Tensors of the batch's size, or
    of any other that changes from call to call, are what a graph may be dynamic in. Raises InputError.
    """
    predicts = type(task).predict is not Task.predict
    method = f"{type(task).__name__}.{'predict' if predicts else 'evaluate'}"
    batches, calls = MicroBatches(task, dataset, seed, training=False), []
    for number, rows in enumerate(SAMPLES):
        index = np.arange(rows) + sum(SAMPLES[:number])
        batch = batches[Rows(0, index % len(dataset), np.ones(rows, np.float32))]  # type: ignore[arg-type]
        made: list[Call] = []

        def note(_: nn.Module, args: Any, kwargs: Any, made: list[Call] = made, rows: int = rows) -> None:
            bound = inspect.signature(network.forward).bind(*args, **kwargs)  # in the signature's order
            made.append(Call(cloned(bound.args), cloned(bound.kwargs), rows))

        hook = network.register_forward_pre_hook(note, with_kwargs=True)
        with evaluating(network), torch.no_grad():
            task.predict(network, batch) if predicts else task.evaluate(network, batch, task.meters())
        hook.remove()
        if not made:
            raise InputError(f"{method} never calls network(...): what its forward takes is not known")
        calls.append(made[0])
    print(f"forward: as {method} calls it")
    return calls


def cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


# ---- quantized or not ---------------------------------------------------------------------------------------------


def show(split: str, how: str, before: dict[str, float], after: dict[str, float]) -> None:
    """A line per metric."""
    width = max(len(f"{split}/{name}") for name in before)
    print(f"{'metric':{width}}  {'before':>12}  {how:>12}")
    for name, value in before.items():
        print(f"{f'{split}/{name}':{width}}  {value:12.6g}  {after[name]:12.6g}")


def size(state: dict[str, Any]) -> int:
    """Bytes of the tensors, those of several names once."""
    return sum(tensor.nbytes for tensor in {id(x): x for x in state.values() if isinstance(x, Tensor)}.values())
