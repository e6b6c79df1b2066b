"""Write a run's report.html anew: ``python -m tools.report RUN_FOLDER``.

The task's pictures are those that the run saved in RUN_FOLDER/pictures/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric_trainer.errors import FINISHED, INPUT
from fabric_trainer.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="such as runs/burgers")
    folder = parser.parse_args(argv).folder
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.csv", "history.json")):
        print(f"{folder} is no run's folder: it has no config.yaml, metrics.csv or history.json", file=sys.stderr)
        return INPUT
    print(write_report(folder))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
