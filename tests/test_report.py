"""The report's page, parsed as HTML, and its pieces against plain numpy."""

import base64
import io
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from fabric_trainer.config import Config, to_yaml
from fabric_trainer.csv_logger import CsvLogger
from fabric_trainer.curves import Line, draw, number, read_metrics, smooth, thin, wants_log
from fabric_trainer.history import History
from fabric_trainer.report import save_picture, write_report
from tools import report as tool

VOID = {"meta", "img", "path", "use", "line", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, headings, captions, images, and everything that points somewhere."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[tuple[str, bytes]] = []
        self.by_tag: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [value for name, value in values.items() if name.split(":")[-1] in ("src", "href", "srcset")]
        if tag == "img":
            self.images.append((values["alt"], base64.b64decode(values["src"].removeprefix("data:image/png;base64,"))))
        if tag not in VOID:
            self.open.append(tag)
            self.by_tag.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.by_tag[tag][-1] += data


def parsed(path: Path) -> Page:
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "url(http" not in source and "@import" not in source and "<script" not in source
    assert not {"link", "script", "iframe"} & set(page.tags)
    return page


def log(folder: Path, losses: list[float], **more: list[float]) -> None:
    logger = CsvLogger(folder / "metrics.csv")
    columns = {"step": list(range(1, len(losses) + 1)), "train/loss": losses} | more
    logger.log_updates([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    logger.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "heat & <flow>"
    folder.mkdir()
    losses = [1 / step for step in range(1, 201)]
    rates = [1e-3] * 200
    more = {"lr/decay": rates, "lr/no_decay": rates, "grad_norm": losses, "samples_per_second": [100.0] * 200}
    log(folder, losses, samples=[step * 8 for step in range(1, 201)], **{"train/aux": losses}, **more)
    history = History()
    for step, nrmse, accuracy in ((50, 0.5, 0.2), (100, 0.125, 0.9), (200, 0.25, 0.8)):
        values = {"val/nrmse": nrmse, "val_ema/nrmse": nrmse / 2, "val/accuracy": accuracy}
        history.add_evaluation({"step": step, "epoch": 1, "samples": step * 8, "seconds": step / 2, **values})
    history.add_epoch({"epoch": 0, "step": 200, "train_epoch/nrmse": 0.1})
    history.write(folder)
    (folder / "config.yaml").write_text(to_yaml(Config()))
    (folder / "environment.json").write_text(json.dumps({"command": "python train.py <x>", "host": "node7"}))
    return folder


def test_page_has_everything_and_nothing_from_elsewhere(run: Path) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    page = parsed(write_report(run, {"Truth <b>& error": figure}))
    assert page.by_tag["h1"] == ["heat & <flow>"]
    assert page.by_tag["title"] == ["heat & <flow>"]
    headings = ["Metrics", "Training loss", "Validation", "Other training values", "Optimization", "Pictures"]
    assert page.by_tag["h2"] == headings
    captions = " | ".join(page.by_tag["figcaption"])
    for shown in ("train/loss", "train/aux", "nrmse", "val/accuracy", "learning rate", "grad_norm", "samples per sec"):
        assert shown in captions
    for shown in ("each update", "mean over 4", "val_ema/nrmse", "train_epoch/nrmse"):
        assert shown in captions
    assert page.tags.count("svg") == 7
    assert page.by_tag["pre"] == [to_yaml(Config())]
    assert page.by_tag["summary"] == ["Configuration", "Environment"]
    assert "python train.py <x>" in page.by_tag["details"][1]
    facts = page.by_tag["dl"][0]
    assert "updates200" in facts and "samples1,600" in facts and "0:01:40" in facts
    ((title, png),) = page.images
    assert title == "Truth <b>& error"
    assert Image.open(io.BytesIO(png)).size[0] > 300


def test_table_has_last_and_best(run: Path) -> None:
    (run / "metrics.csv").unlink()
    cells = parsed(write_report(run)).by_tag["td"]
    assert cells[:3] == ["0.25", "0.125", "100"]  # val/nrmse: lower is better
    assert cells[6:9] == ["0.8", "0.9", "100"]  # val/accuracy: higher is


def test_the_monitor_says_which_end_is_good(run: Path) -> None:
    config = Config()
    config.checkpoint.monitor, config.checkpoint.mode = "val/nrmse", "max"
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.csv").unlink()
    assert parsed(write_report(run)).by_tag["td"][:3] == ["0.25", "0.5", "50"]


def test_pictures_survive_a_rewrite_by_the_tool(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = Figure()
    figure.subplots().plot([1, 2])
    (run / "metrics.csv").unlink()
    write_report(run, {"u(x, t=1)": figure})
    (run / "pictures" / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 10)).save(run / "pictures" / "from_elsewhere.png")
    before = dict(parsed(run / "report.html").images)
    assert tool.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    after = dict(parsed(run / "report.html").images)
    assert set(before) == {"u(x, t=1)"}
    assert set(after) == {"u(x, t=1)", "from elsewhere"}
    assert after["u(x, t=1)"] == before["u(x, t=1)"]


def test_tool_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_same_title_replaces_and_other_titles_keep_apart(tmp_path: Path) -> None:
    paths = [save_picture(tmp_path, title, Figure()) for title in ("a/b", "a/b", "../c", "")]
    assert paths[0] == paths[1]
    assert {path.parent for path in paths} == {tmp_path / "pictures"}
    assert len({*paths}) == 3
    assert len({save_picture(tmp_path, title, Figure()) for title in ("u > 0", "u < 0")}) == 2


@pytest.mark.parametrize("missing", ["metrics.csv", "history.json config.yaml environment.json", "all"])
def test_missing_files(run: Path, missing: str) -> None:
    for path in list(run.iterdir()):
        if missing == "all" or path.name in missing.split():
            path.unlink()
    page = parsed(write_report(run))
    assert page.by_tag["h1"] == ["heat & <flow>"]
    assert ("Training loss" in page.by_tag.get("h2", [])) == (missing not in ("metrics.csv", "all"))
    assert ("Metrics" in page.by_tag.get("h2", [])) == (missing == "metrics.csv")


@pytest.mark.parametrize("broken", ["{", "[]", "null", "\0\0", "step\n", "a: [b"])
def test_broken_files(run: Path, broken: str) -> None:
    for name in ("metrics.csv", "history.json", "config.yaml", "environment.json"):
        (run / name).write_text(broken)
    assert parsed(write_report(run)).by_tag["h1"] == ["heat & <flow>"]


@pytest.mark.parametrize("losses", [[0.5], [math.nan], [math.inf, 1.0], [0.0, 0.0], [math.nan] * 300, [1e300, -1e300]])
def test_odd_values(tmp_path: Path, losses: list[float]) -> None:
    log(tmp_path, losses, **dict.fromkeys(("lr/all", "grad_norm", "samples_per_second", "memory/peak"), losses))
    history = History()
    history.add_evaluation({"step": 1, "seconds": math.nan, "val/loss": losses[-1]})
    history.write(tmp_path)
    captions = parsed(write_report(tmp_path)).by_tag["figcaption"]
    bad = sum(not math.isfinite(loss) for loss in losses)
    assert (f"not finite ({bad})" in captions[0]) == (bad > 0)


def test_svgs_are_well_formed_and_deterministic(run: Path) -> None:
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first
    for part in first.split("<svg")[1:]:
        ET.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")


def test_matplotlib_is_left_alone(run: Path) -> None:
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    write_report(run, {"a": Figure()})
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_tool_as_a_program(run: Path) -> None:
    (run / "metrics.csv").unlink()
    subprocess.run([sys.executable, "-m", "tools.report", str(run)], check=True, capture_output=True, timeout=60)
    assert parsed(run / "report.html").by_tag["h1"] == ["heat & <flow>"]


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_read_metrics_leaves_out_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('step,"a,b",c\n1,0.5,\n2,nan,-inf\nx,1,1\n3,1\n4,1e-3,7')
    columns = read_metrics(tmp_path / "m.csv")
    np.testing.assert_array_equal(columns["step"], [1, 2, 4])
    np.testing.assert_array_equal(columns["a,b"], [0.5, np.nan, 1e-3])
    np.testing.assert_array_equal(columns["c"], [np.nan, -np.inf, 7])
    assert read_metrics(tmp_path / "absent.csv") == {}


@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(8, 300))
def test_thin_keeps_order_ends_and_extremes(seed: int, rows: int, points: int) -> None:
    random = np.random.default_rng(seed)
    y = random.standard_cauchy(rows)
    y[random.random(rows) < 0.1] = np.nan
    x = np.arange(rows) * 3.0
    tx, ty = thin(x, y, points)
    finite = np.isfinite(y)
    assert len(tx) <= points
    assert (np.diff(tx) > 0).all()
    np.testing.assert_array_equal(ty, y[(tx / 3).astype(int)])  # points of the curve, not means
    if finite.any():
        assert (ty.min(), ty.max()) == (np.nanmin(y), np.nanmax(y))
        assert (tx[0], tx[-1]) == (x[finite][0], x[finite][-1])


def test_thin_a_million_rows_keeps_each_spike() -> None:
    y = np.zeros(10**6)
    y[::10_000] = 1
    x, thinned = thin(np.arange(10**6), y)
    assert len(x) <= 2000
    assert thinned.sum() == 100


VALUES = st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf)


@given(st.lists(VALUES, min_size=1, max_size=60), st.integers(1, 20))
def test_smooth_is_the_mean_of_neighbours(values: list[float], window: int) -> None:
    half, got = window // 2, smooth(np.array(values), window)
    for i, mean in enumerate(got):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        if near:
            assert mean == pytest.approx(sum(near) / len(near), abs=1e-6)
        else:
            assert math.isnan(mean)


def test_log_axis_only_where_it_helps() -> None:
    assert wants_log(np.geomspace(1, 1e-3, 100))
    assert wants_log(np.array([0.1] * 99 + [10]))
    assert not wants_log(np.linspace(1, 2, 100))
    assert not wants_log(np.array([0.0, 1, 1000]))
    assert not wants_log(np.array([np.nan, 1.0]))


def test_drawing_puts_the_points_where_they_are() -> None:
    """The drawn path of a straight line is straight, goes up the page as y rises, and has its points evenly."""
    svg = ET.fromstring(draw([Line("a", np.arange(5.0), np.arange(5.0), color="#123456")]))
    paths = svg.iter("{http://www.w3.org/2000/svg}path")
    (path,) = [e for e in paths if "fill: none; stroke: #123456" in e.get("style", "")]
    numbers = np.array([float(word) for word in path.get("d", "").split() if word not in "ML"]).reshape(-1, 2)
    steps = np.diff(numbers, axis=0)
    np.testing.assert_allclose(steps, np.tile(steps[0], (4, 1)), atol=1e-3)
    assert steps[0][0] > 0 > steps[0][1]


def test_numbers() -> None:
    shown = [number(value) for value in (0.25, 1234567, 1.5e-7, -0.5, math.nan, math.inf)]
    assert shown == ["0.25", "1,234,567", "1.50e−07", "−0.5", "n/a", "∞"]
