"""docs/configuration.md says what the dataclasses say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fabric_trainer.config import (
    Config,
    LookaheadConfig,
    MlflowConfig,
    OtherConfig,
    SamConfig,
    WandbConfig,
    flatten,
    to_yaml,
)
from tools import reference


def rows(text: str) -> dict[str, list[str]]:
    """key -> its type, default and meaning."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 for row in cells)
    return {key.strip(" `"): [cell.strip() for cell in rest] for key, *rest in cells}


def test_the_page_is_not_stale(capsys):
    assert reference.main(["--check"]) == 0, "python -m tools.reference writes it anew"


def test_a_stale_page_is_found_and_written_anew(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert reference.main(["--check", "--page", str(page)]) == 1, "there is none"
    page.write_text(reference.PAGE.read_text().replace("`run.max_steps`", "`run.steps`"))
    assert reference.main(["--check", "--page", str(page)]) == 1
    assert f"{page} is stale" in capsys.readouterr().err
    assert reference.main(["--page", str(page)]) == 0
    assert reference.main(["--check", "--page", str(page)]) == 0


def test_every_key_has_one_row_its_default_and_a_meaning():
    import yaml

    found = rows(reference.PAGE.read_text())
    tree = yaml.safe_load(to_yaml(Config()))
    inner = {
        "loggers.wandb": WandbConfig(),
        "loggers.mlflow": MlflowConfig(),
        "optim.others": OtherConfig(),
        "optim.lookahead": LookaheadConfig(),
        "optim.sam": SamConfig(),
    }
    expected = flatten(tree) | flatten({key: vars(section) for key, section in inner.items()})
    assert found.keys() == expected.keys()
    for key, (_, default, meaning) in found.items():
        assert yaml.safe_load(default.strip("`")) == expected[key], key
        assert meaning.endswith("."), key


@dataclass
class Inner:
    """For lists."""

    depth: int = 3
    """Of it."""


@dataclass
class Some:
    """A section
    over two lines."""

    mode: Literal["skip", "raise"] | None = "skip"
    """What <it> does with a | b * c."""
    tree: dict[str, Any] = field(default_factory=dict)
    """One
    line."""
    many: list[Inner] = field(default_factory=list)
    """More."""


def test_types_and_signs_of_markdown_are_readable():
    text = "\n".join(reference.section(Some, "some."))
    assert "## some\n\nA section over two lines." in text and "## some.many\n\nFor lists." in text
    assert rows(text) == {
        "some.mode": [r"skip \| raise \| null", "`skip`", r"What &lt;it> does with a \| b \* c."],
        "some.tree": ["mapping", "`{}`", "One line."],
        "some.many": ["list of mapping", "`[]`", "More."],
        "some.many.depth": ["int", "`3`", "Of it."],
    }
