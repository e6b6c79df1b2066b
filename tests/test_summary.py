"""The table of modules against sums over ``network.parameters()``."""

import io

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fabric_trainer.summary import WIDTH, module_table, print_summary


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)


class Network(nn.Module):
    """Tied weights, repeated blocks, a frozen part, a parameter of its own and two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([*(Block(8) for _ in range(3)), Block(4)])
        self.head = nn.Linear(8, 50)
        self.head.weight = self.embed.weight
        self.again = self.blocks[0]
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.blocks[1].requires_grad_(False)


def cells(table: Table) -> dict[str, list[str]]:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return {name.strip(): list(rest) for name, *rest in zip(*columns, strict=True)}


def number(text: str) -> int:
    return 0 if text == "–" else int(text.replace(",", ""))


def test_total_is_the_sum_over_parameters() -> None:
    network = Network()
    total = cells(module_table(network))["total"]
    parameters = list(network.parameters())
    assert total[0] == "Network"
    assert number(total[1]) == sum(p.numel() for p in parameters)
    assert number(total[2]) == sum(p.numel() for p in parameters if p.requires_grad)
    assert total[3] == f"{sum(p.numel() * p.element_size() for p in parameters) / 1000:.1f} kB"


def test_shared_parameters_count_once_where_they_come_first() -> None:
    table = cells(module_table(Network(), depth=1))
    assert number(table["embed"][1]) == 50 * 8
    assert number(table["head"][1]) == 50  # the bias alone
    assert "again" not in table
    assert sum(number(row[1]) for name, row in table.items() if name != "total") + 3 == number(table["total"][1])


def test_rows_of_a_level_add_up() -> None:
    table = cells(module_table(Network(), depth=2))
    inner = [row for name, row in table.items() if name.startswith("blocks.")]
    for column in (1, 2):
        assert sum(number(row[column]) for row in inner) == number(table["blocks"][column])


def test_equal_neighbours_fold_and_others_do_not() -> None:
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)), nn.Linear(4, 5), nn.Linear(4, 4))
    table = cells(module_table(network, depth=1))
    assert list(table) == ["0–11", "12", "13", "total"]
    assert table["0–11"][:2] == ["12 × Linear", "240"]
    frozen = cells(module_table(Network(), depth=2))
    assert {"blocks.0", "blocks.1", "blocks.2", "blocks.3"} < set(frozen)  # blocks.1 is frozen, so unlike the others
    named = cells(module_table(nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)})))
    assert list(named) == ["q", "k", "total"]
    deep = cells(module_table(nn.ModuleList([Block(4), Block(4)]), depth=2))
    assert deep["0–1.norm"] == ["2 × LayerNorm", "16", "16", "64 B"]


def test_depth_limits_the_rows_not_the_sums() -> None:
    network = Network()
    for depth in (0, 1, 2, 5):
        table = cells(module_table(network, depth))
        assert number(table["total"][1]) == sum(p.numel() for p in network.parameters())
        assert max(name.count(".") for name in table) < max(depth, 1)


def test_lazy_modules_are_tolerated() -> None:
    table = cells(module_table(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4)), depth=1))
    assert table["1"][1] == "0 + lazy"
    assert table["total"][1] == "9 + lazy"


def test_bare_module_and_module_without_parameters() -> None:
    assert cells(module_table(nn.Linear(3, 4)))["total"][1:] == ["16", "16", "64 B"]
    assert cells(module_table(nn.ReLU()))["total"][1:] == ["–", "–", "–"]


@pytest.mark.parametrize("size, shown", [(999, "999 B"), (1000, "1.0 kB"), (99_960, "100 kB"), (2 * 10**9, "2.0 GB")])
def test_sizes(size: int, shown: str) -> None:
    network = nn.Module()
    network.register_parameter("p", nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False))
    assert cells(module_table(network))["total"][3] == shown


def test_summary_is_plain_narrow_text_off_a_terminal() -> None:
    stream = io.StringIO()
    lines = {"batch": "32 micro × 4 accumulate × 1 rank = 128", "folder": "runs/[bold]name", "long": "word " * 60}
    print_summary(Console(file=stream, width=300), modules=module_table(Network()), order_lines=lines)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "batch    32 micro × 4 accumulate × 1 rank = 128" in text
    assert "runs/[bold]name" in text  # no markup in what is printed
    assert text.split().count("word") == 60
    assert text.index("total") < text.index("batch")
