"""Make a set of solutions: ``python -m tools.make_data burgers FOLDER --nu 0.001 --samples 128``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from data.advection import Advection
from data.burgers import Burgers
from data.darcy import Darcy
from data.generated import ensure
from data.reaction_diffusion import ReactionDiffusion

SETS = {"burgers": Burgers, "advection": Advection, "reaction_diffusion": ReactionDiffusion, "darcy": Darcy}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a set in PDEBench's HDF5 layout; print where it is.")
    commands = parser.add_subparsers(dest="name", required=True)
    for name, kind in SETS.items():
        command = commands.add_parser(name, description=kind.__doc__)
        command.add_argument("folder", type=Path, help="where the file goes, under a name with its parameters")
        for field in dataclasses.fields(kind):
            command.add_argument(
                f"--{field.name}", type=type(field.default), default=field.default, help="default %(default)s"
            )
    arguments = vars(parser.parse_args())
    kind, folder = SETS[arguments.pop("name")], arguments.pop("folder")
    try:
        generated = kind(**arguments)
    except ValueError as error:
        parser.error(str(error))
    print(ensure(folder, generated))


if __name__ == "__main__":
    main()
