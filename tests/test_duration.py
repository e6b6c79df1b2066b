"""Lengths of time: what is understood, what is refused, and that what is said is understood again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_trainer.duration import seconds, spoken


@pytest.mark.parametrize(
    "text, expected, said",
    [
        ("02:00:00:00", 2 * 86_400, "2 d"),  # days first: not two hours
        ("02:03:00:00", 2 * 86_400 + 3 * 3_600, "2 d 3 h"),
        ("12:00:00", 12 * 3_600, "12 h"),
        ("100:00:01", 360_001, "4 d 4 h 1 s"),
        ("0:05:30", 330, "5 min 30 s"),
        ("90m", 5_400, "1 h 30 min"),
        ("90 min", 5_400, "1 h 30 min"),
        ("1.5h", 5_400, "1 h 30 min"),
        ("1d 12h", 129_600, "1 d 12 h"),
        ("1d12h30m10s", 131_410, "1 d 12 h 30 min 10 s"),
        (" 45s ", 45, "45 s"),
        ("0.2s", 0.2, "0 s"),
    ],
)
def test_what_is_understood(text, expected, said):
    assert seconds(text) == pytest.approx(expected) and spoken(seconds(text)) == said


@pytest.mark.parametrize(
    "text",
    ["", "90", "12:00", "1:2:3:4:5", "01:24:00:00", "12:60:00", "12:00:60", "0m", "00:00:00", "-5m", "m", "2 weeks",
     "30m 2h", "1:00:00h", "1e3s"],
)  # fmt: skip
def test_what_is_refused(text):
    with pytest.raises(ValueError) as caught:
        seconds(text)
    message = str(caught.value)
    assert (
        "\n" not in message and repr(text) in message and "'02:12:00:00' (days first)" in message and "90m" in message
    )


@given(st.integers(1, 10**8))
def test_what_is_said_is_understood(length):
    assert seconds(spoken(length)) == length


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_clocks_are_sums(d, h, m, s):
    total = ((d * 24 + h) * 60 + m) * 60 + s
    if total:
        assert seconds(f"{d:02}:{h:02}:{m:02}:{s:02}") == seconds(f"{d * 24 + h}:{m:02}:{s:02}") == total
        assert seconds(f"{d}d {h}h {m}m {s}s") == total
