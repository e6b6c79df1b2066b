"""What a profile and the memory log say of two ranks, one of which is slower and larger."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter

import pytest
from launches import results

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
FORWARDS = 8 * 3 + 2 * 1  # of ten updates; the last window of an epoch has one micro-batch
SLEPT = FORWARDS * 0.01  # by rank 1


def test_the_slow_rank_is_named_and_the_other_s_waiting_seen(trained):
    folder = trained("ddp") / "profile simple"
    fast, slow = json.loads((folder / "profile.json").read_text())["ranks"]
    assert (fast["rank"], slow["rank"]) == (0, 1) and fast["calls"]["forward"] == slow["calls"]["forward"] == FORWARDS
    assert slow["seconds"]["forward"] >= SLEPT
    assert slow["seconds"]["forward"] - fast["seconds"]["forward"] > SLEPT / 2
    waiting = [rank["seconds"]["backward"] + rank["seconds"]["agree"] for rank in (fast, slow)]
    assert waiting[0] - waiting[1] > SLEPT / 2, "for the exchange of gradients"
    text = (folder / "profile.txt").read_text()
    (row,) = re.findall(r"^forward .*$", text, flags=re.MULTILINE)
    *_, least, most, rank = row.split()
    assert [float(least), float(most)] == [round(r["seconds"]["forward"], 3) for r in (fast, slow)] and rank == "1"
    assert not list(folder.glob("profile-rank*")), "one file for both"


def test_every_rank_writes_its_trace(trained):
    for rank in range(2):
        with gzip.open(trained("ddp") / f"profile pytorch/trace-rank{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        names = Counter(event["name"] for event in events if event.get("ph") == "X")
        assert sum(name.startswith("ProfilerStep") for name in names) == 3 and names["forward"] == 1 + 3 + 3
        assert any("gloo:all_reduce" in name for name in names)


def test_the_logged_memory_is_the_most_of_any_rank(trained):
    folder = trained("ddp")
    with open(folder / "profile simple/metrics.csv") as file:
        logged = float(list(csv.DictReader(file))[-1]["memory/host"])
    one, other = (rank["simple"] for rank in results(folder.parent, "ddp", "profile"))
    assert other - one > 150e6, "rank 1 holds more"
    assert logged - one > 150e6
