"""Write a checkpoint's network for use elsewhere: ``python -m tools.export CKPT --format onnx --out FILE``.

What was written is read back and run on validation samples; FILE is there only if its outputs are the network's.
Keys of the configuration may follow, such as --data.root X; else all are those that the checkpoint has.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fabric_trainer.errors import FAILED, FINISHED, INPUT, CheckpointError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    options, keys = _parser().parse_known_args(argv)
    from tools.export_formats import ExportError

    try:
        export(options, keys)
    except (InputError, CheckpointError, ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__, allow_abbrev=False)
    formats = ("state_dict", "safetensors", "torch_export", "onnx")
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a file, a folder of shards, or best or last with --name")
    add("--name", help="with best or last: the run's")
    add("--run.root", dest="root", default="runs", metavar="FOLDER", help="where runs are (default: runs)")
    add("--weights", choices=("raw", "ema"), default="raw", help="which of the two (default: raw)")
    add("--format", choices=formats, required=True, help="what to write")
    add("--out", type=Path, required=True, metavar="FILE", help="where to; it must not be there yet")
    add("--quantize", choices=("int8", "fp16"), help="keep the weights in fewer bits; measures before and after")
    add("--split", default="val", help="the samples to compare and measure on (default: val)")
    return parser


def export(options: argparse.Namespace, keys: Sequence[str] = ()) -> None:
    """Raises InputError, CheckpointError, ExportError; OSError for a full disk."""
    from fabric_trainer.command import Command
    from fabric_trainer.config import Config, RunConfig
    from fabric_trainer.run import find_checkpoint
    from tools.export_formats import compare, quiet, write
    from tools.export_model import load

    out: Path = options.out
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if out.exists():
        raise InputError(f"--out {out} exists: delete it first, or give another")
    if options.checkpoint in ("best", "last") and not options.name:
        raise InputError(f"{options.checkpoint} needs --name, the run's; or give a checkpoint's path")
    path = find_checkpoint(options.checkpoint, Command(), Config(name=options.name, run=RunConfig(root=options.root)))

    model = load(path, options.weights, options.quantize, options.split, keys)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder, quiet():
        file = Path(folder) / out.name
        compare(model, write(model, options.format, file))
        for made in sorted(Path(folder).iterdir(), key=file.__eq__):  # an .onnx may have its data beside it
            os.replace(made, out.with_name(made.name))
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
