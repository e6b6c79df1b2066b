"""What is said before the first update: the network, and how it will be trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.parameter import Parameter, is_lazy

WIDTH = 100  # columns at most; a terminal that has fewer gets fewer


@dataclass(frozen=True, slots=True)
class _Row:
    """One module, its submodules included."""

    name: str
    kind: str
    depth: int
    parameters: int
    trainable: int
    bytes: int
    lazy: bool  # has parameters whose shape isn't known yet; they count nothing


def module_table(network: nn.Module, depth: int = 2) -> Table:
    """The network's modules down to ``depth``, with their parameters, how many of them train, and their bytes.

    A row counts its submodules too. A parameter that several modules share counts once, where it comes first, so
    that the rows of a level (and what a module holds itself) add up to the row above. Neighbours that are alike are
    folded into one row, "blocks.0–11, 12 × Block", with their sum. Parameters not yet initialised count nothing and
    are marked "+ lazy". Buffers are not counted.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("name", no_wrap=True, overflow="ellipsis")
    table.add_column("type", no_wrap=True, overflow="ellipsis")
    for heading in ("parameters", "trainable", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    whole, *parts = _walk(network, "", 0, depth, set(), set())
    for row in parts:
        table.add_row(*_cells(row))
    table.add_row(*_cells(replace(whole, name="total")), style="bold")
    return table


@dataclass(frozen=True, slots=True)
class Layer:
    """A module that has parameters of its own, or no modules in it. parameters: name in it -> shape."""

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]]


def layers(network: nn.Module) -> list[Layer]:
    """Of the network, in order. Parameters not yet initialised are left out."""
    found = []
    for name, module in network.named_modules():
        own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if not is_lazy(p)}
        if own or not list(module.children()):
            found.append(Layer(name, type(module).__name__, own))
    return found


def print_summary(console: Console, *, modules: Table, order_lines: Mapping[str, str]) -> None:
    """Print the network's table (``module_table``) and, below it, ``order_lines`` (label -> text) in two columns."""
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    console.print(modules, width=width)
    console.print()
    block = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    for label, text in order_lines.items():
        block.add_row(Text(label), Text(text))
    console.print(block, width=width)
    console.print()


def _walk(module: nn.Module, name: str, level: int, depth: int, seen: set[int], modules: set[int]) -> list[_Row]:
    """The row of ``module``, then those of its submodules to ``depth``. seen, modules: the ids counted already."""
    modules.add(id(module))
    own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    seen.update(id(p) for p in own)
    children = [
        _walk(child, f"{name}.{key}" if name else key, level + 1, depth, seen, modules)
        for key, child in module.named_children()
        if id(child) not in modules  # a module used under two names is one module
    ]
    whole = [p for p in own if not is_lazy(p)]
    direct = [rows[0] for rows in children]
    row = _Row(
        name=name,
        kind=type(module).__name__,
        depth=level,
        parameters=sum(p.numel() for p in whole) + sum(r.parameters for r in direct),
        trainable=sum(p.numel() for p in whole if p.requires_grad) + sum(r.trainable for r in direct),
        bytes=sum(_bytes(p) for p in whole) + sum(r.bytes for r in direct),
        lazy=len(whole) < len(own) or any(r.lazy for r in direct),
    )
    return [row, *(_fold(children) if level < depth else [])]


def _fold(children: list[list[_Row]]) -> list[_Row]:
    """The children's rows; numbered neighbours that are alike, insides included, as one."""
    folded: list[_Row] = []
    for _, group in groupby(children, key=_likeness):
        alike = list(group)
        folded += [_sum(list(rows)) for rows in zip(*alike, strict=True)] if len(alike) > 1 else alike[0]
    return folded


def _likeness(rows: list[_Row]) -> list[_Row]:
    """The rows without the number in their names; a name that isn't a number stays, so that it equals no other."""
    prefix = rows[0].name
    if not prefix.rpartition(".")[2].isdigit():
        return rows
    return [replace(row, name=row.name.removeprefix(prefix)) for row in rows]


def _sum(rows: list[_Row]) -> _Row:
    """Equal rows as one: "blocks.0", … "blocks.11" become "blocks.0–11", and "blocks.0.norm", … "blocks.0–11.norm"."""
    first, last = rows[0].name.split("."), rows[-1].name.split(".")
    name = ".".join(a if a == b else f"{a}–{b}" for a, b in zip(first, last, strict=True))
    return replace(
        rows[0],
        name=name,
        kind=f"{len(rows)} × {rows[0].kind}",
        parameters=sum(r.parameters for r in rows),
        trainable=sum(r.trainable for r in rows),
        bytes=sum(r.bytes for r in rows),
    )


def _bytes(parameter: Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def _cells(row: _Row) -> list[Text]:
    lazy = " + lazy" if row.lazy else ""
    numbers = [f"{row.parameters:,}{lazy}", f"{row.trainable:,}", _size(row.bytes)]
    if not row.parameters and not row.lazy:
        numbers = ["–", "–", "–"]
    return [Text(cell) for cell in ("  " * max(0, row.depth - 1) + row.name, row.kind, *numbers)]


def _size(count: int) -> str:
    """ "512 B", "33.6 MB": powers of 1000, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
