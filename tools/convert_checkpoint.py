"""Convert weights between the Universal Physics Stack's own files, Lightning's checkpoints of it, and ours:
``python -m tools.convert_checkpoint FILE --to ours|native|lightning -o OUT``.

What FILE is, is found out. Names lose whatever wrapper's prefixes they carry; what is then not all of one network, and
nothing else, is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric_trainer.errors import FAILED, FINISHED, INPUT, CheckpointError, InputError

FORMATS = ("ours", "native", "lightning")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.convert_checkpoint", description=__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="such as operator.pt, operator-epoch=10.ckpt, step-00001200.pt")
    add("--to", choices=FORMATS, required=True, help="ours: for --init_from; native: a bare state dict, as operator.pt")
    add("--part", metavar="NAME", help="of several networks in FILE the one to take, such as operator or diffusion")
    add("--weights", choices=("raw", "ema"), default="raw", help="of a checkpoint of ours that has an average: which")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="the file to write; it must not be there yet")
    arguments = parser.parse_args(argv)
    try:
        print(convert(arguments.file, arguments.out, arguments.to, arguments.part, arguments.weights))
    except (InputError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


def convert(file: Path, out: Path, to: str, part: str | None = None, which: str = "raw") -> str:
    """Returns a line that says what was written. Raises InputError; CheckpointError or OSError for a full disk."""
    from fabric_trainer.checkpoint import write
    from models.physics import weights

    if out.exists() or not out.parent.is_dir():
        raise InputError(f"-o {out}: " + ("it exists" if out.exists() else f"there is no folder {out.parent}"))
    found = weights.read(file, part, which, key="FILE")
    weights.check(found.state, f"FILE: {file}")
    write(out, getattr(weights, to)(found))
    numbers = sum(value.numel() for value in found.state.values())
    return f"{out}: {weights.kind(found.state)}, {len(found.state)} tensors, {numbers:,} numbers"


if __name__ == "__main__":
    sys.exit(main())
