"""Another program's command line as our configuration: ``python -m tools.translate vision [-o FILE] -- FLAGS``.

FLAGS are those of the other program, or its whole command. The configuration goes to FILE or to standard output, as
YAML; to standard error go the command that runs it, and a line for everything that could not be carried over, means
something else here, or had to be assumed. An unknown flag is an error.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fabric_trainer.command import from_checkpoint
from fabric_trainer.errors import FAILED, FINISHED, INPUT, InputError

SYSTEMS = ("vision",)  # each in translate_<system>.py, whose translate(words) gives (configuration, flags, notes)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, misplaced = _parser().parse_known_args(words[:end])
    try:
        if misplaced or end == len(words):
            raise InputError(f"the flags to translate come after --, as in {options.system} -- --epochs 10")
        show(options, words[end + 1 :])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT if isinstance(error, InputError) else FAILED
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.translate",
        usage="%(prog)s SYSTEM [-o FILE] -- FLAGS",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("system", choices=SYSTEMS, help="whose flags: vision, of train_lightning.py and its W&B twin")
    parser.add_argument("-o", dest="out", type=Path, metavar="FILE", help="where to; it must not be there yet")
    return parser


def show(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Translate and write. Raises InputError; OSError for a full disk."""
    out: Path | None = options.out
    if out and out.exists():
        raise InputError(f"-o {out} exists: delete it first, or give another")
    if out and not out.parent.is_dir():
        raise InputError(f"-o {out}: there is no folder {out.parent}")
    config, flags, notes = importlib.import_module(f"tools.translate_{options.system}").translate(words)
    from_checkpoint(config)  # as train.py will read it
    text = f"# {shlex.join(words)}\n{to_yaml(config)}"
    if out:
        out.write_text(text)
    else:
        print(text, end="")
    command = shlex.join(["python", "train.py", "--config", str(out or f"{options.system}.yaml"), *flags])
    print(command if out else f"saved as {options.system}.yaml: {command}", *notes, sep="\n", file=sys.stderr)


def to_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.exit(main())
