"""The physics system on real fields, through the command line: error and time on two cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY


@pytest.mark.slow
def test_burgers_in_the_ups_layout(test_data, tmp_path):
    """An error of at most 0.02 of the next state's size on the test split, in physical space, within two minutes."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, REPOSITORY / "train.py", "--config", REPOSITORY / "configs" / "ups_burgers.yaml"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--data.root", test_data / "data/pde/ups_layout"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith("test/"))
    print(f"{seconds:.0f} s", found)
    assert 0.055 < float(found["test/nrmse_physical_persistence"]) < 0.062, "another file"
    assert float(found["test/nrmse_physical"]) < 0.02
    assert float(found["test/nrmse_physical_floor"]) < float(found["test/nrmse_physical"])
    assert seconds < 120
