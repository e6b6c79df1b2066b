"""Curves of a run as SVG: reading metrics.csv, thinning a million points without losing a spike, drawing."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

BLUE, ORANGE, GREY, RED, INK = "#2563eb", "#ea7a17", "#94a3b8", "#dc2626", "#475569"
COLORS = (BLUE, ORANGE, "#0d9488", "#9333ea", "#64748b", "#be123c")
POINTS = 2000  # of a drawn curve, about: more than a page has pixels


@dataclass(frozen=True)
class Line:
    """One curve. x, y: float64 (N,); what is not finite in y is marked below the axis. faint: a thin background."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: str = BLUE
    faint: bool = False
    dashed: bool = False


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file of numbers by name: float64 (rows,). An empty cell is NaN; a line that is torn or
    holds something else is left out. No file, or no header, gives no columns."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(line.replace("\0", "") for line in file)
        header, flat = next(reader, []), array("d")
        for cells in reader:
            if len(cells) == len(header):
                try:
                    flat.extend([float(cell) if cell else math.nan for cell in cells])
                except ValueError:
                    continue
    table = np.frombuffer(flat, np.float64).reshape(-1, max(1, len(header)))
    return {name: table[:, i] for i, name in enumerate(header)}


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` (at least 8) of the finite points, in order: the ends, and the lowest and highest of each
    of equal stretches, so that no extreme is lost. x, y: (N,)."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(y) <= points:
        return x, y
    size = -(-len(y) // (points // 2 - 2))
    whole = len(y) // size * size
    stretches, starts = y[:whole].reshape(-1, size), np.arange(0, whole, size)
    picks = [starts + stretches.argmin(1), starts + stretches.argmax(1), [0, len(y) - 1]]
    if whole < len(y):
        picks.append([whole + y[whole:].argmin(), whole + y[whole:].argmax()])
    keep = np.unique(np.concatenate(picks))
    return x[keep], y[keep]


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Means over ``window`` neighbours, half on either side and fewer at the ends: (N,) -> (N,). NaN and infinities
    are left out of a mean; one of nothing is NaN."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place, half = np.arange(len(y)), window // 2
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(y))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def wants_log(y: np.ndarray) -> bool:
    """Whether positive values span so much (20 times, low outliers aside) that a linear axis would hide the small."""
    y = y[np.isfinite(y)]
    if len(y) < 2 or y.min() <= 0:
        return False
    return bool(y.max() >= 20 * np.percentile(y, 1))


def draw(
    lines: Sequence[Line], *, scale: Literal["auto", "linear", "log"] = "auto", wide: bool = False, zero: bool = False
) -> str:
    """An <svg> of the curves over the step, without title and legend: the page has those.

    scale "auto" is logarithmic where :func:`wants_log` says so. wide: across the page. zero: the axis starts at 0.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.3) if wide else (5.1, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        x, y = thin(line.x, line.y)
        few = len(x) <= 40 and not line.faint
        axes.plot(
            x, y, color=line.color, alpha=0.35 if line.faint else 1, linewidth=0.8 if line.faint else 1.7,
            linestyle=(0, (4, 2)) if line.dashed else "-", marker="o" if few else "", markersize=3.5,
            solid_joinstyle="round",
        )  # fmt: skip
        bad, _ = thin(line.x, np.where(np.isfinite(line.y), np.nan, 0.0), 200)
        axes.plot(bad, np.full(len(bad), 0.02), "x", color=RED, markersize=5, transform=axes.get_xaxis_transform())
    if scale == "log" or (scale == "auto" and wants_log(np.concatenate([line.y for line in lines]))):
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(bottom=0)
    _dress(axes)
    out = io.StringIO()
    # text stays text, in the page's font; ids don't depend on chance
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fabric_trainer"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue())


def number(value: float) -> str:
    """ "0.03125", "1.2e-05", "12,345", "n/a": five digits for people."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.5g}".replace("-", "−") if 1e-4 <= abs(value) < 1e5 else f"{value:.2e}".replace("-", "−")


def _dress(axes) -> None:  # type: ignore[no-untyped-def]  # an Axes: matplotlib is imported where it draws
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd5e1")
    axes.tick_params(colors=INK, labelsize=9, length=0, which="both", pad=5)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01, y=0.08)
    axes.set_xlabel("step", color=INK, fontsize=9, loc="right", labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _tick(value: float) -> str:
    """ "0", "0.25", "1.5k", "2M", "10⁻⁵": a label of an axis."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e12:
            return f"{value / unit:g}{name}"
    if 1e-3 <= size < 1e12:
        return f"{value:.6g}"
    mantissa, _, power = f"{value:.3e}".partition("e")
    digits = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    head = f"{float(mantissa):g}"
    return f"10{digits}" if head == "1" else f"{head}·10{digits}"


def _inline(svg: str) -> str:
    """The <svg> element alone, as wide as its place: without XML declaration, doctype and fixed size."""
    head, _, body = svg[svg.index("<svg") :].partition(">")
    kept = [part for part in head.split("\n") if part]
    attributes = " ".join(kept)
    for name in ("width", "height"):
        before, _, rest = attributes.partition(f' {name}="')
        attributes = before + rest.partition('"')[2] if rest else attributes
    return f"{attributes}>{body}"
