"""One launch per strategy does everything that several tests look at."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from launches import run_worker
from systems import document


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with a finished run of each strategy that was asked for (``trained``)."""
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="session")
def trained(runs) -> Callable[[str], Path]:
    """trained(strategy): its folder, after the jobs that need no other strategy."""
    done: set[str] = set()

    def launch(strategy: str) -> Path:
        if strategy not in done:
            quiet = {"run": {"log_every_n_steps": 100}, "evaluate": {"every": "100 steps"}}
            jobs: dict[str, Any] = {
                "train": {},
                "collectives": {"config": document(strategy, **quiet, checkpoint={"every": "100 steps"})},
                "recompute": {
                    "config": document(
                        strategy, task={"args": {"dropout": 0.3}}, schedule={"warmup": 0}, run={"max_steps": 3}
                    )
                },
                "memory": {},
            }
            if strategy == "fsdp":
                jobs["sync_after_accumulation"] = {}
            run_worker(runs, strategy, jobs)
            done.add(strategy)
        return runs / strategy

    return launch
