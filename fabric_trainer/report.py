"""report.html: a run on one page that opens anywhere, offline. Made of what lies in the run's folder."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from fabric_trainer.curves import BLUE, COLORS, GREY, ORANGE, Line, draw, number, read_metrics, smooth
from fabric_trainer.files import write_atomically
from fabric_trainer.history import History, read_history
from fabric_trainer.page import curve, details, image, page, section, table
from fabric_trainer.progress import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a larger one is better; anything else is taken for a loss or an error. The table shows which way was taken
HIGHER = re.compile(r"acc|au(c|roc|prc)|f1|precision|recall|psnr|ssim|iou|dice|score|corr|(^|_)(r2|map|top\d*)(_|$)")


@dataclass(frozen=True)
class _Run:
    """What was found in a run's folder; whatever is missing or broken is empty."""

    name: str
    metrics: dict[str, np.ndarray]
    history: History
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]


def write_report(
    folder: Path, pictures: Mapping[str, Figure] | None = None, tested: Mapping[str, float] | None = None
) -> Path:
    """Write ``folder``/report.html from metrics.csv, history.json, config.yaml, environment.json and pictures/*.png,
    as far as they are there. ``pictures`` (title -> figure) are first saved into pictures/. tested: {"step", metric:
    value} in place of the history's measurement of a test split. Returns the page's path.
    """
    for title, figure in (pictures or {}).items():
        save_picture(folder, title, figure)
    run = _read(folder)
    if tested:
        run.history.add_test(tested)
    parts = [
        _header(run),
        _facts(run),
        _table(run),
        section("Training loss", _per_update(run, ["train/loss"], wide=True)),
        section("Validation", _validation(run.history)),
        section("Other training values", _per_update(run, [n for n in _training_names(run) if n != "train/loss"])),
        section("Optimization", [*_rates(run), *_per_update(run, ["grad_norm"]), *_throughput(run)]),
        section("Pictures", _pictures(folder)),
        details("Configuration", f"<pre>{escape(run.config_text)}</pre>" if run.config_text else ""),
        details("Environment", _environment(run.environment)),
    ]
    write_atomically(folder / "report.html", page(run.name, parts))
    return folder / "report.html"


def save_picture(folder: Path, title: str, figure: Figure) -> Path:
    """Save a figure as ``folder``/pictures/<the title's letters>.png, the title itself inside; returns the path."""
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:80]
    if name != title:  # two titles may leave the same letters
        name += "-" + hashlib.sha256(title.encode()).hexdigest()[:6]
    path = folder / "pictures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, bbox_inches="tight", metadata={"Title": title})
    write_atomically(path, data.getvalue())
    return path


