# ruff: noqa: E402  (imports after the path)
"""What the processes of a strategy do, in one launch: python worker.py FOLDER STRATEGY JOB [JSON]

The jobs are the functions below; each rank leaves what it found in FOLDER/<strategy>/<job>-<rank>.pt.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import sys
import time
import weakref
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import systems
import torch
import yaml
from lightning.fabric import Fabric
from torch import Tensor
from torch.distributed.tensor import DTensor

from fabric_trainer import Config, checkpoint, fit
from fabric_trainer import state as state_module
from fabric_trainer.cli import make_task
from fabric_trainer.command import load
from fabric_trainer.config import CompileConfig, EarlyStoppingConfig, LookaheadConfig, MuonConfig, SamConfig, TaskConfig
from fabric_trainer.errors import CompileError
from fabric_trainer.memory import in_use
from fabric_trainer.portable import Leaf, local, shared, whole
from fabric_trainer.power import exponent
from fabric_trainer.probe import probe
from fabric_trainer.progress import Progress
from fabric_trainer.sharded_save import save_shards
from fabric_trainer.state import State
from fabric_trainer.strategies import make_fabric
from fabric_trainer.tune import sweep_lr
from fabric_trainer.tune_batch import find_micro_batch_size
from tools.ema import read_snapshots

torch.set_num_threads(1)


def train(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """The whole run, and what was seen in it."""
    task = make_task(config)
    fit(fabric, task, config, folder / "run")
    return {"seen": task.seen}  # type: ignore[attr-defined]


def collectives(fabric: Fabric, config: Config, folder: Path) -> dict[str, int]:
    """Of one update between log points, in a run that saves nothing."""
    counter = Collectives(4)
    fabric._callbacks.append(counter)
    state = fit(fabric, make_task(config), config)
    fabric._callbacks.remove(counter)
    return dict(counter.counts) | {"weights": len(state.engine.leaves)}


def resume(fabric: Fabric, config: Config, folder: Path, sources: dict[str, str]) -> dict[str, Any]:
    """From each file: the state at that moment, gathered again, and the run to its end."""
    found = {}
    for name, path in sources.items():
        fabric._models_setup = 0  # of Fabric's DeepSpeed, which counts
        task = make_task(config)
        state = State(fabric, task, config, shared(fabric, lambda path=path: checkpoint.load(Path(path))))
        taken = checkpoint.Snapshot().take(state.state_dict())
        fit(fabric, task, config, folder / f"from {name}", state=state)
        found[name] = {"taken": taken, "seen": task.seen}  # type: ignore[attr-defined]
    return found


def faulty(fabric: Fabric, config: Config, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A whole run for each case, in which its task goes wrong."""
    found = {}
    for name, arguments in cases.items():
        fabric._models_setup = 0
        config.task = TaskConfig("systems.Faulty", arguments)
        state = fit(fabric, make_task(config), config, folder / name)
        found[name] = {"rows": state.memory.rows, "skipped": state.counters.skipped, "step": state.counters.step}
    return found


