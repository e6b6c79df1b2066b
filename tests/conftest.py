from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("WANDB_MODE", "offline")


def pytest_collection_finish() -> None:
    """All is imported now: a million objects, which the collector needs not walk in every test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is left at the end


@pytest.fixture
def fabric() -> Fabric:
    """One CPU process."""
    made = Fabric(accelerator="cpu", devices=1)
    made.launch()
    return made


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data, where it is: FABRIC_TRAINER_TEST_DATA, else ../shared beside the checkout."""
    folder = Path(os.environ.get("FABRIC_TRAINER_TEST_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder} (set FABRIC_TRAINER_TEST_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[..., Path]:
    """trained(strategy): the folder of its run, ``run``; each strategy is launched once, for all tests that ask.
    trained(strategy, controls=True): with the runs that show freezing, averages, finders and so on."""
    from launches import prepare

    return prepare(tmp_path_factory.mktemp("strategies"))
