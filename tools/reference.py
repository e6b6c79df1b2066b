"""Write docs/configuration.md, every key of a run, from the dataclasses: ``python -m tools.reference [--check]``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from fabric_trainer.config import Config
from fabric_trainer.errors import FAILED, FINISHED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """\
# Configuration

Every key of a run. A YAML file has the sections as mappings (`optim: {lr: 3e-4}`), the command line has dots
(`--optim.lr 3e-4`) and wins; an unknown key is an error. `python train.py --help` prints the same.

Written by `python -m tools.reference` from `fabric_trainer/config*.py`: change the docstrings there, not this page.

"""
NAMES = {int: "int", float: "float", str: "text", bool: "true | false", NoneType: "null", Any: "any"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="another page than docs/")
    arguments = parser.parse_args(argv)
    text = HEAD + "\n".join(section(Config, "")) + "\n"
    if not arguments.check:
        arguments.page.write_text(text, encoding="utf-8")
    elif not arguments.page.is_file() or arguments.page.read_text(encoding="utf-8") != text:
        print(f"{arguments.page} is stale: python -m tools.reference writes it anew", file=sys.stderr)
        return FAILED
    return FINISHED


def section(cls: type, prefix: str) -> Iterator[str]:
    """Markdown: what the section is for, a table of its keys, then the sections in it."""
    meanings = {entry.arg_name: " ".join((entry.description or "").split()) for entry in parse_from_object(cls).params}
    types, inner = get_type_hints(cls), {}
    if prefix:
        yield f"## {prefix.rstrip('.')}\n"
        yield f"{_escaped(' '.join((cls.__doc__ or '').split()))}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key in fields(cls):
        if nested := _nested(types[key.name]):
            inner[key.name] = nested
        if is_dataclass(types[key.name]):
            continue
        kind, meaning = _escaped(type_name(types[key.name])), _escaped(meanings.get(key.name, ""))
        yield f"| `{prefix}{key.name}` | {kind} | `{default(key)}` | {meaning} |"
    yield ""
    for name, nested in inner.items():
        yield from section(nested, f"{prefix}{name}.")


def type_name(kind: Any) -> str:
    """As a user writes it: ``skip | raise``, ``int | null``, ``list of text``."""
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(type_name(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {type_name(get_args(kind)[0])}"
    return "mapping" if get_origin(kind) is dict or is_dataclass(kind) else NAMES[kind]


def default(key: Field[Any]) -> str:
    """In YAML, on one line."""
    value = key.default_factory() if key.default_factory is not MISSING else key.default
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _nested(kind: Any) -> type | None:
    """The dataclass of a section, also of one that may be null, or of a list's entries."""
    return kind if is_dataclass(kind) else next(filter(None, map(_nested, get_args(kind))), None)


def _escaped(text: str) -> str:
    return re.sub(r"([|*])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
