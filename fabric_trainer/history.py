"""history.json: every evaluation and every epoch of a run, for people, the report and tools."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fabric_trainer.files import write_atomically

FILE = "history.json"

Entry = dict[str, float]
"""One line of the history: counters as ints, metrics as floats."""


class History:
    """The evaluations and epochs so far, in order.

    evaluations: {"step", "epoch", "window", "samples", "seconds", "val/…": …}; epochs: {"epoch", "step",
    "train_epoch/loss": …}; tests: {"step", "test/…": …}, the step of the weights measured, at most one. It travels in
    the checkpoint, so that loading one is the cut-back to its step.
    """

    def __init__(self) -> None:
        self.evaluations: list[Entry] = []
        self.epochs: list[Entry] = []
        self.tests: list[Entry] = []

    def add_evaluation(self, values: Mapping[str, float]) -> None:
        """Append one evaluation: its counters and metrics."""
        self.evaluations.append(dict(values))

    def add_epoch(self, values: Mapping[str, float]) -> None:
        """Append one finished epoch: its number, its last step and its exact means."""
        self.epochs.append(dict(values))

    def add_test(self, values: Mapping[str, float]) -> None:
        """The measurement of the test split, after the last update."""
        self.tests = [dict(values)]

    def best(self, metric: str | None, mode: str) -> Entry | None:
        """The evaluation with the smallest (mode min) or largest finite value of the metric; of equals the first."""
        measured = [entry for entry in self.evaluations if math.isfinite(entry.get(metric or "", math.nan))]
        return (min if mode == "min" else max)(measured, key=lambda entry: entry[metric or ""], default=None)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the lists: plain lists, dicts and numbers."""
        return copy.deepcopy({"evaluations": self.evaluations, "epochs": self.epochs, "tests": self.tests})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by ``state``; what came after it is forgotten."""
        self.evaluations, self.epochs = copy.deepcopy((state["evaluations"], state["epochs"]))
        self.tests = copy.deepcopy(state.get("tests", []))

    def write(self, folder: Path) -> None:
        """Write ``folder``/history.json, whole or not at all; :func:`read_history` reads it."""
        write_atomically(folder / FILE, to_json(self.state_dict()))


def read_history(folder: Path) -> History:
    """The history that ``write`` left in ``folder``. Raises OSError, and ValueError where it isn't one."""
    state = _decode(json.loads((folder / FILE).read_text(encoding="utf-8")))
    if not isinstance(state, dict) or {"evaluations", "epochs"} - set(state):
        raise ValueError(f"{folder / FILE}: expected a JSON object with 'evaluations' and 'epochs'")
    history = History()
    history.load_state_dict(state)
    return history


def to_json(tree: dict[str, Any]) -> str:
    """JSON of plain values and arrays. It has no NaN or infinity: they are the strings "NaN", "Infinity" and
    "-Infinity", which ``float`` of Python and ``Number`` of JavaScript read back."""
    return json.dumps(_encode(tree), indent=1, allow_nan=False) + "\n"


_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, np.ndarray):
        return _encode(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NONFINITE.get(value, value) if isinstance(value, str) else value
