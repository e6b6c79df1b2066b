"""Launches of worker.py, and what its ranks left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from systems import document

HERE = Path(__file__).resolve().parent


def run_worker(folder: Path, strategy: str, jobs: dict[str, Any], timeout: float = 300) -> None:
    """One launch: the jobs (functions of worker.py) one after the other, in the strategy's processes."""
    (folder / f"{strategy}.yaml").write_text(yaml.safe_dump(document(strategy)))
    command = [sys.executable, str(HERE / "worker.py"), str(folder), strategy, json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, f"{strategy}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def results(folder: Path, strategy: str, job: str) -> list[Any]:
    """What the ranks left."""
    paths = sorted((folder / strategy).glob(f"{job}-*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]