def averages(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """A short run's averages, gathered, beside those of the whole weights, which are gathered after each update."""
    state = State(fabric, make_task(config), config)
    follow = Weights(state)
    fabric._callbacks.append(follow)
    fit(fabric, state.task, config, folder / "averages", state=state)
    fabric._callbacks.remove(follow)
    decays = {
        "0.9": lambda n: min(0.9, (1 + n) / (10 + n)),
        "0.99": lambda n: min(0.99, (1 + n) / (10 + n)),
        "power_0.1": lambda n: (1 - 1 / n) ** (exponent(0.1) + 1),
    }
    compared, different, first = 0, [], {}
    for label, decay in decays.items():
        found = {name: whole(leaf).clone() for name, leaf in state.ema.averaged(label).items()}  # type: ignore
        for name, average in found.items():
            expected = follow.history[0][name].clone()
            for n, weights in enumerate(follow.history[1:], 1):
                expected.lerp_(weights[name], 1 - decay(n))
            compared += 1
            different += [] if torch.equal(average, expected) else [f"{label} {name}"]
        first[label] = found
    result = {
        "updates": len(follow.history) - 1,
        "compared": compared,
        "different": different,
        "collectives": follow.collectives,
    }
    if fabric.is_global_zero:
        snapshots = read_snapshots(folder / "averages" / "ema", None)
        last = snapshots[-1]["averages"]
        for label, average in last.items():
            different += [name for name, value in average.items() if not torch.equal(value, first[label][name].cpu())]
        result |= {"saved": list(last), "snapshots": [snapshot["counters"]["step"] for snapshot in snapshots]}
    return result


def recompute(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """Two runs with dropout, without and with activation checkpointing."""
    weights = {}
    for blocks in ([], ["Residual"]):
        fabric._models_setup = 0
        config.fabric.activation_checkpointing = blocks
        state = fit(fabric, make_task(config), config)
        weights[len(blocks)] = {name: whole(leaf).clone() for name, leaf in state.engine.weights().items()}
    return weights


def compiled(fabric: Fabric, config: Config, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A run for each case of the section ``compile``: the weights it ends with, this rank's graphs and lines."""
    found, lines = {}, list[str]()
    Progress.print = lambda self, line: lines.append(line)  # type: ignore[method-assign]
    for name, keys in cases.items():
        fabric._models_setup = 0
        torch.compiler.reset()
        systems.graphs.clear()
        lines.clear()
        config.fabric.activation_checkpointing = keys.pop("recomputed", [])
        config.compile = CompileConfig(**keys)
        try:
            state = fit(fabric, make_task(config), config)
        except CompileError as error:
            found[name] = {"error": str(error)}
            continue
        weights = {name: whole(leaf).clone() for name, leaf in state.engine.weights().items()}
        said = [line for line in lines if line.startswith("compile")]
        found[name] = {"weights": weights, "graphs": len(systems.graphs), "said": said}
    return found


def memory(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """While a checkpoint is gathered and one is loaded: the most bytes of whole tensors alive at once, by rank."""
    state = fit(fabric, make_task(config), config, folder / "memory")
    live = Live()
    checkpoint.whole = live.follow(whole)  # type: ignore[assignment]
    tree = state.state_dict()
    if fabric.is_global_zero:
        checkpoint.Snapshot().take(tree)
    else:
        checkpoint.take_part(tree)
    checkpoint.whole = whole
    sizes = [whole(leaf).nbytes for leaf in state.engine.weights().values()]
    return {"most": live.most, "largest": max(sizes), "all": sum(sizes), "live": live.now}


def optimizers(fabric: Fabric, config: Config, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Six updates each: the weights, and Lookahead's slow ones."""
    cases: dict[str, dict[str, Any]] = {
        "muon": {"optim": {"name": "muon_hybrid", "muon": MuonConfig(lr=0.05), "lookahead": LookaheadConfig(2)}},
        "all matrices": {"optim": {"name": "muon_hybrid", "muon": MuonConfig("all", args={"nesterov": False})}},
        "adaptive clipping": {"clip": {"norm": None, "agc": 0.02, "agc_exempt": ["head"]}},
        "sam": {"optim": {"sam": SamConfig(0.2)}},
    }
    if config.fabric.strategy not in ("auto", "ddp"):
        del cases["sam"]
    found = {}
    for name, sections in cases.items():
        own = copy.deepcopy(config)
        for section, keys in sections.items():
            for key, value in keys.items():
                setattr(getattr(own, section), key, value)
        state = fit(fabric, make_task(own), own)
        slow = state.lookahead.slow if state.lookahead else {}
        leaves = state.engine.weights() | {f"slow {key}": leaf for key, leaf in slow.items()}
        found[name] = {key: whole(leaf).clone() for key, leaf in leaves.items()}
    return found


def drawn(fabric: Fabric, config: Config, folder: Path) -> dict[str, Tensor]:
    """The weights before the first update, gathered."""
    state = State(fabric, make_task(config), config)
    return {name: whole(leaf).clone() for name, leaf in state.engine.weights().items()}


def footprint(fabric: Fabric, config: Config, folder: Path) -> dict[str, int]:
    """Bytes of all tensors that this process holds between two updates, and the largest its memory has been."""
    state = fit(fabric, make_task(config), config)
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor) and not item.is_meta]
    pieces = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in pieces}
    weights = sum(leaf.shape.numel() for leaf in state.engine.leaves.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"held": sum(storages.values()), "peak": peak, "parameters": weights}


def profile(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """A run under each profiler, of which rank 1 is slower and larger."""
    config.task.path, config.run.log_memory = "systems.Slow", True
    found = {}
    for name in ("simple", "pytorch"):
        fabric._models_setup, config.profiler.name = 0, name
        task = make_task(config)
        fit(fabric, task, config, folder / f"profile {name}")
        found[name] = in_use(fabric.device)["host"]
    return found


def ends(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """A run that early stopping ends, with what was put back then; and one whose time is up by rank 0's clock, while
    that of the others stands still."""
    early = fit(fabric, make_task(config), config, folder / "ends")
    found = {"early": early.counters.step, "restored": checkpoint.Snapshot().take(early.state_dict())}
    fabric._models_setup = 0
    config.early_stopping, config.run.max_time = EarlyStoppingConfig(), "3m"
    clock = Minutes(fabric.is_global_zero)
    fabric._callbacks.append(clock)
    state_module.time = clock  # type: ignore[assignment]
    timed = fit(fabric, make_task(config), config)
    state_module.time = time  # type: ignore[attr-defined]
    fabric._callbacks.remove(clock)
    return found | {"timed": timed.counters.step, "complete": timed.complete, "stopped": timed.stopped}


def finders(fabric: Fabric, config: Config, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Both finders, then the run: what they found, and the state at its end."""
    task = make_task(config)
    state = State(fabric, task, config)
    sweep, found = sweep_lr(state), find_micro_batch_size(state, sizes)
    fit(fabric, task, config, state=state)
    taken = checkpoint.Snapshot().take(state.state_dict())
    return {"sweep": [sweep.losses.tolist(), sweep.suggestion], "size": found.size, "taken": taken}


def sync_after_accumulation(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """Whether gradients are exchanged after Fabric's context was entered with enabled=False."""
    state = State(fabric, make_task(config), config)
    with fabric.no_backward_sync(state.network, enabled=False):
        pass
    x = torch.ones(2, 8, dtype=torch.float64) * (fabric.global_rank + 1)
    fabric.backward(state.network(x).square().sum())
    return {"gradients": [parameter.grad is not None for parameter in state.engine.trainable]}


def both_ways(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """The state after a run, as shards and as one file."""
    state = fit(fabric, make_task(config), config)
    tree = state.state_dict()
    own = checkpoint.Checkpoints(folder / "both", config.checkpoint) if fabric.is_global_zero else None
    save_shards(own, tree, tree["counters"], {}, keep=True)
    if own is not None:
        own.save(tree, tree["counters"], {}, keep=True)
        own.wait()
    else:
        checkpoint.take_part(tree)
    return {}


def freezing(fabric: Fabric, config: Config, folder: Path, resumes: list[int]) -> dict[str, Any]:
    """A run whose frozen set changes, one in which it doesn't, and the first one again from each of these steps."""
    fit(fabric, make_task(config), config, folder / "freezing")
    fabric.barrier()
    for step in resumes:
        path = folder / "freezing" / "checkpoints" / f"step-{step:08d}.pt"
        saved = shared(fabric, lambda path=path: checkpoint.load(path))
        fit(fabric, make_task(config), config, folder / f"freezing from {step}", saved=saved)
    config.freeze.schedule = {0: []}
    config.run.max_steps = 4
    fit(fabric, make_task(config), config, folder / "frozen")
    return {}


def probing(fabric: Fabric, config: Config, folder: Path) -> dict[str, Any]:
    """The readings of two probe batches, after an update, and whether anything was left changed."""
    state = fit(fabric, make_task(config), config)

    def traces() -> list[Any]:
        tree = state.state_dict()
        leaves = [*tree["model"].values(), *tree["ema"].values()]
        leaves += [value for values in tree["optimizer"]["state"].values() for value in values.values()]
        flags = [(p.requires_grad, p.grad is None) for p in state.module.parameters()]
        return [local(leaf).clone() for leaf in leaves if isinstance(leaf, Leaf)] + [torch.get_rng_state(), flags]

    before = traces()
    readings = probe(state, 0, 2)
    after = traces()
    same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)]
    return {"readings": [{unit: asdict(reading) for unit, reading in each.items()} for each in readings], "same": same}


class Collectives:
    """A callback that profiles one update: how many of which collective the process took part in."""

    def __init__(self, step: int) -> None:
        self.step, self.counts = step, Counter[str]()
        self.profile = torch.autograd.profiler.profile(use_kineto=False)  # kineto once took a process with it

    def on_update_end(self, state: State, metrics: Any) -> None:
        if state.counters.window == self.step:
            self.profile.__enter__()
        elif state.counters.window == self.step + 1:
            self.profile.__exit__(None, None, None)
            for event in self.profile.function_events or []:
                if event.name.startswith("gloo:"):
                    self.counts[event.name.removeprefix("gloo:")] += 1


class Weights:
    """A callback that gathers the weights after each update, and counts collectives while they are averaged."""

    def __init__(self, state: State) -> None:
        self.state, self.collectives = state, 0
        self.history = [self.gathered()]
        self.update, state.ema.update = state.ema.update, self.counted  # type: ignore

    def gathered(self) -> dict[str, Tensor]:
        return {name: whole(leaf).clone() for name, leaf in self.state.engine.leaves.items()}

    def on_update_end(self, state: State, metrics: Any) -> None:
        self.history.append(self.gathered())

    def counted(self, step: int) -> None:
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            self.update(step)
        self.collectives += sum(event.name.startswith("gloo:") for event in profile.function_events or [])


class Minutes:
    """A callback that is a clock, on which an update takes a minute."""

    def __init__(self, runs: bool) -> None:
        self.runs, self.now = runs, 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_update_end(self, state: State, metrics: Any) -> None:
        self.now += 60.0 * self.runs


class Live:
    """Bytes of the tensors that a function has made and that are still there."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def follow(self, function: Any) -> Any:
        def followed(leaf: Any) -> Tensor:
            made = function(leaf)
            if made is not leaf:
                self.now += made.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(made, self.forget, made.nbytes)
            return made  # type: ignore[no-any-return]

        return followed

    def forget(self, size: int) -> None:
        self.now -= size


def main() -> None:
    folder, strategy, jobs = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if strategy.startswith("deepspeed"):
        import deepspeed_cpu

        deepspeed_cpu.allow()
    config = load(folder / f"{strategy}.yaml")
    fabric = make_fabric(config)
    fabric.launch()
    here = folder / strategy
    here.mkdir(exist_ok=True)
    for job, arguments in jobs.items():
        fabric._models_setup = 0
        changed = arguments.pop("config", None)
        (here / f"{job}.yaml").write_text(yaml.safe_dump(changed)) if changed and fabric.is_global_zero else None
        fabric.barrier()
        own = load(here / f"{job}.yaml") if changed else load(folder / f"{strategy}.yaml")
        result = globals()[job](fabric, own, here, **arguments)
        torch.save(result, here / f"{job}-{fabric.global_rank}.pt")
    fabric.barrier()


if __name__ == "__main__":
    main()
