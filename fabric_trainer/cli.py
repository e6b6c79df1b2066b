"""The command line: train, measure a checkpoint, predict, or only check.

Imports torch once the command has been understood.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_trainer.command import Command, parse
from fabric_trainer.config import Config, data_root
from fabric_trainer.errors import (
    FAILED,
    FINISHED,
    INPUT,
    INTERRUPTED,
    SMALLER,
    TRY_AGAIN,
    BadGradientError,
    CheckpointError,
    InputError,
    OutOfMemoryRestart,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fabric_trainer.run import Choice
    from fabric_trainer.state import State
    from fabric_trainer.task import Task

# errors of one line
CODES = {InputError: INPUT, BadGradientError: FAILED, CheckpointError: FAILED, OutOfMemoryRestart: SMALLER}


def main(argv: Sequence[str]) -> int:
    """Do what the command says; returns the process's exit code (``fabric_trainer.errors``)."""
    return _reported(_understand, argv)


def _understand(argv: Sequence[str]) -> int:
    command, config = parse(argv)
    if command.strategies:
        return print_strategies()
    if command.dry_run:
        return dry_run(config)
    return _launch(command, config)


def _launch(command: Command, config: Config) -> int:
    from torch.multiprocessing import ProcessExitedException

    from fabric_trainer.launch import meet_again, resolve
    from fabric_trainer.run import refuse_nameless_restart
    from fabric_trainer.strategies import make_fabric

    refuse_nameless_restart(config)
    meet_again()
    resolved = resolve(config.fabric)
    fabric = make_fabric(config, _callbacks(config), resolved)
    task = make_task(config)
    try:
        return fabric.launch(_reported_on_rank, task, command, config, resolved.notes)  # type: ignore[no-any-return]
    except ProcessExitedException as error:  # one that ddp_spawn or ddp_notebook started
        if error.exit_code < 0:  # a signal killed it: it can't have said why
            print(f"error: {error}", file=sys.stderr, flush=True)
        return max(error.exit_code, FAILED)


def _reported_on_rank(fabric: Fabric, *arguments: Any) -> int:
    return _reported(_on_rank, fabric, *arguments)


def _on_rank(fabric: Fabric, task: Task, command: Command, config: Config, notes: tuple[str, ...]) -> int:
    """What every process does, once all are there."""
    from fabric_trainer.lifeline import Lifeline

    with Lifeline(fabric.global_rank, fabric.world_size, fabric.broadcast, _code, tuple(CODES)):
        for note in notes:
            fabric.print(note)
        if command.predict:
            check_predict(fabric, task, command)
        with fabric.rank_zero_first():
            task.prepare(data_root(config))
        if command.evaluate:
            return measure_checkpoint(fabric, task, command, config)
        if command.predict:
            return predict_to_file(fabric, task, command, config)
        if command.fast_dev_run:
            return fast_dev_run(fabric, task, config)
        return train(fabric, task, command, config)


def _reported(call: Callable[..., int], *arguments: Any) -> int:
    """Its exit code; the one line of an error that has one is printed, any other error goes through."""
    try:
        return call(*arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except tuple(CODES) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return _code(error)


def _code(error: BaseException) -> int:
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), FAILED)


