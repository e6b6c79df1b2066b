"""Progress on a stream that is a file, and on one that says it is a terminal."""

import io
import re

import pytest

from fabric_trainer.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


VALUES = {"epoch": 2, "loss": 0.03117, "lr": 1e-3, "grad_norm": 0.414, "samples_per_second": 1243.2}


def test_plain_line_for_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, 100, stream, clock) as progress:
        clock.now += 4.2
        progress.update(150, VALUES)  # 50 updates in 4.2 s, 850 to go: 71.4 s
        progress.print("saved [bold]step-00000150.pt[/bold]")
        clock.now += 71.4
        progress.update(1000, {"loss": float("nan"), "train/aux": 0.25})
    assert stream.getvalue().splitlines() == [
        "step 150/1000 · epoch 2 · loss 0.03117 · lr 1.0e-03 · grad_norm 0.41 · 1243 samples/s · 0:01:12 left",
        "saved [bold]step-00000150.pt[/bold]",
        "step 1000/1000 · loss nan · train/aux 0.25 · 0:00:00 left",
    ]


def test_plain_without_a_known_end_has_no_time_left() -> None:
    stream = io.StringIO()
    Progress(None, 0, stream, Clock()).update(7, {"loss": 1.0})
    assert stream.getvalue() == "step 7 · loss 1\n"


def test_plain_is_flushed_at_once() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(io.BufferedWriter(raw, 1 << 20), encoding="utf-8")
    Progress(10, 0, stream, Clock()).update(1, {"loss": 1.0})
    assert raw.getvalue().endswith(b"left\n")


def test_plain_on_an_ascii_stream() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress(10, 0, stream, Clock()).update(1, {"loss": 1.0})
    stream.seek(0)
    assert stream.read() == "step 1/10 ? loss 1 ? 0:00:00 left\n"


def test_default_stream_is_the_stdout_of_now(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(10, 0).print("here")
    assert capsys.readouterr().out == "here\n"


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    progress = Progress(1000, 100, stream, clock)
    assert stream.getvalue() == ""  # nothing before there is something to say
    clock.now += 4.2
    progress.update(150, VALUES)
    progress.print("saved [bold]step-00000150.pt[/bold]")
    progress.close()
    progress.close()
    text = stream.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert text != plain
    assert "150/1000" in plain
    for shown in ("epoch 2", "loss 0.03117", "lr 1.0e-03", "grad_norm 0.41", "1243 samples/s", "0:01:12 left"):
        assert shown in plain
    assert "saved [bold]step-00000150.pt[/bold]" in plain
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again
    progress.update(151, VALUES)  # after the end: harmless
    assert stream.getvalue() == text


@pytest.mark.parametrize("columns", [40, 80])
def test_narrow_terminal_keeps_counter_and_time(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, clock = Terminal(), Clock()
    with Progress(1000, 100, stream, clock) as progress:
        clock.now += 4.2
        progress.update(150, VALUES)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    assert max(map(len, lines)) <= columns
    assert any("150/1000" in line and "0:01:12 left" in line for line in lines)


def test_durations() -> None:
    shown = [duration(s) for s in (0, 0.1, 59.5, 3600, 93780)]
    assert shown == ["0:00:00", "0:00:01", "0:01:00", "1:00:00", "26:03:00"]
