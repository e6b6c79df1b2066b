"""Intervals: what they accept, and when they fire."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fabric_trainer.every import Clock, Every


def walk(every: Every, clocks: list[Clock], start: int = 0) -> list[int]:
    """The clocks (by number, from ``start`` on) at which the interval fires, as the loop walks them."""
    mark, fired = every.after(clocks[start]), []
    for number in range(start + 1, len(clocks)):
        if every.reached(mark, clocks[number]):
            fired.append(number)
            mark = every.after(clocks[number])
    return fired


@pytest.mark.parametrize(
    "text, count, unit",
    [
        ("100 steps", 100, "steps"),
        ("1 step", 1, "steps"),
        ("1 epochs", 1, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        ("10 minutes", 10, "minutes"),
        ("2.5 minute", 2.5, "minutes"),
        ("  3steps ", 3, "steps"),
        ("100.0 steps", 100, "steps"),
    ],
)
def test_parse(text, count, unit):
    assert Every.parse(text) == Every(count, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "steps",
        "0 steps",
        "0.0 epochs",
        "-1 steps",
        "1.5 steps",
        "1 hour",
        "1 epochs 2",
        "1e3 steps",
        "every",
    ],
)
def test_what_is_no_interval_is_answered_with_examples(text):
    with pytest.raises(ValueError) as caught:
        Every.parse(text)
    message = str(caught.value)
    assert all(right in message for right in ("'100 steps'", "'0.5 epochs'", "'10 minutes'"))
    assert repr(text) in message and "\n" not in message


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 200), st.data())
def test_steps_fire_at_every_multiple_wherever_one_resumes(count, total, data):
    clocks = [Clock(steps=step) for step in range(total + 1)]
    every = Every.parse(f"{count} steps")
    multiples = [step for step in range(1, total + 1) if step % count == 0]
    assert walk(every, clocks) == multiples
    start = data.draw(st.integers(0, total))
    assert walk(every, clocks, start) == [step for step in multiples if step > start]


def epoch_clocks(lengths: list[int]) -> list[Clock]:
    """The clock after each window of epochs with so many windows each."""
    return [Clock()] + [
        Clock(epochs=epoch + window / windows)
        for epoch, windows in enumerate(lengths)
        for window in range(1, windows + 1)
    ]


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from(["0.1", "0.25", "0.3", "0.5", "0.75", "1", "2", "2.5"]),
    lengths=st.lists(st.integers(10, 37), min_size=1, max_size=12),
    data=st.data(),
)
def test_epochs_fire_at_the_first_window_past_every_multiple(text, lengths, data):
    interval = Fraction(text)
    places = [Fraction(0)] + [
        epoch + Fraction(window, windows) for epoch, windows in enumerate(lengths) for window in range(1, windows + 1)
    ]
    expected = [i for i in range(1, len(places)) if places[i] // interval > places[i - 1] // interval]
    clocks, every = epoch_clocks(lengths), Every.parse(f"{text} epochs")
    assert walk(every, clocks) == expected
    start = data.draw(st.integers(0, len(clocks) - 1))
    assert walk(every, clocks, start) == [number for number in expected if number > start]


@pytest.mark.parametrize("text, epochs, times", [("0.1", 1, 10), ("0.25", 1, 4), ("0.3", 3, 10), ("0.7", 7, 10)])
@pytest.mark.parametrize("windows", [10, 20, 33, 1000])
def test_fractions_fire_as_often_as_they_go_into_the_epochs(text, epochs, times, windows):
    clocks = epoch_clocks([windows] * (20 * epochs))
    fired = walk(Every.parse(f"{text} epochs"), clocks)
    assert len(fired) == 20 * times
    if windows * float(text) % 1 == 0:
        assert {b - a for a, b in pairwise(fired)} == {round(windows * float(text))}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.001, 3.0), min_size=1, max_size=100), st.sampled_from([0.5, 1.0, 2.5, 10.0]), st.data())
def test_minutes_fire_once_for_each_multiple_passed(strides, count, data):
    times = [0.0]
    for stride in strides:
        times.append(times[-1] + stride)
    assume(all(abs(t / count - round(t / count)) > 1e-6 for t in times[1:]))
    clocks, every = [Clock(minutes=t) for t in times], Every.parse(f"{count} minutes")
    expected = [i for i in range(1, len(times)) if math.floor(times[i] / count) > math.floor(times[i - 1] / count)]
    assert walk(every, clocks) == expected
    start = data.draw(st.integers(0, len(times) - 1))
    assert walk(every, clocks, start) == [number for number in expected if number > start]


@given(st.floats(0, 1e4), st.sampled_from(["0.1 epochs", "0.3 epochs", "1 epochs"]))
def test_the_next_mark_lies_ahead_and_no_further_than_one_interval(epochs, text):
    every = Every.parse(text)
    mark = every.after(Clock(epochs=epochs))
    assert not every.reached(mark, Clock(epochs=epochs)) or mark - epochs < 1e-8
    assert 0 < mark - epochs <= every.count + 1e-8 or mark == pytest.approx(epochs + every.count)
