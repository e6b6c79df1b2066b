"""What a command has all processes do together: train, measure, predict."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from fabric_trainer import checkpoint, run, sharded, slurm
from fabric_trainer.batch import with_micro_batches
from fabric_trainer.command import SUFFIXES, Command
from fabric_trainer.config import BatchConfig, Config, EmaConfig, ScheduleConfig, data_root
from fabric_trainer.describe import describe as describe_run
from fabric_trainer.duration import spoken
from fabric_trainer.environment import describe
from fabric_trainer.errors import FINISHED, TRY_AGAIN, InputError
from fabric_trainer.evaluate import judged, measure
from fabric_trainer.faults import StopSignals
from fabric_trainer.files import write_atomically
from fabric_trainer.history import to_json
from fabric_trainer.loop import fit
from fabric_trainer.memory import NOTE, remembered
from fabric_trainer.portable import shared
from fabric_trainer.predict import check_output, predict, write
from fabric_trainer.random import make_deterministic
from fabric_trainer.ranks import data_parallel
from fabric_trainer.report import write_report
from fabric_trainer.run import Choice
from fabric_trainer.state import State
from fabric_trainer.summary import print_summary
from fabric_trainer.task import Task
from fabric_trainer.tune import sweep_lr, write_sweep
from fabric_trainer.tune_batch import (
    START,
    Found,
    all_sizes,
    find_micro_batch_size,
    sizes_of_same_updates,
)


def run_job(fabric: Fabric, task: Task, command: Command, config: Config, notes: tuple[str, ...]) -> int:
    """What every process does, once all are there; returns the exit code."""
    for note in notes:
        fabric.print(note)
    if config.run.deterministic:
        make_deterministic()
    if command.predict:
        check_predict(fabric, task, command)
    with fabric.rank_zero_first():
        task.prepare(data_root(config))
    if command.evaluate:
        return measure_checkpoint(fabric, task, command, config)
    if command.predict:
        return predict_to_file(fabric, task, command, config)
    if command.tune:
        return tune(fabric, task, command, config)
    if command.fast_dev_run:
        return fast_dev_run(fabric, task, config)
    return train(fabric, task, command, config)


def train(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """Train in a run's folder: a new one, or the one to continue."""
    restarted = _anywhere(fabric, run.was_restarted())
    choice = _on_rank_zero(fabric, lambda: run.choose(command, config, fabric.print, restarted))
    ranks = data_parallel(fabric).size
    config.batch = _on_rank_zero(fabric, lambda: remembered(choice.folder, config.batch, ranks, fabric.print))
    resume_from = choice.resume_from
    saved = shared(fabric, lambda: checkpoint.load(resume_from)) if resume_from else None
    searches = config.batch.micro_batch_size == "auto" and not saved
    config.batch = _numbered(config.batch, ranks, saved)
    if saved:
        if "optimizer" not in saved:
            raise InputError(f"--resume {resume_from}: there are weights alone in it; --init_from starts with them")
        run.compare_configs(saved["config"], config, fabric.print)
    state = State(fabric, task, config, saved, given=any(key.startswith("batch") for key in command.given))
    if command.init_from:
        _init_from(state, command.init_from)
    if saved and state.finished and not _on_rank_zero(fabric, lambda: untested(state, choice)):
        fabric.print(why_nothing_is_left(state, choice.folder.name))
        return FINISHED
    if fabric.is_global_zero:
        run.open_folder(choice, command, config, describe(fabric.world_size, fabric.device, config.fabric.strategy))
    signals = StopSignals()
    try:
        if searches:
            settle_micro_batch_size(state, choice)
        explain(state, choice)
        fit(fabric, task, config, choice.folder, state=state, signals=signals)
    except BaseException:
        if fabric.is_global_zero:
            run.set_status(choice.folder, "failed")
        raise
    if fabric.is_global_zero:
        run.set_status(choice.folder, "finished" if state.complete else "stopped")
        if state.memory.halvings:
            print(f"out of memory: {state.memory.describe()}", flush=True)
        conclude(state, choice)
    if config.fabric.requeue and state.stopped == TRY_AGAIN and _anywhere(fabric, signals.warned):
        _on_rank_zero(fabric, lambda: fabric.print(slurm.requeue()))
    fabric.barrier()  # a launcher that sees one rank leave with an error ends the others
    return state.stopped


