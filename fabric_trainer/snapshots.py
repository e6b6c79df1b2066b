"""Snapshots of the power-function averages, in ``runs/<name>/ema/``; ``tools/ema`` makes other widths of them.

A file each, written and verified as checkpoints are, and never rotated away: a dict of ``averages`` (label -> what is
averaged, by name), ``power`` (label -> its width and the step it began after), ``rest`` (what of the network's state is
not averaged), ``counters`` and ``config``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fabric_trainer.checkpoint import Checkpoints, check_finite, take_part
from fabric_trainer.config import CheckpointConfig
from fabric_trainer.files import remove
from fabric_trainer.state import FORMAT, State

FOLDER = "ema"


class Snapshots:
    """Of a run, on every rank; rank 0's writes. folder: the run's, or None.

    Those of after the run's present window, which it will make again, are deleted.
    """

    def __init__(self, state: State, folder: Path | None) -> None:
        self.state = state
        self.files: Checkpoints | None = None
        if folder is None or not state.fabric.is_global_zero:
            return
        if state.config.ema.snapshots or (folder / FOLDER).is_dir():
            self.files = Checkpoints(folder / FOLDER, CheckpointConfig())
            for name, entry in self.files.index.items():
                if entry["window"] > state.counters.window:
                    remove(self.files.folder / name)
            self.files.forget_after(state.counters.window)

    def save(self) -> None:
        """Copy the averages now and write them in the background; all ranks together. Nothing before they begin.
        Raises CheckpointError, where it is from the background for the write before."""
        state, ema, counters = self.state, self.state.ema, asdict(self.state.counters)
        begun = [label for label in ema.widths if ema.starts[label] < counters["step"]] if ema else []
        if ema is None or not begun:
            return
        averages = {label: ema.averaged(label) for label in begun}
        learned = {name for name, _ in state.module.named_parameters()}
        check_finite({label: {name: own[name] for name in learned} for label, own in averages.items()})
        averaged = averages[begun[0]]
        tree = {
            "format": FORMAT,
            "averages": averages,
            "power": {label: {"width": ema.widths[label], "start": ema.starts[label]} for label in begun},
            "rest": {name: value for name, value in state.module.state_dict().items() if name not in averaged},
            "counters": counters,
            "config": asdict(state.config),
        }
        if self.files is not None:
            self.files.save(tree, counters, {}, keep=True)
        else:
            take_part(tree)

    def check(self) -> None:
        """Raise CheckpointError where the write in the background failed."""
        if self.files is not None:
            self.files.check()

    def wait(self) -> None:
        """Until the last one is on disk. Raises CheckpointError where it could not be written."""
        if self.files is not None:
            self.files.wait()
