"""Make a power-function average of any width of a run's snapshots, when training is over: EDM2 (arXiv 2312.02696).

``python -m tools.ema runs/NAME --width 0.12 [--step N] --out FILE.pt``. The file is a checkpoint of weights alone,
which ``--evaluate``, ``--predict`` and ``--init_from`` take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_trainer.checkpoint import read, read_index, write
from fabric_trainer.checks import WIDEST
from fabric_trainer.errors import FAILED, FINISHED, INPUT, CheckpointError, InputError
from fabric_trainer.power import Fit, exponent, fit
from fabric_trainer.snapshots import FOLDER
from fabric_trainer.state import FORMAT

POOR = 0.05  # relative profile error above which the widths saved are said to be too far away


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.ema", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER", help="such as runs/x, trained with ema.snapshots")
    parser.add_argument(
        "--width", type=float, required=True, help="relative to the run: 0.1 averages about its last fifth"
    )
    parser.add_argument("--step", type=int, help="as after this snapshot; by default the last")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.pt", help="the checkpoint to write")
    arguments = parser.parse_args(argv)
    try:
        out = arguments.out
        if out.exists() or not out.parent.is_dir():
            raise InputError(f"--out {out}: " + ("it exists" if out.exists() else f"there is no folder {out.parent}"))
        made = synthesise(arguments.run, arguments.width, arguments.step)
        for line in made.lines:
            print(line)
        write(out, made.saved)
        print(out)
    except (InputError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


@dataclass(frozen=True)
class Synthesis:
    saved: dict[str, Any]  # as a checkpoint that has weights alone
    fit: Fit
    lines: list[str]  # what to tell of it


def synthesise(run: Path, width: float, step: int | None = None) -> Synthesis:
    """The average of ``width`` after ``step`` updates: the nearest sum of all averages in the snapshots up to there.

    Raises InputError where the run has no such snapshot, CheckpointError where one is damaged.
    """
    if not 0 < width < WIDEST:
        raise InputError(f"--width {width}: a relative width is above 0 and below {WIDEST:.4f}")
    snapshots = read_snapshots(run / FOLDER, step)
    last = snapshots[-1]
    # of one profile that all share: those that began with the earliest of the last snapshot
    start = min(kept["start"] for kept in last["power"].values())
    names = next(iter(last["averages"].values())).keys()
    parts = [
        (snapshot["averages"][label], kept["width"], snapshot["counters"]["step"] - start)
        for snapshot in snapshots
        for label, kept in snapshot["power"].items()
        if kept["start"] == start and snapshot["averages"][label].keys() == names
    ]
    steps = last["counters"]["step"]
    found = fit([(exponent(own), updates) for _, own, updates in parts], (exponent(width), steps - start))
    model = {name: add([average[name] for average, *_ in parts], found.coefficients) for name in names}

    several, widths = sum(len(snapshot["power"]) for snapshot in snapshots), sorted({own for _, own, _ in parts})
    lines = [
        f"{len(snapshots)} snapshots, {several} averages of widths {', '.join(map(str, widths))}",
        f"width {width} at step {steps}: relative profile error {found.error:.1e}, condition {found.condition:.1e}, "
        f"coefficients between {found.coefficients.min():.2f} and {found.coefficients.max():.2f}",
    ]
    if several > len(parts):
        lines.append(f"left out: {several - len(parts)} averages that began after step {start} or with other buffers")
    if found.error > POOR:
        lines.append(f"warning: these snapshots come no nearer to width {width}; more of them, or other widths, would")
    saved = {
        "format": FORMAT,
        "model": model | last["rest"],
        "ema": None,
        "counters": last["counters"],
        "power": {"width": width, "start": start, "error": found.error},
        "config": last["config"],
    }
    return Synthesis(saved, found, lines)


def read_snapshots(folder: Path, step: int | None) -> list[dict[str, Any]]:
    """Those up to ``step``, or all, in their order, verified; tensors are read when they are used. Raises InputError
    where there is none, or none of that step."""
    steps = {entry["step"]: name for name, entry in read_index(folder).items() if (folder / name).is_file()}
    if not steps:
        raise InputError(f"{folder} has no snapshots: train with ema.power: [0.05, 0.1] and ema.snapshots")
    if step is not None and step not in steps:
        raise InputError(f"--step {step}: there are snapshots of {', '.join(map(str, sorted(steps)))}")
    return [read(folder / steps[at]) for at in sorted(steps) if step is None or at <= step]


def add(tensors: list[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Their weighted sum, in float64; returned in their dtype."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total.add_(tensor, alpha=float(coefficient))
    return total.to(tensors[0].dtype)


if __name__ == "__main__":
    sys.exit(main())
