"""Make a set of Burgers trajectories in PDEBench's layout: ``python -m tools.make_burgers FOLDER --samples 128``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from data.burgers import Burgers, ensure


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a set of Burgers trajectories in PDEBench's HDF5 layout; print where it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the file goes, under a name with its parameters")
    meaning = {
        "nu": "PDEBench's Nu; the viscosity is nu / pi",
        "nx": "cells of the grid",
        "samples": "trajectories",
        "frames": "saved states, 0.01 time units apart, the initial one included",
        "seed": "of the initial conditions; other seeds give other trajectories",
    }
    for field in dataclasses.fields(Burgers):
        kind, text = type(field.default), meaning[field.name]
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    try:
        print(ensure(folder, Burgers(**arguments)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
