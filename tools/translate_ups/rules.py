"""How a key of the original's configuration files is translated: what a rule looks at, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.translate_ups.samples import Samples

OPERATOR, RESIDUAL, DISTILL, PRIOR = STAGES = ("operator", "diff_residual", "consistency_distill", "steady_prior")
EVALUATION = "evaluation"

Ours = dict[str, Any]  # our keys, dotted
Said = Ours | str | tuple[Ours, str]  # what a value becomes, with a remark; or why it has no effect
Say = Callable[[Any, "Asked"], Said]
Kind = Callable[[Any], Any]


@dataclass(frozen=True)
class Asked:
    """What is to be translated.

    stage: of STAGES, or evaluation. given: the file's keys, dotted, each of its rule's kind. values: the same without
    those that are null, and what the original takes for keys that are left out. devices: how many. samples: of an
    epoch.
    """

    stage: str
    given: Mapping[str, Any]
    values: Mapping[str, Any]
    devices: int
    samples: Samples
    alone: bool

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.values.get(key, otherwise)

    def own(self, key: str) -> str:
        """A key of the stage."""
        return f"stages.{self.stage}.{key}"

    def optimizer(self, key: str, otherwise: Any = None) -> Any:
        """Of the stage's optimizer; where it has none, of that of all stages."""
        section = self.own("optimizer") if self.has(self.own("optimizer")) else "optimizer"
        return self.get(f"{section}.{key}", otherwise)

    def has(self, section: str) -> bool:
        return any(key.startswith(f"{section}.") for key in self.given)

    @property
    def epochs(self) -> int:
        return int(self.get(self.own("epochs"), 0))

    @property
    def sharded(self) -> bool:
        return self.devices > 1 and bool(self.get("training.use_fsdp2"))


class Rule(NamedTuple):
    """kind: reads a value; ValueError, which says what it should be, for another. say: what it becomes. default: what
    the original takes where the file has none, or null. null: what a null means where there is no default."""

    kind: Kind
    say: Say
    default: Any = None
    null: str = "as if it were left out"


# ---- kinds of values ----------------------------------------------------------------------------------------------


def number(value: Any) -> float | int:
    """1e-3, without a point, is text to YAML."""
    try:
        read = float(value) if isinstance(value, str) else value
    except ValueError:
        read = None
    if isinstance(read, bool) or not isinstance(read, int | float):
        raise ValueError("a number")
    return read


def whole(value: Any) -> int:
    try:
        read = number(value)
    except ValueError:
        read = 0.5
    if not float(read).is_integer():
        raise ValueError("a whole number")
    return int(read)


def truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def anything(value: Any) -> Any:
    return value


def several(kind: Kind) -> Kind:
    """A list; a single value is one of one."""
    return lambda value: [kind(each) for each in (value if isinstance(value, list) else [value])]


# ---- rules that most keys need ------------------------------------------------------------------------------------


def to(name: str, kind: Kind, default: Any = None) -> Rule:
    """The same value under another name."""
    return Rule(kind, lambda value, asked: {name: value}, default)


def nothing(reason: str) -> Rule:
    return Rule(anything, lambda value, asked: reason)


def only(stages: tuple[str, ...], rule: Rule) -> Rule:
    """A rule of some of the stages."""

    def say(value: Any, asked: Asked) -> Said:
        return rule.say(value, asked) if asked.stage in stages else f"for {', '.join(stages)}"

    return rule._replace(say=say)


def training(rule: Rule) -> Rule:
    """A rule of the stages that train."""

    def say(value: Any, asked: Asked) -> Said:
        return rule.say(value, asked) if asked.stage in STAGES else "for training"

    return rule._replace(say=say)


def where(key: str, rule: Rule) -> Rule:
    """A rule that counts where ``key`` is true."""

    def say(value: Any, asked: Asked) -> Said:
        return rule.say(value, asked) if asked.get(key) else f"{key} is false"

    return rule._replace(say=say)


def unless_own(name: str, rule: Rule) -> Rule:
    """A rule of ``training.<name>``, in whose place the stage's own stands, null or not."""

    def say(value: Any, asked: Asked) -> Said:
        own = asked.own(name)
        return f"{own} stands in its place" if own in asked.given else rule.say(value, asked)

    return rule._replace(say=say)