def untested(state: State, choice: Choice) -> bool:
    """Whether a complete run was left between its last save and the end of its test."""
    return state.complete and run.read_status(choice.folder).get("status") not in (None, "finished")


def why_nothing_is_left(state: State, name: str) -> str:
    """Of a run that is to be continued and can't be."""
    steps = state.counters.step
    if not state.complete:
        limit = spoken(state.most_minutes * 60)
        return f"run {name} has had its run.max_time of {limit}, at step {steps}; a longer one continues it"
    early = " (early stopping)" if state.early_stopping.over else ""
    return f"run {name} is finished: {steps} steps{early}; nothing to do"


def conclude(state: State, choice: Choice) -> None:
    """On rank 0: the report, with the task's pictures of the best weights, and a last plain line per metric."""
    checkpoints = choice.folder / "checkpoints"
    path = checkpoint.linked(checkpoints, "best") or checkpoint.linked(checkpoints, "last") or checkpoints / "last.pt"
    report = write_report(choice.folder, {} if state.stopped else _pictures(state, path))
    print(f"report {report}", flush=True)
    if not state.stopped:
        print_last_metrics(state)


def _pictures(state: State, path: Path) -> dict[str, Any]:
    """The task's, of a checkpoint, by a bare network of its own: the run's may lie in pieces over the ranks."""
    if type(state.task).pictures is Task.pictures:
        return {}
    saved = checkpoint.load(path)
    network, average = state.task.network(), judged(state)
    averaged = {} if average is None else saved["averages"][average] if average else saved["ema"]
    network.load_state_dict(sharded.whole(saved, saved["model"] | averaged))
    return state.task.pictures(network.to(state.fabric.device).eval(), state.fabric.device)


def settle_micro_batch_size(state: State, choice: Choice) -> None:
    """``batch.micro_batch_size: auto``: find it, use it, and note it in the run's folder for those who resume."""
    note, fabric = choice.folder / NOTE, state.fabric
    found = find_micro_batch_size(state, sizes_of_same_updates(state), note)
    state.set_micro_batch_size(found.size)
    if fabric.is_global_zero:
        write_atomically(note, json.dumps({"micro_batch_size": found.size}))
        run.write_config(choice.folder, state.config)
    fabric.print(f"micro-batches of {found.size}{_too_many(found)}")


