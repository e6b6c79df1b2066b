"""The command line: train, measure a checkpoint, predict, or only check.

Imports torch once the command has been understood.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fabric_trainer.command import Command, parse, plain
from fabric_trainer.config import Config, data_root
from fabric_trainer.errors import (
    FAILED,
    FINISHED,
    INPUT,
    INTERRUPTED,
    SMALLER,
    BadGradientError,
    CheckpointError,
    CompileError,
    InputError,
    OutOfMemoryRestart,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from fabric_trainer.task import Task

# errors of one line
CODES = {
    InputError: INPUT,
    BadGradientError: FAILED,
    CheckpointError: FAILED,
    CompileError: FAILED,
    OutOfMemoryRestart: SMALLER,
}


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


def _on_rank(fabric: Fabric, *arguments: Any) -> int:
    from fabric_trainer.jobs import run_job
    from fabric_trainer.lifeline import Lifeline

    with Lifeline(fabric.global_rank, fabric.world_size, fabric.broadcast, _code, tuple(CODES)):
        return run_job(fabric, *arguments)


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


def dry_run(config: Config) -> int:
    """Check the configuration without touching a device or a file; list what this machine lacks for a real run."""
    problems = examine(config)
    print("the configuration is valid")
    if config.batch.micro_batch_size == "auto":
        print("batch.micro_batch_size auto: found at the start of the run")
    if problems:
        print("would stop a real run:", *problems, sep="\n  ")
    return FINISHED


def examine(config: Config) -> list[str]:
    """What this machine lacks for a real run, a line each. Raises InputError for what no machine could run."""
    from fabric_trainer import strategies
    from fabric_trainer.batch import resolve_accumulate, sizes
    from fabric_trainer.optim import optimizer_classes

    task = make_task(config)
    _callbacks(config)
    optimizer_classes(config.optim)
    problems = strategies.problems(config) + task.missing(data_root(config))
    ranks, auto = strategies.count_devices(config.fabric), config.batch.micro_batch_size == "auto"
    sizes(config.batch, ranks) if auto else resolve_accumulate(config.batch, ranks)
    return problems


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
        arguments = parser.parse_object({"args": config.task.args}).get("args")  # none where it takes none
    except Exception as error:  # argparse's and jsonargparse's own kinds: all about the arguments
        raise InputError(f"task.{plain(str(error))}") from None
    config.task.args = arguments.as_dict() if arguments is not None else {}
    try:
        task: Task = cls(**config.task.args)
    except ValueError as error:
        raise InputError(f"task.args: {error}") from None
    task.data_config = config.data
    return task


def _callbacks(config: Config) -> list[Any]:
    from fabric_trainer.imports import import_path

    return [import_path(path, "callbacks")() for path in config.callbacks]
