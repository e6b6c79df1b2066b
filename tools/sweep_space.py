"""What a sweep varies: ``key=log(1e-4,1e-1)``, ``key=(0,0.3)``, ``key=[8,16,32]``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from fabric_trainer.errors import InputError

if TYPE_CHECKING:
    import optuna

FORMS = "log(1e-4,1e-1), (0,0.3) or [8,16,32]"


@dataclass(frozen=True)
class Parameter:
    """A key of the configuration and what it may be: one of ``choices``, or a number from low to high, both included;
    whole numbers where ``whole``. log: every order of magnitude alike. text: as it was given."""

    key: str
    text: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False

    def extremes(self) -> tuple[str, ...]:
        """Values that have to be right for all to be right."""
        return self.choices or tuple(str(int(end) if self.whole else end) for end in (self.low, self.high))

    def suggest(self, trial: optuna.Trial) -> str:
        """A trial's value, as it stands on the command line."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)  # type: ignore[return-value]
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))


def parse(text: str) -> Parameter:
    """A parameter from ``key=…``. Ends without a point or an exponent mean whole numbers. Raises InputError."""
    key, _, values = (part.strip() for part in text.partition("="))
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(f"--param {text}: must be key={FORMS}")
    if found := re.fullmatch(r"(log)?\(([^,()]+),([^,()]+)\)", values):
        return _range(key, text, bool(found[1]), found[2].strip(), found[3].strip())
    return Parameter(key, text, choices=_choices(text, values))


def _range(key: str, text: str, log: bool, low: str, high: str) -> Parameter:
    try:
        made = Parameter(key, text, (), float(low), float(high), _is_whole(low) and _is_whole(high), log)
    except ValueError:
        raise InputError(f"--param {text}: the ends of a range are numbers, not {low} and {high}") from None
    if not made.low < made.high < float("inf"):
        raise InputError(f"--param {text}: the first end must be below the second")
    if log and made.low <= 0:
        raise InputError(f"--param {text}: the ends of a log range must be above 0")
    return made


def _choices(text: str, values: str) -> tuple[str, ...]:
    try:
        found = yaml.safe_load(values)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, list) or not found:
        raise InputError(f"--param {text}: must be key={FORMS}")
    # what is no text in the way that the command line reads again
    made = tuple(value if isinstance(value, str) else json.dumps(value) for value in found)
    if len(set(made)) < len(made):
        raise InputError(f"--param {text}: a choice comes twice")
    return made


def _is_whole(number: str) -> bool:
    return re.fullmatch(r"[-+]?\d+", number) is not None