def tune(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """``--tune``: what it finds, on a plain line that reads like a key; trains nothing."""
    suffix = SUFFIXES[command.tune or ""][0]
    out = Path(command.out or Path(config.run.root) / f"tune-{command.tune}-{command.config_name}{suffix}")
    _on_rank_zero(fabric, lambda: out.parent.mkdir(parents=True, exist_ok=True))
    config.batch = _numbered(config.batch, data_parallel(fabric).size)
    state = State(fabric, task, config)
    if command.init_from:
        _init_from(state, command.init_from)
    return tune_lr(state, out) if command.tune == "lr" else tune_batch_size(state, out)


def tune_lr(state: State, out: Path) -> int:
    """``--tune lr``: the picture and the numbers of a sweep, and the rate it suggests."""
    sweep, print_ = sweep_lr(state), state.fabric.print
    if state.fabric.is_global_zero and len(sweep.rates):
        write_sweep(sweep, out)
    if sweep.suggestion is None:
        raise InputError(
            f"--tune lr: the loss falls nowhere from tune.min_lr {state.config.tune.min_lr} on, in the "
            f"{len(sweep.rates)} updates before it ends: another range may show more ({out})"
        )
    print_(f"{len(sweep.rates)} updates, rates {sweep.rates[0]:.3g} to {sweep.rates[-1]:.3g}: {out}")
    print_(f"optim.lr {sweep.suggestion:.3g}")
    return FINISHED


def tune_batch_size(state: State, out: Path) -> int:
    """``--tune batch_size``: the largest micro-batch, and with which accumulation it makes the same updates."""
    found, print_, batch = find_micro_batch_size(state, all_sizes(state), out), state.fabric.print, state.config.batch
    same = with_micro_batches(batch, state.ranks.size, found.size)
    if state.fabric.is_global_zero:
        write_atomically(out, json.dumps(asdict(found) | {"batch": asdict(same)}, indent=1))
    for attempt in found.attempts:
        print_(f"{attempt.size:6} {f'fits, {attempt.pace:.0f} samples/s' if attempt.fits else 'does not fit'}")
    print_(f"batch.micro_batch_size {found.size}{_too_many(found)}")
    accumulate = "" if same.global_batch_size else f", batch.accumulate {same.accumulate}"
    print_(f"for the same updates: batch.micro_batch_size {same.micro_batch_size}{accumulate}")
    return FINISHED


def _too_many(found: Found) -> str:
    """ "; 14 do not fit", where that was seen."""
    failed = [attempt.size for attempt in found.attempts if not attempt.fits]
    return f"; {min(failed)} do not fit" if failed else ""


def _numbered(batch: BatchConfig, ranks: int, saved: dict[str, Any] | None = None) -> BatchConfig:
    """A number in place of ``auto``: the checkpoint's, or one to begin with."""
    most = (saved or {}).get("batch", {}).get("micro_batch_size", START)
    return with_micro_batches(batch, ranks, most) if batch.micro_batch_size == "auto" else batch


def measure_checkpoint(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """``--evaluate``: the metrics of a checkpoint's raw and averaged weights, in full precision."""
    path = _on_rank_zero(fabric, lambda: find_measured(command, config))
    state, source = load_state(fabric, task, path, command, config)
    fabric.print(source)
    metrics = measure(state, command.split)
    state.compilation.retreat(fabric.print)
    if fabric.is_global_zero:
        for name, value in metrics.items():
            if isinstance(value, float):  # arrays are for the file
                print(f"{name} {value!r}", flush=True)
        if command.out:
            write_measured(state, path, command, metrics)
    return FINISHED


def find_measured(command: Command, config: Config) -> Path:
    """The checkpoint to measure. Raises InputError, also where ``--out`` has no folder to lie in."""
    if command.out and not Path(command.out).parent.is_dir():
        raise InputError(f"--out {command.out}: there is no folder {Path(command.out).parent}")
    return run.find_checkpoint(command.evaluate or "", command, config)


def write_measured(state: State, path: Path, command: Command, metrics: dict[str, Any]) -> None:
    """``--evaluate --out``: the metrics as JSON, arrays as lists; and beside it, where the task has pictures, a
    report with them."""
    out, step = Path(command.out or ""), state.counters.step
    found = {"checkpoint": str(path), "step": step, "split": command.split, "metrics": metrics}
    write_atomically(out, to_json(found))
    print(f"metrics {out}", flush=True)
    if pictures := _pictures(state, path):
        figures = {name: value for name, value in metrics.items() if isinstance(value, float)}
        print(f"report {write_report(out.parent, pictures, {'step': step} | figures)}", flush=True)


def check_predict(fabric: Fabric, task: Task, command: Command) -> None:
    """Refuse, before any data is read, what ``--predict`` could not do at the end."""
    _on_rank_zero(fabric, lambda: check_output(task, command.out or ""))


def predict_to_file(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """``--predict``: a checkpoint's predictions for every sample of a split, in one file that rank 0 writes."""
    out, config.run.limit_val_batches, config.run.overfit_batches = command.out or "", None, None
    path = _on_rank_zero(fabric, lambda: run.find_checkpoint(command.predict or "", command, config))
    state, source = load_state(fabric, task, path, command, config)
    average = state.ema if config.evaluate.weights != "raw" else None
    fabric.print(f"{source}, {'averaged' if average else 'raw'} weights")
    with average.applied() if average else nullcontext():
        table = predict(fabric, task, state.network, state.split(command.split))
        state.engine.refresh()
    state.compilation.retreat(fabric.print)
    if fabric.is_global_zero:
        write(out, table)
        print(f"{len(table['index'])} predictions in {out}", flush=True)
    return FINISHED


def load_state(fabric: Fabric, task: Task, path: Path, command: Command, config: Config) -> tuple[State, str]:
    """A state with a checkpoint's weights, and their average where it has one; and a line that says whose they are,
    and the split."""
    saved = shared(fabric, lambda: checkpoint.load(path))
    config.ema = EmaConfig(**(saved["config"]["ema"] if saved.get("ema") else {}))
    config.schedule = ScheduleConfig()  # nothing is trained: none may be too long for this data
    config.batch = _numbered(config.batch, data_parallel(fabric).size, saved)
    state = State(fabric, task, config)
    state.load_weights(saved)
    state.counters.step = saved["counters"]["step"]
    split = state.split(command.split)
    part = f", {split.samples} of {split.whole} samples" if split.samples < split.whole else ""
    return state, f"{path}: step {state.counters.step}, split {command.split}{part}"


def fast_dev_run(fabric: Fabric, task: Task, config: Config) -> int:
    """One update and one evaluation batch; leaves nothing behind."""
    config.run.max_steps, config.run.limit_val_batches, config.schedule.warmup = 1, 1, 0
    config.early_stopping.restore_best = config.freeze.advanced.restore_weights = False  # there are no files
    config.batch = _numbered(config.batch, data_parallel(fabric).size)
    state = State(fabric, task, config)
    explain(state, None)
    fit(fabric, task, config, state=state)
    if fabric.is_global_zero:
        print_last_metrics(state)
    return FINISHED


def explain(state: State, choice: Choice | None) -> None:
    """The start-up summary, on rank 0."""
    if state.fabric.is_global_zero:
        lines = describe_run(state)
        if choice is not None:
            lines |= {"folder": str(choice.folder)}
            lines |= {"resumed from": str(choice.resume_from)} if choice.resume_from else {}
        print_summary(Console(), modules=state.modules, order_lines=lines)


def print_last_metrics(state: State) -> None:
    """Of the last evaluation, or the restored weights', and then of the test split."""
    evaluations = [state.restored] if state.restored else state.history.evaluations[-1:]
    for metrics in evaluations + state.history.tests:
        print_metrics(metrics)


def print_metrics(metrics: dict[str, float]) -> None:
    """A plain line per metric, such as ``val/nrmse 0.0142``; none for its parts, such as ``val/recall/cat``."""
    for name, value in metrics.items():
        if name.count("/") == 1:
            print(f"{name} {value:.4f}" if abs(value) >= 1e-3 else f"{name} {value:.3e}", flush=True)


def _init_from(state: State, path: str) -> None:
    saved = shared(state.fabric, lambda: checkpoint.load(Path(path)))
    state.load_weights(saved | {"ema": None})  # the average starts at the weights
    state.fabric.print(f"weights from {path}")


def _anywhere(fabric: Fabric, flag: bool) -> bool:
    """Whether it is true of any rank; all ranks together."""
    return bool(fabric.all_reduce(torch.tensor(float(flag)), reduce_op="sum"))


def _on_rank_zero(fabric: Fabric, decide: Any) -> Any:
    """What rank 0 decides, on every rank; its InputError too, so that no rank waits for one that has left."""
    answer: Any = None
    if fabric.is_global_zero:
        try:
            answer = decide()
        except InputError as error:
            answer = error
    answer = fabric.broadcast(answer)
    if isinstance(answer, InputError):
        raise answer
    return answer
