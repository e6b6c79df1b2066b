"""The command line and the YAML file, read by jsonargparse: every key of ``config.py``, and what to do.

Imports neither torch nor lightning, so that ``--help`` and every complaint about a key come at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from fabric_trainer.checks import check
from fabric_trainer.config import DEFAULT_CONFIG, Config
from fabric_trainer.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
SUFFIXES = {"lr": (".png", ".svg", ".pdf"), "batch_size": (".json",)}  # of what --tune writes


@dataclass
class Command:
    """What a command line asks for beside its configuration."""

    config: str = DEFAULT_CONFIG
    resume: str | None = None
    init_from: str | None = None
    overwrite: bool = False
    evaluate: str | None = None
    split: str = "val"
    dry_run: bool = False
    fast_dev_run: bool = False
    predict: str | None = None
    out: str | None = None
    tune: str | None = None
    strategies: bool = False
    given: frozenset[str] = frozenset()  # configuration keys set on the command line itself

    @property
    def config_name(self) -> str:
        return Path(self.config).stem


def parse(argv: Sequence[str]) -> tuple[Command, Config]:
    """The command and its configuration. Raises InputError; ``--help`` and ``--print_config`` print and exit 0."""
    flags, rest = _command_parser().parse_known_args(list(argv))
    parser = _config_parser()
    if {"-h", "--help"} & set(rest):
        parser.parse_args(["--help"])
    command = Command(**vars(flags))
    _check_command(command)
    if command.strategies:
        return command, Config()
    if not Path(flags.config).is_file():
        raise InputError(f"--config {flags.config}: there is no such file")
    config = _dataclass(parser, parser.parse_args([f"--config={flags.config}", *rest]))
    command.given = frozenset(arg[2:].split("=")[0].rstrip("+") for arg in rest if arg.startswith("--"))
    return command, config


def load(path: Path | str) -> Config:
    """The configuration in a YAML file. Raises InputError."""
    parser = _config_parser()
    return _dataclass(parser, parser.parse_args([f"--config={path}"]))


def from_checkpoint(tree: dict[str, Any], argv: Sequence[str] = ()) -> Config:
    """The configuration that a checkpoint has, changed by further keys as on a command line. Raises InputError."""
    parser = _config_parser()
    return _dataclass(parser, parser.parse_args(list(argv), namespace=parser.parse_object(tree)))


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(plain(message))


def plain(message: str) -> str:
    """jsonargparse's, on one line and without its own words for keys and types."""
    message = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(message.split()))
    message = re.sub(r"a typing\.Literal(\[[^]]*\])", r"one of \1", message)
    return re.sub(r"<class '(\w+)'>", r"\1", message)


@cache  # it takes longer than what it parses
def _config_parser() -> _Parser:
    parser = _Parser(
        description="Train a task on Lightning Fabric. Every key below may stand in a YAML file too.",
        usage="%(prog)s [--config FILE] [--key value ...] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=_command_parser().format_help().split("\n\n", 1)[1],
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(Config, None)
    for action in parser._actions:
        if action.metavar == "CONFIG":
            action.help = argparse.SUPPRESS  # a section from a file of its own: possible, but noise here
    return parser


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument_group("what to do").add_argument
    add("--config", default=DEFAULT_CONFIG, metavar="FILE", help=f"the run's YAML file (default: {DEFAULT_CONFIG})")
    add("--resume", metavar="auto|PATH|none", help="continue a run, or from one checkpoint")
    add("--init_from", metavar="PATH", help="start from a checkpoint's weights alone")
    add("--overwrite", action="store_true", help="delete the run of that name first")
    add("--evaluate", metavar="PATH|best|last", help="measure a checkpoint instead of training")
    add("--predict", metavar="PATH|best|last", help="write a checkpoint's predictions to --out instead of training")
    add("--tune", metavar="lr|batch_size", help="find the learning rate, or the largest micro-batch, and train nothing")
    add("--out", metavar="FILE", help="with --predict, --tune and --evaluate (metrics as JSON): where to")
    add("--split", metavar="NAME", help="with --evaluate and --predict: which split (default: val)")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    add("--fast_dev_run", action="store_true", help="one update, one evaluation batch, no run folder")
    add("--strategies", action="store_true", help="print what each strategy can do")
    return parser


def _check_command(command: Command) -> None:
    if command.predict and not command.out:
        raise InputError(f"--predict {command.predict} needs --out FILE, where the predictions go")
    if command.out and not (command.predict or command.tune or command.evaluate):
        raise InputError(f"--out {command.out} is for --predict, --evaluate or --tune, none of which is given")
    if command.predict and command.evaluate:
        raise InputError("--predict and --evaluate are both given: one at a time")
    if command.evaluate and command.out and Path(command.out).suffix != ".json":
        raise InputError(f"--out {command.out}: --evaluate writes .json")
    if command.tune:
        _check_tune(command)


def _check_tune(command: Command) -> None:
    if command.tune not in SUFFIXES:
        raise InputError(f"--tune must be {' or '.join(SUFFIXES)}, not {command.tune}")
    others = ("resume", "overwrite", "evaluate", "predict", "dry_run", "fast_dev_run")
    if given := [name for name in others if getattr(command, name)]:
        raise InputError(f"--tune and --{given[0]} are both given: one at a time")
    suffixes = SUFFIXES[command.tune]
    if command.out and Path(command.out).suffix not in suffixes:
        raise InputError(f"--out {command.out}: --tune {command.tune} writes {', '.join(suffixes)}, by the suffix")


def _dataclass(parser: _Parser, namespace: jsonargparse.Namespace) -> Config:
    namespace.pop("config", None)
    _check_sections(Config, namespace)
    config = Config(**vars(parser.instantiate(namespace)))
    check(config)
    return config


def _check_sections(cls: type, namespace: jsonargparse.Namespace, prefix: str = "") -> None:
    for section in fields(cls):
        if is_dataclass(section.default_factory):
            value = namespace[section.name]
            if not isinstance(value, jsonargparse.Namespace):
                raise InputError(f"{prefix}{section.name}: is a section of keys, not {value!r}")
            _check_sections(section.default_factory, value, f"{prefix}{section.name}.")