def train(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """Train in a run's folder: a new one, or the one to continue."""
    from fabric_trainer import checkpoint, run, slurm
    from fabric_trainer.environment import describe
    from fabric_trainer.faults import StopSignals
    from fabric_trainer.loop import fit
    from fabric_trainer.memory import remembered
    from fabric_trainer.portable import shared
    from fabric_trainer.state import State

    restarted = _anywhere(fabric, run.was_restarted())
    choice = _on_rank_zero(fabric, lambda: run.choose(command, config, fabric.print, restarted))
    config.batch = _on_rank_zero(fabric, lambda: remembered(choice.folder, config.batch, fabric.print))
    resume_from = choice.resume_from
    saved = shared(fabric, lambda: checkpoint.load(resume_from)) if resume_from else None
    if saved:
        run.compare_configs(saved["config"], config, fabric.print)
    state = State(fabric, task, config, saved, given=any(key.startswith("batch") for key in command.given))
    if command.init_from:
        _init_from(state, command.init_from)
    if saved and state.finished:
        fabric.print(f"run {choice.folder.name} is finished: {state.counters.step} steps; nothing to do")
        return FINISHED
    if fabric.is_global_zero:
        run.open_folder(choice, command, config, describe(fabric.world_size, fabric.device, config.fabric.strategy))
        explain(state, choice)
    signals = StopSignals()
    try:
        fit(fabric, task, config, choice.folder, state=state, signals=signals)
    except BaseException:
        if fabric.is_global_zero:
            run.set_status(choice.folder, "failed")
        raise
    if fabric.is_global_zero:
        run.set_status(choice.folder, "stopped" if state.stopped else "finished")
        conclude(state, choice)
    if config.fabric.requeue and state.stopped == TRY_AGAIN and _anywhere(fabric, signals.warned):
        _on_rank_zero(fabric, lambda: fabric.print(slurm.requeue()))
    fabric.barrier()  # a launcher that sees one rank leave with an error ends the others
    return state.stopped


def conclude(state: State, choice: Choice) -> None:
    """On rank 0: the report, with the task's pictures of the best weights, and a last plain line per metric."""
    from fabric_trainer.report import write_report

    report = write_report(choice.folder, {} if state.stopped else _pictures(state, choice.folder / "checkpoints"))
    print(f"report {report}", flush=True)
    if state.history.evaluations and not state.stopped:
        print_metrics(state.history.evaluations[-1])


def _pictures(state: State, checkpoints: Path) -> dict[str, Any]:
    """The task's, by a bare network of its own: the trained one may lie in pieces over the ranks."""
    from fabric_trainer import checkpoint, sharded
    from fabric_trainer.task import Task

    if type(state.task).pictures is Task.pictures:
        return {}
    path = checkpoint.linked(checkpoints, "best") or checkpoint.linked(checkpoints, "last")
    saved = checkpoint.load(path or checkpoints / "last.pt")
    network = state.task.network()
    network.load_state_dict(sharded.whole(saved, saved["model"]))
    return state.task.pictures(network.to(state.fabric.device).eval(), state.fabric.device)


def measure_checkpoint(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """``--evaluate``: the metrics of a checkpoint's raw and averaged weights, in full precision."""
    from fabric_trainer.boundary import measure

    state, source = load_state(fabric, task, command.evaluate or "", command, config)
    fabric.print(source)
    metrics = measure(state, command.split)
    if fabric.is_global_zero:
        for name, value in metrics.items():
            print(f"{name} {value!r}", flush=True)
    return FINISHED


def check_predict(fabric: Fabric, task: Task, command: Command) -> None:
    """Refuse, before any data is read, what ``--predict`` could not do at the end."""
    from fabric_trainer.predict import check_output

    _on_rank_zero(fabric, lambda: check_output(task, command.out or ""))


def predict_to_file(fabric: Fabric, task: Task, command: Command, config: Config) -> int:
    """``--predict``: a checkpoint's predictions for every sample of a split, in one file that rank 0 writes."""
    from fabric_trainer.predict import predict, write

    out = command.out or ""
    state, source = load_state(fabric, task, command.predict or "", command, config)
    average = state.ema if config.evaluate.weights != "raw" else None
    fabric.print(f"{source}, {'averaged' if average else 'raw'} weights")
    with average.applied() if average else nullcontext():
        table = predict(fabric, task, state.network, state.split(command.split))
        state.engine.refresh()
    if fabric.is_global_zero:
        write(out, table)
        print(f"{len(table['index'])} predictions in {out}", flush=True)
    return FINISHED


def load_state(fabric: Fabric, task: Task, which: str, command: Command, config: Config) -> tuple[State, str]:
    """A state with the weights of the checkpoint ``which`` (PATH, best or last), and their average where it has one;
    and a line that says whose they are, and the split."""
    from fabric_trainer import checkpoint, run
    from fabric_trainer.portable import shared
    from fabric_trainer.state import State

    path = _on_rank_zero(fabric, lambda: run.find_checkpoint(which, command, config))
    saved = shared(fabric, lambda: checkpoint.load(path))
    if saved.get("ema") is None:
        config.ema.decay = None
    elif config.ema.decay is None:
        config.ema.decay = saved["config"]["ema"]["decay"]
    state = State(fabric, task, config)
    state.load_weights(saved)
    return state, f"{path}: step {saved['counters']['step']}, split {command.split}"


def fast_dev_run(fabric: Fabric, task: Task, config: Config) -> int:
    """One update and one evaluation batch; leaves nothing behind."""
    from fabric_trainer.loop import fit
    from fabric_trainer.state import State

    config.run.max_steps, config.schedule.warmup = 1, 0
    state = State(fabric, task, config)
    state.limit_batches = 1
    explain(state, None)
    fit(fabric, task, config, state=state)
    if fabric.is_global_zero and state.history.evaluations:
        print_metrics(state.history.evaluations[-1])
    return FINISHED


def dry_run(config: Config) -> int:
    """Check the configuration without touching a device or a file; list what this machine lacks for a real run."""
    from fabric_trainer import strategies
    from fabric_trainer.batch import resolve_accumulate
    from fabric_trainer.optim import optimizer_class

    task = make_task(config)
    _callbacks(config)
    optimizer_class(config.optim.name)
    problems = strategies.problems(config) + task.missing(data_root(config))
    resolve_accumulate(config.batch, strategies.count_devices(config.fabric))
    print("the configuration is valid")
    if problems:
        print("would stop a real run:", *problems, sep="\n  ")
    return FINISHED


def print_strategies() -> int:
    """``--strategies``: what each of them can do, without torch."""
    from rich.console import Console

    from fabric_trainer.strategies import WIDTH, strategy_table

    console = Console()
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    console.print(strategy_table())
    return FINISHED


def make_task(config: Config) -> Task:
    """The configured task. Raises InputError for a class that isn't one, or arguments that it doesn't take."""
    import jsonargparse

    from fabric_trainer.imports import import_path
    from fabric_trainer.task import Task

    cls = import_path(config.task.path, "task.path")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise InputError(f"task.path: {config.task.path} is not a fabric_trainer.Task")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "args")
    try:
        arguments = parser.parse_object({"args": config.task.args}).args
    except Exception as error:  # argparse's and jsonargparse's own kinds: all about the arguments
        raise InputError(f"task.{' '.join(str(error).split())}") from None
    config.task.args = arguments.as_dict() if arguments is not None else {}
    try:
        return cls(**config.task.args)  # type: ignore[no-any-return]
    except ValueError as error:
        raise InputError(f"task.args: {error}") from None


def explain(state: State, choice: Choice | None) -> None:
    """The start-up summary, on rank 0."""
    from rich.console import Console

    from fabric_trainer.summary import print_summary

    if state.fabric.is_global_zero:
        lines = state.describe()
        if choice is not None:
            lines |= {"folder": str(choice.folder)}
            lines |= {"resumed from": str(choice.resume_from)} if choice.resume_from else {}
        print_summary(Console(), modules=state.modules, order_lines=lines)


def print_metrics(metrics: dict[str, float]) -> None:
    """A plain line per metric, such as ``val/nrmse 0.0142``."""
    for name, value in metrics.items():
        if "/" in name:
            print(f"{name} {value:.4f}" if abs(value) >= 1e-3 else f"{name} {value:.3e}", flush=True)


def _init_from(state: State, path: str) -> None:
    from fabric_trainer import checkpoint
    from fabric_trainer.portable import shared

    saved = shared(state.fabric, lambda: checkpoint.load(Path(path)))
    state.load_weights(saved | {"ema": None})  # the average starts at the weights
    state.fabric.print(f"weights from {path}")


def _callbacks(config: Config) -> list[Any]:
    from fabric_trainer.imports import import_path

    return [import_path(path, "callbacks")() for path in config.callbacks]


def _anywhere(fabric: Fabric, flag: bool) -> bool:
    """Whether it is true of any rank; all ranks together."""
    import torch

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
