"""Image classification on real pictures, through the command line: accuracy and time on two cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY


def trained(config: str, root: Path, home: Path) -> tuple[list[str], float]:
    """The lines that the command prints on two cores, and its seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, REPOSITORY / "train.py", "--config", REPOSITORY / "configs" / config]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--data.root", root], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), seconds


@pytest.mark.slow
def test_cifar10_with_the_fast_network(test_data, tmp_path):
    """6,000 training pictures: at least 0.75 of the 2,000 test pictures, all in within three minutes."""
    lines, seconds = trained("cifar10_fast.yaml", test_data / "data/images/cifar10", tmp_path)
    name, accuracy = lines[-1].split()
    print(f"{seconds:.0f} s, {lines[-1]}")
    assert name == "test/acc" and len(accuracy) == len("0.7500")
    assert float(accuracy) >= 0.75
    assert seconds < 180


@pytest.mark.slow
def test_sign_digits(test_data, tmp_path):
    """A folder of 500 training pictures: at least 0.95 of the 140 validation pictures, within two minutes."""
    lines, seconds = trained("sign_digits.yaml", test_data / "data/images/sign_digits", tmp_path)
    name, accuracy = lines[-1].split()
    print(f"{seconds:.0f} s, {lines[-1]}")
    assert name == "val/acc" and len(accuracy) == len("0.9500")
    assert float(accuracy) >= 0.95
    assert seconds < 120
    assert not any("test/" in line for line in lines), "there is no test split"
