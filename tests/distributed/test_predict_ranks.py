"""Several processes write the predictions of one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import warm
import yaml
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from toys import Regression

pytestmark = pytest.mark.distributed

CONFIG = {
    "task": {"path": "test_predict_ranks.Parallel", "args": {"samples": 30}},
    "batch": {"micro_batch_size": 4},
    "ema": {"decay": 0.9},
    "run": {"max_epochs": 1},
    "fabric": {"accelerator": "cpu"},
    "loggers": {"tensorboard": False},
}


class Network(nn.Sequential):
    def tensor_parallel_plan(self) -> dict[str, object]:
        return {"0": ColwiseParallel(), "3": RowwiseParallel()}


class Parallel(Regression):
    def network(self) -> Network:
        return Network(*super().network())

    def predict(self, network: nn.Module, batch: dict) -> dict[str, Tensor | list[str]]:
        return {**super().predict(network, batch), "name": [f"sample {i}" for i in batch["index"].tolist()]}


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", "toy.yaml", "--name", "a", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'tests'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    return warm.run(command, cwd=folder, env=environment, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and the predictions of a single process: 23 samples, the last window of 2 x 4 is ragged."""
    folder = tmp_path_factory.mktemp("predict")
    (folder / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    for arguments in ((), ("--predict", "last", "--out", "one.npz")):
        done = start(folder, *arguments)
        assert done.returncode == 0, done.stderr
    return folder


def read(path: Path) -> tuple[list[int], list[str], np.ndarray]:
    """index (N,), name (N,) and y (N, 2)."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        y = np.array([[line["y_0"], line["y_1"]] for line in lines], np.float32)
        return [int(line["index"]) for line in lines], [line["name"] for line in lines], y
    with np.load(path) if path.suffix == ".npz" else h5py.File(path) as archive:
        names = archive["name"] if path.suffix == ".npz" else archive["name"].asstr()
        return archive["index"][:].tolist(), names[:].tolist(), archive["y"][:]


CASES = {
    "ddp": ("ddp.csv", ("2", "ddp"), ()),
    "a rank that has only padding": ("padding.npz", ("2", "ddp"), ("--evaluate.micro_batch_size", "11")),
    "fsdp": ("fsdp.h5", ("2", "fsdp"), ()),
    "fsdp x tensor_parallel": ("2d.npz", ("4", "fsdp"), ("--fabric.tensor_parallel_size", "2")),
}


SLOW = ("a rank that has only padding", "ddp", "fsdp x tensor_parallel")
MARKED = [pytest.param(*case, id=key, marks=[pytest.mark.slow] * (key in SLOW)) for key, case in CASES.items()]


@pytest.mark.parametrize("name, ranks, options", MARKED)
def test_several_ranks_write_what_one_writes(folder, name, ranks, options):
    options = ("--fabric.devices", ranks[0], "--fabric.strategy", ranks[1], *options)
    done = start(folder, "--predict", "last", "--out", name, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("split val, averaged weights") == done.stdout.count("23 predictions in") == 1
    index, names, y = read(folder / name)
    assert index == list(range(23)) and names == [f"sample {i}" for i in range(23)]
    np.testing.assert_allclose(y, read(folder / "one.npz")[2], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_wrong_input_ends_all_ranks(folder):
    done = start(folder, "--predict", "last", "--out", "y.txt", "--fabric.devices", "2")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: --out y.txt: predictions are written as .csv, .npz, .h5" in done.stderr
