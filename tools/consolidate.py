"""Make one plain checkpoint file of a sharded one: ``python -m tools.consolidate CHECKPOINT_FOLDER [-o FILE.pt]``.

On one process, whose memory has to hold the whole state. The file is what a plain save would have written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric_trainer.errors import FAILED, FINISHED, INPUT, CheckpointError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.consolidate", description=__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="CHECKPOINT_FOLDER", help="such as runs/x/checkpoints/step-00001200"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE.pt", help="by default beside the folder, with its name")
    arguments = parser.parse_args(argv)
    try:
        print(consolidate(arguments.folder, arguments.out))
    except (InputError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


def consolidate(folder: Path, out: Path | None = None) -> Path:
    """Returns the file. Raises InputError; CheckpointError where the folder is damaged; OSError for a full disk."""
    from fabric_trainer.checkpoint import load, write
    from fabric_trainer.sharded import SHARDS, whole

    saved = load(folder)
    if SHARDS not in saved:
        raise InputError(f"{folder} is one plain file already")
    folder = folder.resolve()  # best and last are links
    out = out or folder.with_name(f"{folder.name}.pt")
    if out.exists():
        raise InputError(f"{out} exists: delete it first, or give another -o")
    state = whole(saved, {key: value for key, value in saved.items() if key != SHARDS})
    write(out, state)
    return out


if __name__ == "__main__":
    sys.exit(main())