def _read(folder: Path) -> _Run:
    config_text = _text(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
    try:
        history = read_history(folder)
    except (OSError, ValueError):
        history = History()
    try:
        environment = json.loads(_text(folder / "environment.json"))
    except ValueError:
        environment = {}
    return _Run(
        folder.resolve().name,
        read_metrics(folder / "metrics.csv"),
        history,
        config_text,
        config if isinstance(config, dict) else {},
        environment if isinstance(environment, dict) else {},
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _header(run: _Run) -> str:
    task = (run.config.get("task") or {}).get("path", "")
    parts = [task, str(run.environment.get("started", "")).replace("T", " ").replace("+00:00", " UTC")]
    line = " · ".join(escape(part) for part in parts if part)
    return f"<header>\n<h1>{escape(run.name)}</h1>\n<p>{line}</p>\n</header>"


def _facts(run: _Run) -> str:
    """How much was done, as a row of numbers."""
    metrics, last = run.metrics, (run.history.evaluations or [{}])[-1]
    facts = {
        "updates": number(_last(metrics, "step", last.get("step"))),
        "epochs": number(len(run.history.epochs)) if run.history.epochs else "n/a",
        "samples": number(_last(metrics, "samples", last.get("samples"))),
        "training time": duration(last["seconds"]) if np.isfinite(last.get("seconds", np.nan)) else "n/a",
        "samples/s, median": _rounded(metrics.get("samples_per_second")),
        "memory, peak": _bytes(metrics.get("memory/peak")),
    }
    items = [f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items() if value != "n/a"]
    return f'<dl class="facts">{"".join(items)}</dl>' if items else ""


def _last(metrics: dict[str, np.ndarray], name: str, otherwise: float | None) -> float:
    column = metrics.get(name, np.empty(0))
    return float(column[-1]) if len(column) else np.nan if otherwise is None else otherwise


def _rounded(column: np.ndarray | None) -> str:
    finite = column[np.isfinite(column)] if column is not None else np.empty(0)
    return number(float(f"{np.median(finite):.3g}")) if len(finite) else "n/a"


def _bytes(column: np.ndarray | None) -> str:
    finite = column[np.isfinite(column)] if column is not None else np.empty(0)
    return f"{finite.max() / 1e9:.2f} GB" if len(finite) else "n/a"


def _table(run: _Run) -> str:
    """Last and best value of each metric, and the step of the best."""
    rows = []
    for name, (steps, values) in (_measured(run.history.evaluations) | _measured(run.history.tests)).items():
        higher = _higher(name, run.config)
        best = "<td>n/a</td><td></td>"
        if np.isfinite(values).any():
            place = int(np.nanargmax(values) if higher else np.nanargmin(values))
            best = f"<td><strong>{number(values[place])}</strong></td><td>{number(steps[place])}</td>"
        direction = "higher is better" if higher else "lower is better"
        rows.append(
            f'<tr><th scope="row">{escape(name)} <small title="{direction}">{"↑" if higher else "↓"}</small></th>'
            f"<td>{number(values[-1])}</td>{best}</tr>"
        )
    return table("Metrics", ("metric", "last", "best", "at step"), rows)


def _measured(entries: list[dict[str, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (steps, values), each float64 (entries that have it,); parts, such as val/recall/cat, left out."""
    names = {name: None for entry in entries for name in entry if name.count("/") == 1}
    return {name: _series(entries, name) for name in names}


def _series(entries: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(entry.get("step", np.nan), entry[name]) for entry in entries if name in entry]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def _higher(name: str, config: dict[str, Any]) -> bool:
    checkpoint = config.get("checkpoint") or {}
    if name == checkpoint.get("monitor"):
        return checkpoint.get("mode") == "max"
    return HIGHER.search(name.partition("/")[2].lower()) is not None


def _training_names(run: _Run) -> list[str]:
    return [name for name in run.metrics if name.startswith("train/")]


def _per_update(run: _Run, names: list[str], wide: bool = False) -> list[str]:
    """A chart for each name: every update faintly, and above it a mean over 2% of the run."""
    figures = []
    for name in names:
        y = run.metrics.get(name, np.empty(0))
        if not len(y):
            continue
        x, window = _steps(run), len(y) // 50
        lines = [Line("each update", x, y, faint=window >= 2)]
        if window >= 2:
            mean = smooth(y, window)
            known = np.isfinite(mean)
            lines.append(Line(f"mean over {window:,}", x[known], mean[known]))
        figures.append(curve(name, lines, draw(lines, wide=wide), wide))
    return figures


def _validation(history: History) -> list[str]:
    """A chart for each metric: of the raw weights, of the averaged ones, and the mean over the training epoch."""
    series = _measured(history.evaluations)
    epochs = {name for entry in history.epochs for name in entry if name.startswith("train_epoch/")}
    figures = []
    for metric in dict.fromkeys(name.partition("/")[2] for name in series):
        lines = [
            Line(f"{kind}/{metric}", *series[f"{kind}/{metric}"], color)
            for kind, color in (("val", BLUE), ("val_ema", ORANGE))
            if f"{kind}/{metric}" in series
        ]
        lines += [
            Line(name, *values, COLORS[2 + i % 4])
            for i, (name, values) in enumerate(series.items())
            if name.partition("/")[2] == metric and not name.startswith(("val/", "val_ema/"))
        ]
        if f"train_epoch/{metric}" in epochs:
            name = f"train_epoch/{metric}"
            lines.append(Line(name, *_series(history.epochs, name), GREY, dashed=True))
        figures.append(curve(metric if len(lines) > 1 else lines[0].label, lines, draw(lines)))
    return figures


def _rates(run: _Run) -> list[str]:
    """The learning rates; groups that always share one are one line."""
    groups: dict[bytes, list[str]] = {}
    for name, values in run.metrics.items():
        if name == "lr" or name.startswith("lr/"):
            groups.setdefault(values.tobytes(), []).append(name)
    lines = [
        Line(", ".join(name.removeprefix("lr/") for name in names), _steps(run), run.metrics[names[0]], color)
        for names, color in zip(groups.values(), COLORS * len(groups), strict=False)
    ]
    return [curve("learning rate", lines, draw(lines, scale="linear", zero=True))] if lines and len(_steps(run)) else []


def _throughput(run: _Run) -> list[str]:
    y = run.metrics.get("samples_per_second")
    if y is None or not len(y):
        return []
    lines = [Line("samples_per_second", _steps(run), y)]
    return [curve("samples per second", lines, draw(lines, scale="linear", zero=True))]


def _steps(run: _Run) -> np.ndarray:
    """The x-axis: float64 (rows,)."""
    rows = len(next(iter(run.metrics.values()), ()))
    return run.metrics.get("step", np.arange(1.0, rows + 1))


def _pictures(folder: Path) -> list[str]:
    """All of pictures/*.png, oldest first, by the title inside, else the file's name; a broken one is left out."""
    from PIL import Image, UnidentifiedImageError

    figures = []
    for path in sorted((folder / "pictures").glob("*.png"), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        try:
            with Image.open(path) as picture:
                title = picture.info.get("Title") or path.stem.replace("-", " ").replace("_", " ")
                wide = picture.width > 1.6 * picture.height
        except (OSError, UnidentifiedImageError):
            continue
        figures.append(image(str(title), path.read_bytes(), wide))
    return figures


def _environment(environment: Mapping[str, Any]) -> str:
    """What matters to who wants to repeat the run; the rest is in environment.json."""
    if not environment:
        return ""
    git, hardware = environment.get("git") or {}, environment.get("hardware") or {}
    versions = [f"{name} {version}" for name, version in (environment.get("versions") or {}).items() if version]
    commit = str(git.get("commit") or "none")[:12] + (f" on {git['branch']}" if git.get("branch") else "")
    changed = len(git.get("changed") or [])
    gpus = hardware.get("gpus") or []
    pairs = {
        "command": environment.get("command"),
        "commit": f"{commit}, {changed} files changed (see environment.json)" if changed else commit if git else None,
        "versions": ", ".join(versions),
        "processor": f"{hardware.get('cpu')}, {hardware.get('cores')} cores" if hardware else None,
        "memory": f"{hardware['memory'] / 1e9:.0f} GB" if hardware.get("memory") else None,
        "GPUs": f"{len(gpus)} × {gpus[0]}" if gpus else None,
        "ranks": f"{environment.get('world_size')}, {environment.get('strategy')}, {environment.get('device')}",
        "threads": hardware.get("threads"),
        "host": environment.get("host"),
        "SLURM job": (environment.get("slurm") or {}).get("JOB_ID"),
        "working directory": environment.get("working_directory"),
    }
    items = [f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs.items() if value]
    return f'<dl class="pairs">{"".join(items)}</dl>'
